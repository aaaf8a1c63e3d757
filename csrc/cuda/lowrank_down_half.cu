// u = drop(x) A^T of a half-precision base: one pass over x for the A's that share it. A block owns some rows and up to 64 ranks of one A; its warps
// share the columns, 64 at a time, and are summed in their order. Blocks of the same rows follow each other, so that x comes from memory once.
#include "launch.h"

#include "kernels.h"
#include "thin_half.cuh"

namespace lk::cuda {
namespace {

// With more than 16 ranks the next share is on its way while one is multiplied; else that takes a second block, for which registers are left.
template <class T, class V, int GROUPS> constexpr bool AHEAD = GROUPS > 2 && Operands<T, V>::LARGE == 1;

// teams: of warps, each with TILES tiles of 16 rows of its own. They read the same columns of A at about the same time, from the first cache.
template <class T, class V, int GROUPS, int TILES, bool wide, Lie LIE>
__global__ void __launch_bounds__(THREADS, GROUPS > 2 || LIE == Lie::scattered ? 1 : 2)
lowrank_down_half_kernel(const LowrankDown p, int chunks, int teams) {
  constexpr int RANKS = 8 * GROUPS, ROWS = 16 * TILES;
  constexpr bool ahead = AHEAD<T, V, GROUPS>;
  __shared__ float parts[WARPS * 16 * RANKS];
  const Part part = part_of(p, blockIdx.x % chunks, RANKS);
  const auto& own = p.part[part.index];
  const int K = static_cast<int>(p.K), R = static_cast<int>(own.R), steps = (K + DEPTH - 1) / DEPTH;
  const Small<V> A = {static_cast<const V*>(own.A.data), own.A.col_stride, own.A.row_stride, K, R, static_cast<int>(part.r0)};
  const bool dropout = p.dropout.threshold;
  const int64_t seed = dropout ? p.dropout.seed[part.index] : 0;
  const int warps = WARPS / teams, warp = threadIdx.x / 32 % warps;
  const int64_t block0 = static_cast<int64_t>(blockIdx.x / chunks) * ROWS * teams, m0 = block0 + threadIdx.x / 32 / warps * ROWS;

  float sum[TILES][GROUPS][4] = {};
  Share<TILES> next;
  int step = warp;
  if (ahead && step < steps) load_share<T, wide, TILES>(next, p.x, m0, step * DEPTH, p.M, K);
#pragma unroll 1
  for (; step < steps; step += warps) {
    Share<TILES> now;
    if (ahead)
      copy_share<TILES>(now, next);
    else
      load_share<T, wide, TILES>(now, p.x, m0, step * DEPTH, p.M, K);
    if (ahead && step + warps < steps) load_share<T, wide, TILES>(next, p.x, m0, (step + warps) * DEPTH, p.M, K);
    if (dropout) drop_share<TILES>(now, seed, p.dropout.threshold, m0, step * DEPTH);
    row_products<T, V, GROUPS, LIE, TILES>(sum, now, A, step * DEPTH);
  }
  float* u = static_cast<float*>(p.u.data) + own.column + part.r0;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
    reduce_tile<GROUPS>(parts, sum[tile], teams, u, p.u.row_stride, block0 + 16 * tile, ROWS, p.M, own.R - part.r0, dropout ? p.dropout.scale : 1.0f);
}

template <class T, class V, int GROUPS, int TILES, bool wide, Lie LIE>
int run(const LowrankDown& p, int teams, cudaStream_t stream) {
  int64_t chunks = 0;
  for (int i = 0; i < p.parts; ++i) chunks += blocks_of(p.part[i].R, 8 * GROUPS);
  const int64_t blocks = chunks * blocks_of(p.M, 16 * TILES * teams);
  if (blocks > 0x7fffffff || p.K > MOST) return cudaErrorInvalidValue;
  const auto kernel = lowrank_down_half_kernel<T, V, GROUPS, TILES, wide, LIE>;
  return LK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), THREADS, stream, p, static_cast<int>(chunks), teams);
}

// Fewer rows to a block where M is small, so that there are blocks for all processors; not measured.
constexpr int64_t MANY_ROWS = 4096;

template <class T, class V>
int choose(const LowrankDown& p, cudaStream_t stream) {
  int64_t most = 0;
  bool usual = true;  // every A is read along its columns
  for (int i = 0; i < p.parts; ++i) {
    const Matrix& A = p.part[i].A;
    most = p.part[i].R > most ? p.part[i].R : most;
    usual = usual && lie_of<V>(A.data, A.col_stride, A.row_stride, p.K, p.part[i].R, 8, 4) == Lie::along;
  }
  const bool many = p.M > MANY_ROWS;
  if (!is_wide_half<T>(p.x, p.K)) return run<T, V, 2, 1, false, Lie::scattered>(p, 1, stream);
  if (!usual) return run<T, V, 2, 1, true, Lie::scattered>(p, 1, stream);
  if (most > 16) return many ? run<T, V, 8, 2, true, Lie::along>(p, 2, stream) : run<T, V, 8, 1, true, Lie::along>(p, 1, stream);
  return many ? run<T, V, 2, 2, true, Lie::along>(p, 1, stream) : run<T, V, 2, 1, true, Lie::along>(p, 1, stream);
}

}  // namespace

int lowrank_down_half(const LowrankDown& p, void* to) {
  const cudaStream_t stream = static_cast<cudaStream_t>(to);
  const bool float32 = p.part[0].A.dtype == DType::f32;
  for (int i = 0; i < p.parts; ++i)
    if (p.part[i].A.dtype != (float32 ? DType::f32 : p.x.dtype)) return cudaErrorInvalidValue;
  if (p.x.dtype == DType::bf16) return float32 ? choose<__nv_bfloat16, float>(p, stream) : choose<__nv_bfloat16, __nv_bfloat16>(p, stream);
  return float32 ? choose<__half, float>(p, stream) : choose<__half, __half>(p, stream);
}

}  // namespace lk::cuda
