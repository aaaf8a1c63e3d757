// The thin products of a float32 base. A block stages a tile of TILE_ROWS rows by TILE_COLS columns of the large matrix (x or
// dy) in shared memory, sixteen bytes at a time and with dropped elements at zero, and multiplies it with RANKS columns of
// the small one, over its columns (u, du) or over its rows (dA, dB). Sums are float32 FMA in a fixed order.
//
// Shared memory is laid out so that the loads of the inner loops have no bank conflict: a thread of row_products owns
// rows g, g + 8, g + 16, g + 24, whose pitch moves by four banks; one of column_products owns two neighbouring columns.
#pragma once
#include "thin.cuh"

namespace lk::cuda {
namespace {

constexpr int TILE_ROWS = 32, TILE_COLS = 128, RANKS = 16;
constexpr int PACKS = TILE_ROWS * TILE_COLS / 8 / THREADS;  // packs of eight elements that a thread stages: 2
constexpr int SMALL_PITCH = RANKS + 4;                      // rows stay 16-byte aligned

constexpr int TILE_PITCH = TILE_COLS + 4;

using Tile = float[TILE_ROWS][TILE_PITCH];
using Small = float[SMALL_PITCH];

// This thread's packs of the tile at (m0, c0).
template <bool wide>
__device__ __forceinline__ void load_tile(Pack8<float> (&packs)[PACKS], const Matrix& x, int64_t m0, int64_t c0, int64_t rows,
                                          int64_t cols) {
#pragma unroll
  for (int i = 0; i < PACKS; ++i) {
    const int pack = threadIdx.x + i * THREADS;
    packs[i] = load8<float, wide>(x, m0 + pack / (TILE_COLS / 8), c0 + pack % (TILE_COLS / 8) * 8, rows, cols);
  }
}

// ... and into shared memory, with what the mask drops at zero. seed: null for no dropout.
template <bool dropout>
__device__ __forceinline__ void store_tile(Tile& tile, Pack8<float> (&packs)[PACKS], int64_t m0, int64_t c0,
                                           const int64_t* seed, uint32_t threshold) {
#pragma unroll
  for (int i = 0; i < PACKS; ++i) {
    const int pack = threadIdx.x + i * THREADS, row = pack / (TILE_COLS / 8), column = pack % (TILE_COLS / 8) * 8;
    if constexpr (dropout) drop8(packs[i], *seed, threshold, m0 + row, c0 + column);
    *reinterpret_cast<Pack8<float>*>(&tile[row][column]) = packs[i];
  }
}

// small[i][j] = a[row0 + i, column0 + j] for i < count, j < RANKS, zero outside of (rows, columns).
__device__ __forceinline__ void stage_small(Small* small, int count, const Matrix& a, int64_t row0, int64_t column0,
                                            int64_t rows, int64_t columns) {
  for (int i = threadIdx.x; i < count * RANKS; i += THREADS) {
    // neighbouring threads follow the small stride
    const bool along_columns = a.col_stride <= a.row_stride;
    const int row = along_columns ? i / RANKS : i % count, column = along_columns ? i % RANKS : i / count;
    const int64_t r = row0 + row, c = column0 + column;
    small[row][column] = r < rows && c < columns ? load_scalar(a.data, a.dtype, r * a.row_stride + c * a.col_stride) : 0.0f;
  }
}

// sum[i][j] += over this warp's columns c of tile[row][c] * small[c][rank]: row = lane / 4 + 8 i, rank = lane % 4 * 4 + j.
__device__ __forceinline__ void row_products(float (&sum)[4][4], const Tile& tile, const Small* small) {
  constexpr int WARP_COLS = TILE_COLS / WARPS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, rank = lane % 4 * 4;
#pragma unroll 1  // two steps side by side would not fit the registers
  for (int c0 = warp * WARP_COLS; c0 < (warp + 1) * WARP_COLS; c0 += 8) {
    Pack8<float> x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const Pack8<float>*>(&tile[row + 8 * i][c0]);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float4 a = *reinterpret_cast<const float4*>(&small[c0 + c][rank]);
      const float ranks[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(x[i].at[c], ranks[j], sum[i][j]);
    }
  }
}

// out[row * pitch + rank] = scale * the sum over the warps, in their order, for rows and ranks that exist.
__device__ __forceinline__ void reduce_rows(float (*parts)[TILE_ROWS][RANKS], const float (&sum)[4][4], float* out,
                                            int64_t pitch, int64_t rows, int64_t ranks, float scale) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // the parts of the last call have been read
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) parts[warp][lane / 4 + 8 * i][lane % 4 * 4 + j] = sum[i][j];
  __syncthreads();
  for (int i = threadIdx.x; i < TILE_ROWS * RANKS; i += THREADS) {
    const int row = i / RANKS, rank = i % RANKS;
    float total = parts[0][row][rank];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) total += parts[w][row][rank];
    if (row < rows && rank < ranks) out[row * pitch + rank] = scale * total;
  }
}

// sum[i][j] += over the tile's rows m of tile[m][column + i] * small[m][rank + j]: column = 2 (thread / 4), rank = thread % 4 * 4.
__device__ __forceinline__ void column_products(float (&sum)[2][4], const Tile& tile, const Small* small) {
  const int column = threadIdx.x / 4 * 2, rank = threadIdx.x % 4 * 4;
#pragma unroll 4
  for (int m = 0; m < TILE_ROWS; ++m) {
    const float2 two = *reinterpret_cast<const float2*>(&tile[m][column]);
    const float x[2] = {two.x, two.y};
    const float4 u = *reinterpret_cast<const float4*>(&small[m][rank]);
    const float ranks[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(x[i], ranks[j], sum[i][j]);
  }
}

}  // namespace
}  // namespace lk::cuda
