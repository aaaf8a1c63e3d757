// The passes over dy and over x of lowrank_grad.cu, of a half-precision base. Blocks of the same rows, or columns, follow each other, so that what
// is large comes from memory once for all ranks.
#include "launch.h"

#include "kernels.h"
#include "lowrank_grad.cuh"
#include "thin_half.cuh"

namespace lk::cuda {
namespace {

constexpr int COLUMNS = 64;
static_assert(COLUMNS == half_tiles(1).columns && COLUMNS == DEPTH, "as the plan says");

// Where chunk c of row r stands, of rows of 64 columns that a warp keeps for itself: those that store a row's chunks and those that read a
// chunk of every other row meet no bank twice.
__device__ __forceinline__ int place_of(int r, int c) { return 8 * r + (c ^ (r & 6) ^ (r & 1) << 2); }

// A block owns whole rows, so its du is complete; its warps share the columns, 64 at a time. It walks its groups of GROUP_ROWS rows one after
// the other, TILES tiles of 16 rows at a time, and from the second on adds to its own part of dB (N,R).
template <class T, class V, int GROUPS, int TILES, int GROUP_ROWS, bool wide, Lie LIE>
__global__ void __launch_bounds__(THREADS, 1) grad_up_half_kernel(const LowrankGrad p, float* dB_parts, int chunks) {
  using O = Operands<T, V>;
  constexpr bool ahead = GROUPS == 2;  // the next rows on their way while some are multiplied; more ranks leave no registers for them
  constexpr int ROWS = 16 * TILES, TIMES = GROUP_ROWS / ROWS, RANKS = 8 * GROUPS, PAIRED = GROUPS / 2;  // sixteen ranks
  __shared__ uint4 rows_of[WARPS][8 * ROWS];                // at the end the warps' sums of du
  __shared__ uint4 u[GROUP_ROWS / 16][PAIRED][O::SMALL][32];  // each lane's share of u
  float* parts = reinterpret_cast<float*>(rows_of);
  static_assert(sizeof(float) * WARPS * 16 * RANKS <= sizeof(rows_of), "the sums take the rows' place");

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const bool need_du = p.B.data, need_dB = p.u.data;
  const int N = static_cast<int>(p.N), R = static_cast<int>(p.R), r0 = static_cast<int>(blockIdx.x) % chunks * RANKS, steps = (N + DEPTH - 1) / DEPTH;
  const Small<V> B = {static_cast<const V*>(p.B.data), p.B.row_stride, p.B.col_stride, N, R, r0};
  const Thin thin = {static_cast<const float*>(p.u.data), p.u.row_stride, p.M, p.R};
  const bool pairs = R % 2 == 0;  // dB's rows begin on eight bytes
  const int64_t program = blockIdx.x / chunks, programs = gridDim.x / chunks;
  float* dB = dB_parts + program * p.N * p.R;

  bool first = true;
  for (int64_t m0 = program * GROUP_ROWS; m0 < p.M; m0 += programs * GROUP_ROWS, first = false) {
    if (need_dB) {
      for (int i = thread; i < GROUP_ROWS / 16 * PAIRED * 32; i += THREADS) {
        const int block = i / (32 * PAIRED), of_ranks = i / 32 % PAIRED;
        float v[4][2];
        load_thin(v, thin, m0 + 16 * block, r0 + 16 * of_ranks + 2 * g, t);
        uint32_t left[O::SMALL][4];
        split_thin<typename O::Factor>(v, left);
#pragma unroll
        for (int l = 0; l < O::SMALL; ++l) u[block][of_ranks][l][lane] = make_uint4(left[l][0], left[l][1], left[l][2], left[l][3]);
      }
      __syncthreads();
    }
    float du[TIMES][TILES][GROUPS][4] = {};
    Share<TILES> next;
    if (ahead && warp < steps) load_share<T, wide, TILES>(next, p.dy, m0, warp * DEPTH, p.M, N);
#pragma unroll 1
    for (int step = warp; step < steps; step += WARPS) {
      float columns[8][PAIRED][4] = {};
#pragma unroll
      for (int time = 0; time < TIMES; ++time) {
        Share<TILES> now;
        if (ahead)
          copy_share<TILES>(now, next);
        else
          load_share<T, wide, TILES>(now, p.dy, m0 + ROWS * time, step * DEPTH, p.M, N);
        const int next_step = time + 1 < TIMES ? step : step + WARPS;
        const int64_t next_m = time + 1 < TIMES ? m0 + ROWS * (time + 1) : m0;
        if (ahead && next_step < steps) load_share<T, wide, TILES>(next, p.dy, next_m, next_step * DEPTH, p.M, N);
        if (need_du) row_products<T, V, GROUPS, LIE, TILES>(du[time], now, B, step * DEPTH);
        if (need_dB) {
          __syncwarp();  // the rows before have been read
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int c = 0; c < 2; ++c)
                rows_of[warp][place_of(16 * tile + 8 * i + g, 4 * c + t)] = now[tile][i][c];
          __syncwarp();
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            uint4 rows[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) rows[i] = rows_of[warp][place_of(16 * tile + row_of(t, i), g)];
            uint32_t left[PAIRED][O::SMALL][4];
#pragma unroll
            for (int q = 0; q < PAIRED; ++q)
#pragma unroll
              for (int l = 0; l < O::SMALL; ++l) {
                const uint4 four = u[TILES * time + tile][q][l][lane];
                left[q][l][0] = four.x, left[q][l][1] = four.y, left[q][l][2] = four.z, left[q][l][3] = four.w;
              }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              uint32_t right[O::LARGE][2];
              split_column<T, V>(rows, j, right);
#pragma unroll
              for (int q = 0; q < PAIRED; ++q) mma_terms<typename O::Factor>(columns[j][q], left[q], right);
            }
          }
        }
      }
      if (need_dB) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int q = 0; q < PAIRED; ++q)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int n = step * DEPTH + 8 * (2 * t + e) + j, r = r0 + 16 * q + 2 * g;
              if (n >= N || r >= R) continue;
              float* at = dB + n * p.R + r;
              const float low = columns[j][q][e], high = columns[j][q][2 + e];
              if (pairs) {
                const float2 before = first ? make_float2(0.0f, 0.0f) : *reinterpret_cast<const float2*>(at);
                *reinterpret_cast<float2*>(at) = make_float2(before.x + low, before.y + high);
              } else {
                at[0] = first ? low : at[0] + low;
                if (r + 1 < R) at[1] = first ? high : at[1] + high;
              }
            }
      }
    }
    if (need_du) {
#pragma unroll
      for (int time = 0; time < TIMES; ++time)
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const int64_t m = m0 + ROWS * time + 16 * tile;
          reduce_tile<GROUPS>(parts, du[time][tile], 1, static_cast<float*>(p.du.data) + r0, p.du.row_stride, m, 0, p.M, R - r0, p.scaling);
        }
    }
    __syncthreads();  // u and the sums have been read
  }
}

