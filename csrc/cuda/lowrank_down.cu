// u = drop(x) A^T of a float32 base: one pass over x for the A's that share it. A block owns TILE_ROWS rows and RANKS ranks of
// one A; its warps share the columns and are summed in their order. While a tile is multiplied, the next one is on its way.
#include "launch.h"

#include "kernels.h"
#include "thin_float.cuh"

namespace lk::cuda {
namespace {

template <bool dropout, bool wide>
__global__ void __launch_bounds__(THREADS, 2) lowrank_down_kernel(const LowrankDown p) {
  __shared__ __align__(16) Tile tile;
  __shared__ __align__(16) float small[TILE_COLS][SMALL_PITCH];
  __shared__ float parts[WARPS][TILE_ROWS][RANKS];

  const Part part = part_of(p, blockIdx.y, RANKS);
  const auto& own = p.part[part.index];
  const Matrix A = {own.A.data, own.A.col_stride, own.A.row_stride, own.A.dtype};  // (K,R)
  const int64_t* seed = dropout ? p.dropout.seed + part.index : nullptr;

  for (int64_t m0 = static_cast<int64_t>(blockIdx.x) * TILE_ROWS; m0 < p.M; m0 += static_cast<int64_t>(gridDim.x) * TILE_ROWS) {
    float sum[4][4] = {};
    Pack8<float> packs[PACKS];
    load_tile<wide>(packs, p.x, m0, 0, p.M, p.K);
    for (int64_t k0 = 0; k0 < p.K; k0 += TILE_COLS) {
      __syncthreads();  // the tile before has been read
      store_tile<dropout>(tile, packs, m0, k0, seed, p.dropout.threshold);
      stage_small(small, TILE_COLS, A, k0, part.r0, p.K, own.R);
      __syncthreads();
      if (k0 + TILE_COLS < p.K) load_tile<wide>(packs, p.x, m0, k0 + TILE_COLS, p.M, p.K);
      row_products(sum, tile, small);
    }
    float* u = static_cast<float*>(p.u.data) + m0 * p.u.row_stride + own.column + part.r0;
    reduce_rows(parts, sum, u, p.u.row_stride, p.M - m0, own.R - part.r0, dropout ? p.dropout.scale : 1.0f);
  }
}

}  // namespace

int lowrank_down(const LowrankDown& p, void* stream) {
  if (p.M == 0) return cudaSuccess;
  if (p.x.dtype != DType::f32) return lowrank_down_half(p, stream);
  int64_t chunks = 0;
  for (int i = 0; i < p.parts; ++i) chunks += blocks_of(p.part[i].R, RANKS);
  if (chunks > 65535) return cudaErrorInvalidValue;  // more than a million ranks
  const int64_t rows = blocks_of(p.M, TILE_ROWS);
  const dim3 grid(static_cast<unsigned>(rows < 0x7fffffff ? rows : 0x7fffffff), static_cast<unsigned>(chunks));
  const bool wide = is_wide<float>(p.x);
  const auto kernel = p.dropout.threshold ? wide ? lowrank_down_kernel<true, true> : lowrank_down_kernel<true, false>
                                          : wide ? lowrank_down_kernel<false, true> : lowrank_down_kernel<false, false>;
  return LK_LAUNCH(kernel, grid, THREADS, static_cast<cudaStream_t>(stream), p);
}

}  // namespace lk::cuda
