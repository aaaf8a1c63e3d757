// du = s dy B and dB = s dy^T u in one pass over dy, dA = du^T drop(x) in one pass over x, then one launch that adds up the
// parts of dA and dB. Nothing is added by atomics; every sum has one order. Here the first two are those of a float32 base.
#include "launch.h"

#include "kernels.h"
#include "lowrank_grad.cuh"
#include "thin_float.cuh"

namespace lk::cuda {
namespace {

constexpr int GROUP = 2;                             // row tiles that share a part of dB
constexpr int GROUP_ROWS = GROUP * TILE_ROWS;        // 64

// A block owns whole rows, so its du is complete; it walks its groups of rows one after the other, and from the second on
// adds to its own part of dB (N,R).
template <bool wide, bool need_du, bool need_dB>
__global__ void __launch_bounds__(THREADS, 1) grad_up_kernel(const LowrankGrad p, float* dB_parts) {
  __shared__ __align__(16) Tile tile;
  __shared__ __align__(16) float small[TILE_COLS][SMALL_PITCH];
  __shared__ __align__(16) float u[GROUP_ROWS][SMALL_PITCH];
  __shared__ float parts[WARPS][TILE_ROWS][RANKS];
  const int64_t r0 = static_cast<int64_t>(blockIdx.y) * RANKS;
  float* dB = dB_parts + static_cast<int64_t>(blockIdx.x) * p.N * p.R;

  const int64_t step = static_cast<int64_t>(gridDim.x) * GROUP_ROWS;
  const int columns_all = static_cast<int>(p.N);
  bool first = true;
  for (int64_t m0 = static_cast<int64_t>(blockIdx.x) * GROUP_ROWS; m0 < p.M; m0 += step, first = false) {
    float sum[GROUP][4][4] = {};
    Pack8<float> packs[PACKS];
    if constexpr (need_dB) {
      __syncthreads();  // the group before has read its u
      stage_small(u, GROUP_ROWS, p.u, m0, r0, p.M, p.R);
    }
    load_tile<wide>(packs, p.dy, m0, 0, p.M, p.N);
    for (int n0 = 0; n0 < columns_all; n0 += TILE_COLS) {
      float columns[2][4] = {};
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        const int64_t m = m0 + g * TILE_ROWS;
        __syncthreads();  // the tile before has been read
        store_tile<false>(tile, packs, m, n0, nullptr, 0);
        if (need_du && g == 0) stage_small(small, TILE_COLS, p.B, n0, r0, p.N, p.R);
        __syncthreads();
        const int64_t next_m = g + 1 < GROUP ? m + TILE_ROWS : m0;
        const int next_n = g + 1 < GROUP ? n0 : n0 + TILE_COLS;
        if (next_n < columns_all) load_tile<wide>(packs, p.dy, next_m, next_n, p.M, p.N);
        if constexpr (need_du) row_products(sum[g], tile, small);
        if constexpr (need_dB) column_products(columns, tile, u + g * TILE_ROWS);
      }
      if constexpr (need_dB) {
        const int64_t n = n0 + threadIdx.x / 4 * 2, r = r0 + threadIdx.x % 4 * 4;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (n + i < p.N && r + j < p.R) {
              float* at = dB + (n + i) * p.R + r + j;
              *at = first ? columns[i][j] : *at + columns[i][j];
            }
      }
    }
    if constexpr (need_du) {
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        const int64_t m = m0 + g * TILE_ROWS;
        reduce_rows(parts, sum[g], static_cast<float*>(p.du.data) + m * p.du.row_stride + r0, p.du.row_stride, p.M - m,
                    p.R - r0, p.scaling);
      }
    }
  }
}

// A block owns TILE_COLS columns, RANKS ranks and a slab of rows; its part of dA is (R,K).
template <bool dropout, bool wide>
__global__ void __launch_bounds__(THREADS, 2) grad_down_kernel(const LowrankGrad p, float* dA_parts, int64_t slab_rows, int column_blocks) {
  __shared__ __align__(16) Tile tile;
  __shared__ __align__(16) float du[TILE_ROWS][SMALL_PITCH];
  const int64_t slab = blockIdx.x / column_blocks, k0 = static_cast<int64_t>(blockIdx.x % column_blocks) * TILE_COLS;
  const int64_t r0 = static_cast<int64_t>(blockIdx.y) * RANKS;
  const int64_t begin = slab * slab_rows, end = begin + slab_rows < p.M ? begin + slab_rows : p.M;

  float sum[2][4] = {};
  Pack8<float> packs[PACKS];
  load_tile<wide>(packs, p.x, begin, k0, end, p.K);
  for (int64_t m0 = begin; m0 < end; m0 += TILE_ROWS) {
    __syncthreads();  // the tile before has been read
    store_tile<dropout>(tile, packs, m0, k0, p.dropout.seed, p.dropout.threshold);
    stage_small(du, TILE_ROWS, p.du, m0, r0, end, p.R);
    __syncthreads();
    if (m0 + TILE_ROWS < end) load_tile<wide>(packs, p.x, m0 + TILE_ROWS, k0, end, p.K);
    column_products(sum, tile, du);
  }
  const int64_t k = k0 + threadIdx.x / 4 * 2, r = r0 + threadIdx.x % 4 * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (k + i < p.K && r + j < p.R) dA_parts[(slab * p.R + r + j) * p.K + k + i] = sum[i][j];
}