// Where terms and sums take too many registers for two blocks to share a processor, a block has one for itself; there, and with few sums, the
// next rows are on their way while some are multiplied.
template <class T, class V, int GROUPS> constexpr bool ALONE = !Operands<T, V>::ROUNDED && (GROUPS > 2 || Operands<T, V>::LARGE > 1);

// A block owns 64 columns, RANKS ranks and a slab of rows, sixteen of which a warp takes at a time; its part of dA is (R,K).
template <class T, class V, int GROUPS, bool wide>
__global__ void __launch_bounds__(THREADS, wide && !ALONE<T, V, GROUPS> ? 2 : 1)
grad_down_half_kernel(const LowrankGrad p, float* dA_parts, int64_t slab_rows, int column_blocks, int chunks) {
  using O = Operands<T, V>;
  constexpr int RANKS = 8 * GROUPS, PAIRED = GROUPS / 2;
  __shared__ __align__(16) float parts[WARPS][16][COLUMNS];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int block = blockIdx.x / chunks, k0 = block % column_blocks * COLUMNS;
  const int64_t slab = block / column_blocks, r0 = static_cast<int64_t>(blockIdx.x % chunks) * RANKS;
  const int64_t begin = slab * slab_rows, end = begin + slab_rows < p.M ? begin + slab_rows : p.M;
  const Thin thin = {static_cast<const float*>(p.du.data), p.du.row_stride, end, p.R};
  const bool dropout = p.dropout.threshold;
  const int64_t seed = dropout ? *p.dropout.seed : 0;

  float sum[8][PAIRED][4] = {};
  uint4 next[4];
  float next_du[PAIRED][4][2];
  const auto load = [&](int64_t m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) next[i] = load_words<T, wide>(p.x, m + row_of(t, i), k0 + 8 * g, end, static_cast<int>(p.K));
#pragma unroll
    for (int q = 0; q < PAIRED; ++q) load_thin(next_du[q], thin, m, r0 + 16 * q + 2 * g, t);
  };
  int64_t m = begin + 16 * warp;
  constexpr bool ahead = wide && (ALONE<T, V, GROUPS> || GROUPS == 2);
  if (ahead && m < end) load(m);
