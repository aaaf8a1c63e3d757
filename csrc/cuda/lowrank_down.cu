// u = drop(x) A^T: one pass over x for the A's that share it. A block owns TILE_ROWS rows and RANKS ranks of one A; its
// warps share the columns and are summed in their order. While a tile is multiplied, the next one is on its way.
#include "launch.h"

#include "kernels.h"
#include "thin.cuh"

namespace lk::cuda {
namespace {

template <DType dtype, bool dropout, bool wide>
__global__ void __launch_bounds__(THREADS, 2) lowrank_down_kernel(const LowrankDown p) {
  using T = typename Element<dtype>::type;
  __shared__ __align__(16) Tile<T> tile;
  __shared__ __align__(16) float small[TILE_COLS][SMALL_PITCH];
  __shared__ float parts[WARPS][TILE_ROWS][RANKS];

  // which part, and which of its ranks
  int part = 0, chunk = blockIdx.y;
  while (chunk * RANKS >= p.part[part].R) {
    chunk -= static_cast<int>((p.part[part].R + RANKS - 1) / RANKS);
    ++part;
  }
  const int64_t r0 = static_cast<int64_t>(chunk) * RANKS, R = p.part[part].R;
  const Matrix A = {p.part[part].A.data, p.part[part].A.col_stride, p.part[part].A.row_stride, p.part[part].A.dtype};  // (K,R)
  const int64_t* seed = dropout ? p.dropout.seed + part : nullptr;

  for (int64_t m0 = static_cast<int64_t>(blockIdx.x) * TILE_ROWS; m0 < p.M; m0 += static_cast<int64_t>(gridDim.x) * TILE_ROWS) {
    float sum[4][4] = {};
    Pack8<T> packs[PACKS];
    load_tile<T, wide>(packs, p.x, m0, 0, p.M, p.K);
    for (int64_t k0 = 0; k0 < p.K; k0 += TILE_COLS) {
      __syncthreads();  // the tile before has been read
      store_tile<T, dropout>(tile, packs, m0, k0, seed, p.dropout.threshold);
      stage_small(small, TILE_COLS, A, k0, r0, p.K, R);
      __syncthreads();
      if (k0 + TILE_COLS < p.K) load_tile<T, wide>(packs, p.x, m0, k0 + TILE_COLS, p.M, p.K);
      row_products<dtype>(sum, tile, small);
    }
    float* u = static_cast<float*>(p.u.data) + m0 * p.u.row_stride + p.part[part].column + r0;
    reduce_rows(parts, sum, u, p.u.row_stride, p.M - m0, R - r0, dropout ? p.dropout.scale : 1.0f);
  }
}

template <DType dtype>
int choose(const LowrankDown& p, cudaStream_t stream) {
  int64_t chunks = 0;
  for (int i = 0; i < p.parts; ++i) chunks += blocks_of(p.part[i].R, RANKS);
  if (chunks > 65535) return cudaErrorInvalidValue;  // more than a million ranks
  const int64_t rows = blocks_of(p.M, TILE_ROWS);
  const dim3 grid(static_cast<unsigned>(rows < 0x7fffffff ? rows : 0x7fffffff), static_cast<unsigned>(chunks));
  const bool wide = is_wide<typename Element<dtype>::type>(p.x);
  const auto kernel = p.dropout.threshold ? wide ? lowrank_down_kernel<dtype, true, true> : lowrank_down_kernel<dtype, true, false>
                                          : wide ? lowrank_down_kernel<dtype, false, true> : lowrank_down_kernel<dtype, false, false>;
  return LK_LAUNCH(kernel, grid, THREADS, stream, p);
}

}  // namespace

int lowrank_down(const LowrankDown& p, void* stream) {
  if (p.M == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.x.dtype) {
    case DType::f32: return choose<DType::f32>(p, s);
    case DType::bf16: return choose<DType::bf16>(p, s);
    case DType::f16: return choose<DType::f16>(p, s);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lk::cuda