struct Sum {
  const float* parts;
  void* out;
  DType dtype;
  int64_t count, size;  // parts, and elements of each
  float scale;
};

__device__ __forceinline__ void sum_element(const Sum& s, int64_t i) {
  float total = 0.0f;
#pragma unroll 8
  for (int64_t part = 0; part < s.count; ++part) total += s.parts[part * s.size + i];
  total *= s.scale;
  if (s.dtype == DType::f32)
    static_cast<float*>(s.out)[i] = total;
  else if (s.dtype == DType::bf16)
    static_cast<__nv_bfloat16*>(s.out)[i] = __float2bfloat16_rn(total);
  else
    static_cast<__half*>(s.out)[i] = __float2half_rn(total);
}

__global__ void __launch_bounds__(THREADS) sum_parts_kernel(const Sum a, const Sum b) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i < a.size)
    sum_element(a, i);
  else if (i < a.size + b.size)
    sum_element(b, i - a.size);
}

int run_float(const LowrankGrad& p, const Plan& plan, float* dB_parts, float* dA_parts, cudaStream_t stream) {
  const bool need_du = p.B.data, need_dB = p.u.data, need_dA = p.x.data;
  const unsigned chunks = static_cast<unsigned>(blocks_of(p.R, RANKS));
  const bool wide_dy = is_wide<float>(p.dy), wide_x = is_wide<float>(p.x);
  const dim3 rows(static_cast<unsigned>(plan.programs), chunks);
  const auto up = need_du && need_dB ? wide_dy ? grad_up_kernel<true, true, true> : grad_up_kernel<false, true, true>
                  : need_du          ? wide_dy ? grad_up_kernel<true, true, false> : grad_up_kernel<false, true, false>
                                     : wide_dy ? grad_up_kernel<true, false, true> : grad_up_kernel<false, false, true>;
  int status = LK_LAUNCH(up, rows, THREADS, stream, p, dB_parts);
  if (status == cudaSuccess && need_dA) {
    const int column_blocks = static_cast<int>(blocks_of(p.K, TILE_COLS));
    const dim3 grid(static_cast<unsigned>(column_blocks * plan.slabs), chunks);
    const auto down = p.dropout.threshold ? wide_x ? grad_down_kernel<true, true> : grad_down_kernel<true, false>
                                          : wide_x ? grad_down_kernel<false, true> : grad_down_kernel<false, false>;
    status = LK_LAUNCH(down, grid, THREADS, stream, p, dA_parts, plan.slab_rows, column_blocks);
  }
  return status;
}

// half: with the tiles of lowrank_grad_half.cu
Plan plan_of(int64_t M, int64_t N, int64_t K, int64_t R, bool half, bool need_dA, bool need_dB) {
  if (half) return plan(M, N, K, R, need_dA, need_dB, half_tiles(M));
  return plan(M, N, K, R, need_dA, need_dB, {GROUP_ROWS, TILE_COLS, RANKS, 4 * TILE_ROWS});
}

}  // namespace

int64_t lowrank_grad_workspace(int64_t M, int64_t N, int64_t K, int64_t R, bool half, bool need_dA, bool need_dB) {
  const Plan p = plan_of(M, N, K, R, half, need_dA, need_dB);
  return p.programs * p.dB_size + p.slabs * p.dA_size;
}

int lowrank_grad(const LowrankGrad& p, void* stream) {
  if (p.M == 0) return cudaSuccess;
  if (blocks_of(p.R, RANKS) > 65535) return cudaErrorInvalidValue;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const bool half = p.dy.dtype != DType::f32, need_dA = p.x.data, need_dB = p.u.data;
  const Plan plan = plan_of(p.M, p.N, p.K, p.R, half, need_dA, need_dB);
  float *dB_parts = p.workspace, *dA_parts = p.workspace + plan.programs * plan.dB_size;
  const int status = half ? lowrank_grad_half(p, plan, dB_parts, dA_parts, s) : run_float(p, plan, dB_parts, dA_parts, s);
  if (status != cudaSuccess || !(need_dA || need_dB)) return status;
  const Sum a = {dA_parts, p.dA.data, p.dA.dtype, plan.slabs, plan.dA_size, p.dropout.threshold ? p.dropout.scale : 1.0f};
  const Sum b = {dB_parts, p.dB.data, p.dB.dtype, plan.programs, plan.dB_size, p.scaling};
  const dim3 grid(static_cast<unsigned>(blocks_of(a.size + b.size, THREADS)), 1);
  return LK_LAUNCH(sum_parts_kernel, grid, THREADS, s, a, b);
}

}  // namespace lk::cuda
