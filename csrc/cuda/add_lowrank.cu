// y += scaling * (drop'(u v^T) + bias) of a float32 y, in place: y moves once, sixteen bytes at a time.
//
// A block owns BLOCK_M rows by BLOCK_N columns; a thread owns eight consecutive columns of ROWS rows. v and u pass
// through shared memory in chunks of BLOCK_R ranks; a sum runs over r = 0..R-1 in that order, so the bits depend on
// neither the grid nor the scheduling.
#include "launch.h"

#include "../philox.h"
#include "element.cuh"
#include "kernels.h"

namespace lk::cuda {
namespace {

constexpr int COLS = 8, ROWS = 4;                 // outputs of a thread
constexpr int LANES_N = 16, LANES_M = 16;         // threads of a block
constexpr int BLOCK_N = COLS * LANES_N;           // 128
constexpr int BLOCK_M = ROWS * LANES_M;           // 64
constexpr int BLOCK_R = 32;
constexpr int THREADS = LANES_N * LANES_M;
constexpr int V_PITCH = BLOCK_N + 4;              // rows stay 16-byte aligned; transposing stores spread over banks

template <bool dropout, bool wide>
__global__ void __launch_bounds__(THREADS) add_lowrank_kernel(const AddLowrank p) {
  __shared__ __align__(16) float v_tile[BLOCK_R][V_PITCH];
  __shared__ __align__(16) float u_tile[BLOCK_R][BLOCK_M];
  const int thread = threadIdx.x, lane_n = thread % LANES_N, lane_m = thread / LANES_N;
  const int64_t n0 = static_cast<int64_t>(blockIdx.y) * BLOCK_N, n = n0 + lane_n * COLS;

  for (int64_t m0 = static_cast<int64_t>(blockIdx.x) * BLOCK_M; m0 < p.M; m0 += static_cast<int64_t>(gridDim.x) * BLOCK_M) {
    float sum[ROWS][COLS] = {};
    for (int64_t r0 = 0; r0 < p.R; r0 += BLOCK_R) {
      const int ranks = static_cast<int>(p.R - r0 < BLOCK_R ? p.R - r0 : BLOCK_R);
      __syncthreads();
      // B (N,R) is contiguous along r, A transposed along n: let neighbouring threads follow the small stride
      for (int i = thread; i < BLOCK_R * BLOCK_N; i += THREADS) {
        const bool along_r = p.v.col_stride < p.v.row_stride;
        const int r = along_r ? i % BLOCK_R : i / BLOCK_N, c = along_r ? i / BLOCK_R : i % BLOCK_N;
        v_tile[r][c] = r < ranks && n0 + c < p.N
                           ? load_scalar(p.v.data, p.v.dtype, (n0 + c) * p.v.row_stride + (r0 + r) * p.v.col_stride)
                           : 0.0f;
      }
      for (int i = thread; i < BLOCK_R * BLOCK_M; i += THREADS) {
        const int r = i % BLOCK_R, m = i / BLOCK_R;
        u_tile[r][m] = r < ranks && m0 + m < p.M
                           ? static_cast<const float*>(p.u.data)[(m0 + m) * p.u.row_stride + r0 + r]
                           : 0.0f;
      }
      __syncthreads();
      for (int r = 0; r < ranks; ++r) {
        const float4 a = *reinterpret_cast<const float4*>(&u_tile[r][lane_m * ROWS]);
        const float4 low = *reinterpret_cast<const float4*>(&v_tile[r][lane_n * COLS]);
        const float4 high = *reinterpret_cast<const float4*>(&v_tile[r][lane_n * COLS + 4]);
        const float rows[ROWS] = {a.x, a.y, a.z, a.w};
        const float cols[COLS] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
          for (int j = 0; j < COLS; ++j) sum[i][j] = fmaf(rows[i], cols[j], sum[i][j]);
      }
    }

    float bias[COLS] = {};
    if (p.bias.data) {
#pragma unroll
      for (int j = 0; j < COLS; ++j)
        if (n + j < p.N) bias[j] = p.scaling * load_scalar(p.bias.data, p.bias.dtype, (n + j) * p.bias.col_stride);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64_t m = m0 + lane_m * ROWS + i;
      if (m >= p.M || n >= p.N) continue;
      if constexpr (dropout) {
        const Philox8 draw = philox8(static_cast<uint64_t>(*p.dropout.seed), static_cast<uint64_t>(m),
                                     static_cast<uint32_t>(n >> 3));
#pragma unroll
        for (int j = 0; j < COLS; ++j)
          sum[i][j] = draw.lane(j) >= p.dropout.threshold ? sum[i][j] * p.dropout.scale : 0.0f;
      }
      float* y = static_cast<float*>(p.y.data) + m * p.y.row_stride + n;
      if (wide && n + COLS <= p.N) {
        Pack8<float> pack = *reinterpret_cast<const Pack8<float>*>(y);
#pragma unroll
        for (int j = 0; j < COLS; ++j) pack.at[j] += p.scaling * sum[i][j] + bias[j];
        *reinterpret_cast<Pack8<float>*>(y) = pack;
      } else {
#pragma unroll
        for (int j = 0; j < COLS; ++j)
          if (n + j < p.N) y[j] += p.scaling * sum[i][j] + bias[j];
      }
    }
  }
}

}  // namespace

int add_lowrank(const AddLowrank& p, void* stream) {
  if (p.M == 0 || p.N == 0) return cudaSuccess;
  if (p.y.dtype != DType::f32) return add_lowrank_half(p, stream);
  const int64_t row_blocks = (p.M + BLOCK_M - 1) / BLOCK_M, column_blocks = (p.N + BLOCK_N - 1) / BLOCK_N;
  if (column_blocks > 65535) return cudaErrorInvalidValue;  // N beyond 8.3 million columns
  const dim3 grid(static_cast<unsigned>(row_blocks < 0x7fffffff ? row_blocks : 0x7fffffff),
                  static_cast<unsigned>(column_blocks));
  const bool wide = reinterpret_cast<uintptr_t>(p.y.data) % 16 == 0 && p.y.row_stride * sizeof(float) % 16 == 0;
  const auto kernel = p.dropout.threshold ? wide ? add_lowrank_kernel<true, true> : add_lowrank_kernel<true, false>
                                          : wide ? add_lowrank_kernel<false, true> : add_lowrank_kernel<false, false>;
  return LK_LAUNCH(kernel, grid, THREADS, static_cast<cudaStream_t>(stream), p);
}

}  // namespace lk::cuda