#pragma unroll 1
  for (; m < end; m += 16 * WARPS) {
    if (!ahead) load(m);
    uint4 now[4];
    uint32_t left[PAIRED][O::SMALL][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) now[i] = next[i];
#pragma unroll
    for (int q = 0; q < PAIRED; ++q) split_thin<typename O::Factor>(next_du[q], left[q]);
    if (ahead && m + 16 * WARPS < end) load(m + 16 * WARPS);
    if (dropout)
#pragma unroll
      for (int i = 0; i < 4; ++i) drop_words(now[i], seed, p.dropout.threshold, m + row_of(t, i), k0 + 8 * g);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t right[O::LARGE][2];
      split_column<T, V>(now, j, right);
#pragma unroll
      for (int q = 0; q < PAIRED; ++q) mma_terms<typename O::Factor>(sum[j][q], left[q], right);
    }
  }
#pragma unroll
  for (int q = 0; q < PAIRED; ++q) {
    __syncthreads();  // the ranks before have been read
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[warp][2 * g + i / 2][8 * (2 * t + i % 2) + j] = sum[j][q][i];
    __syncthreads();
    for (int i = thread; i < 16 * COLUMNS; i += THREADS) {
      const int rank = i / COLUMNS, column = i % COLUMNS;
      float total = parts[0][rank][column];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) total += parts[w][rank][column];
      const int64_t r = r0 + 16 * q + rank, k = k0 + column;
      if (r < p.R && k < p.K) dA_parts[(slab * p.R + r) * p.K + k] = total;
    }
  }
}

template <class T, class V>
int run(const LowrankGrad& p, const Plan& plan, float* dB_parts, float* dA_parts, cudaStream_t stream) {
  if (p.N > MOST || p.K > MOST || p.R > MOST) return cudaErrorInvalidValue;
  const bool many = p.R > 16, wide_dy = is_wide_half<T>(p.dy, p.N), wide_x = is_wide_half<T>(p.x, p.K);
  const bool usual = !p.B.data || lie_of<V>(p.B.data, p.B.row_stride, p.B.col_stride, p.N, p.R, 8, many ? 4 : 2) == Lie::across;
  const bool deep = many && wide_dy && usual, deep_down = many && wide_x;
  const bool tall = half_tiles(p.M).up_rows == 64;
  const auto wide_up = deep ? tall ? grad_up_half_kernel<T, V, 4, 1, 64, true, Lie::across> : grad_up_half_kernel<T, V, 4, 1, 32, true, Lie::across>
                       : tall      ? grad_up_half_kernel<T, V, 2, 2, 64, true, Lie::across> : grad_up_half_kernel<T, V, 2, 2, 32, true, Lie::across>;
  const auto up = wide_dy && usual ? wide_up
                  : wide_dy        ? grad_up_half_kernel<T, V, 2, 1, 32, true, Lie::scattered> : grad_up_half_kernel<T, V, 2, 1, 32, false, Lie::scattered>;
  const auto grid = [&](int64_t blocks, int chunks) { return dim3(static_cast<unsigned>(blocks * chunks)); };
  const int up_chunks = static_cast<int>(blocks_of(p.R, deep ? 32 : 16)), down_chunks = static_cast<int>(blocks_of(p.R, deep_down ? 32 : 16));
  const int64_t column_blocks = blocks_of(p.K, COLUMNS);
  if (plan.programs * up_chunks > 0x7fffffff || column_blocks * plan.slabs * down_chunks > 0x7fffffff) return cudaErrorInvalidValue;
  const int status = LK_LAUNCH(up, grid(plan.programs, up_chunks), THREADS, stream, p, dB_parts, up_chunks);
  if (status != cudaSuccess || !p.x.data) return status;
  const auto down = deep_down ? grad_down_half_kernel<T, V, 4, true>
                    : wide_x  ? grad_down_half_kernel<T, V, 2, true> : grad_down_half_kernel<T, V, 2, false>;
  const dim3 blocks = grid(column_blocks * plan.slabs, down_chunks);
  return LK_LAUNCH(down, blocks, THREADS, stream, p, dA_parts, plan.slab_rows, static_cast<int>(column_blocks), down_chunks);
}

template <class T>
int choose(const LowrankGrad& p, const Plan& plan, float* dB_parts, float* dA_parts, cudaStream_t stream) {
  const DType adapter = p.B.data ? p.B.dtype : p.dB.dtype;
  if (adapter == DType::f32) return run<T, float>(p, plan, dB_parts, dA_parts, stream);
  return adapter == p.dy.dtype ? run<T, T>(p, plan, dB_parts, dA_parts, stream) : cudaErrorInvalidValue;
}

}  // namespace

int lowrank_grad_half(const LowrankGrad& p, const Plan& plan, float* dB_parts, float* dA_parts, cudaStream_t stream) {
  return p.dy.dtype == DType::bf16 ? choose<__nv_bfloat16>(p, plan, dB_parts, dA_parts, stream) : choose<__half>(p, plan, dB_parts, dA_parts, stream);
}

}  // namespace lk::cuda
