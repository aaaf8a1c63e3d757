// y = x W^T + bias + scaling (u v^T + lowrank bias) for at most 16 rows of x, W in NF4: bound by reading the packed weight,
// once. A block owns 16 * TILES columns of y; its warps share the summed dimension, 128 of it a step, and add their sums in a
// fixed order at the end. The tensor cores take 16 rows of W as their left operand and 8 rows of x as their right one, which
// is why more rows of x cost little; a code meets them as the half-precision code itself, and its block's scale meets the
// float32 sum over 64 codes. A byte is looked up as a pair of codes, in a table of which each lane has a copy in a bank of
// its own: no two lanes collide. The order of sums depends on K and N alone: a row's bits don't depend on the rows beside it.
#include "launch.h"

#include "element.cuh"
#include "kernels.h"
#include "nf4.cuh"
#include "warp.cuh"

namespace lk::cuda {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS, STEP = 128, SEGMENT = 64;

// What a lane holds of 128 columns of 8 rows of x: of each 64 a run of 16, as its share of four products of 16.
struct Share {
  uint32_t at[2][8];
};

// The 16 columns of a segment of 64 that the lanes with number t of a group of four hold: so that of 32 codes loaded by a lane
// at once, half stay and half go to the lane beyond the next.
__device__ __forceinline__ int run_of(int t) { return 32 * (t & 1) + 16 * (t >> 1); }

template <DType dtype, bool wide>
__device__ __forceinline__ void load_share(Share& share, const Matrix& x, int64_t m, int64_t M, int64_t k0, int64_t K, int t) {
  using T = typename Element<dtype>::type;
  const T* row = static_cast<const T*>(x.data) + m * x.row_stride;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int64_t k = k0 + SEGMENT * s + run_of(t);
    if constexpr (wide) {
      uint4 half[2] = {};
      if (m < M && k < K) {  // K is a multiple of 64: the run is inside
        half[0] = *reinterpret_cast<const uint4*>(row + k);
        half[1] = *reinterpret_cast<const uint4*>(row + k + 8);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        share.at[s][4 * i] = half[i].x, share.at[s][4 * i + 1] = half[i].y, share.at[s][4 * i + 2] = half[i].z, share.at[s][4 * i + 3] = half[i].w;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int64_t at = k + 2 * i + j;
          pair[j] = m < M && at < K ? Element<dtype>::get(row[at * x.col_stride]) : 0.0f;
        }
        share.at[s][i] = pair_as<T>(pair[0], pair[1]);
      }
    }
  }
}

// 32 codes of row n from column k on; `wide`: they lie in 16 aligned bytes.
__device__ __forceinline__ uint4 load_codes(const NF4Weight& w, int64_t n, int64_t k) {
  return n < w.N && k < w.K ? __ldcs(reinterpret_cast<const uint4*>(w.packed + ((n * w.K + k) >> 1))) : uint4{};
}

// code * scale, rounded once, of 16 columns of row n from k on: wherever blocks begin, at most two of them, and whatever half of
// a byte the row begins in.
template <class T>
__device__ __forceinline__ void load_products(uint32_t (&products)[8], const NF4Weight& w, const float (&codes)[16], int64_t n, int64_t k) {
  const int64_t count = n < w.N ? w.K - k : 0, first = n * w.K + k;
  float scale[2] = {0.0f, 0.0f};
  int64_t change = 16;
  if (count > 0) {
    const int64_t block = first >> w.block_shift, last = (first + (count < 16 ? count : 16) - 1) >> w.block_shift;
    scale[0] = scale_of(w, block), scale[1] = scale_of(w, last);
    change = ((block + 1) << w.block_shift) - first;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float pair[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = 2 * i + j;
      const int byte = at < count ? w.packed[(first + at) >> 1] : 0;
      pair[j] = at < count ? __fmul_rn(codes[(first + at) & 1 ? byte & 15 : byte >> 4], at < change ? scale[0] : scale[1]) : 0.0f;
    }
    products[i] = pair_as<T>(pair[0], pair[1]);
  }
}

// Two blocks to a processor hide each other's waiting; the largest form, whose sums alone are 32 registers, has one, and like the
// smallest it asks for the next step's codes ahead. Ahead in the other forms spills registers, as does a second block of the
// narrow form with 16 rows.
template <int HALVES, int TILES, bool wide> constexpr int BLOCKS = HALVES * TILES == 8 || (!wide && HALVES == 2) ? 1 : 2;
template <int HALVES, int TILES> constexpr bool AHEAD = TILES == 1 || HALVES * TILES == 8;

// HALVES: groups of 8 rows of x. `wide`: rows of W are whole 64s of one block each, and they and the rows of x are 16-byte
// aligned.
template <DType dtype, int HALVES, int TILES, bool wide>
__global__ void __launch_bounds__(THREADS, (BLOCKS<HALVES, TILES, wide>)) decode_kernel(const NF4Linear p) {
  using E = Element<dtype>;
  using T = typename E::type;
  constexpr int COLUMNS = 16 * TILES, ROWS = 8 * HALVES;
  constexpr bool early = AHEAD<HALVES, TILES>;
  __shared__ float codes[16];
  __shared__ float map[257];        // the nested scales' offset and map
  __shared__ uint32_t pairs[256][32];  // two codes of a byte, once for each lane; at the end the warps' sums
  float(*sums)[ROWS][COLUMNS] = reinterpret_cast<float(*)[ROWS][COLUMNS]>(pairs);
  static_assert(sizeof(float) * WARPS * ROWS * COLUMNS <= sizeof(pairs), "the sums take the table's place");

  const NF4Weight& w = p.w;
  const int64_t M = p.lowrank.M, K = w.K, n0 = static_cast<int64_t>(blockIdx.x) * COLUMNS;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  if (thread == 0) store_codes(codes);
  if (w.nested) {
    map[thread] = load_float(w.nested, thread);
    if (thread == 0) map[256] = load_float(w.nested, 256);
  }
  __syncthreads();
  if (wide) {
    const uint32_t pair = pair_as<T>(codes[thread >> 4], codes[thread & 15]);
    for (int i = 0; i < 32; ++i) pairs[thread][(i + lane) % 32] = pair;  // every lane to another bank
  }
  __syncthreads();

  float sum[TILES][HALVES][4] = {};
  uint4 next[TILES][2];
  const int64_t steps = (K + STEP - 1) / STEP;
  const auto load_step = [&](int64_t step) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) next[tile][i] = load_codes(w, n0 + 16 * tile + 8 * i + g, step * STEP + 32 * t);
  };
  if (wide && early && warp < steps) load_step(warp);
#pragma unroll 1
  for (int64_t step = warp; step < steps; step += WARPS) {
    const int64_t k0 = step * STEP;
    Share share[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; ++h) load_share<dtype, wide>(share[h], p.x, 8 * h + g, M, k0, K, t);
    if constexpr (wide) {
      if (!early) load_step(step);
      uint4 now[TILES][2];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) now[tile][0] = next[tile][0], now[tile][1] = next[tile][1];
      if (early && step + WARPS < steps) load_step(step + WARPS);  // on its way while this one is multiplied
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        uint32_t words[2][2][2];  // [segment][row g or g + 8][16 codes]
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 own = now[tile][i];
          const bool upper = t & 2;  // has the second segment's codes, and gives its first half for the other's second
          const uint32_t got0 = __shfl_xor_sync(ALL_LANES, upper ? own.x : own.z, 2);
          const uint32_t got1 = __shfl_xor_sync(ALL_LANES, upper ? own.y : own.w, 2);
          words[0][i][0] = upper ? got0 : own.x, words[0][i][1] = upper ? got1 : own.y;
          words[1][i][0] = upper ? own.z : got0, words[1][i][1] = upper ? own.w : got1;
        }
        // each lane of four reads one of the scales that all four need
        float scale = 0.0f;
        const int64_t row = n0 + 16 * tile + 8 * (t & 1) + g, column = k0 + SEGMENT * (t >> 1);
        if (row < w.N && column < K) {
          const int64_t block = (row * K + column) >> w.block_shift;
          scale = w.nested ? __fadd_rn(__fmul_rn(map[1 + w.absmax[block]], load_float(w.nested, 257 + (block >> w.nested_shift))), map[0])
                           : load_float(w.absmax, block);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          float part[HALVES][4] = {};
#pragma unroll
          for (int step16 = 0; step16 < 4; ++step16) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int j = 0; j < 2; ++j)
                a[i + 2 * j] = pairs[words[s][i][step16 / 2] >> (16 * (step16 % 2) + 8 * j) & 255][lane];
#pragma unroll
            for (int h = 0; h < HALVES; ++h) {
              const uint32_t b[2] = {share[h].at[s][2 * step16], share[h].at[s][2 * step16 + 1]};
              mma<T>(part[h], a, b);
            }
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float of_row = __shfl_sync(ALL_LANES, scale, (lane & ~3) | (2 * s + i));
#pragma unroll
            for (int h = 0; h < HALVES; ++h)
#pragma unroll
              for (int j = 0; j < 2; ++j) sum[tile][h][2 * i + j] = fmaf(of_row, part[h][2 * i + j], sum[tile][h][2 * i + j]);
          }
        }
      }
    } else {  // blocks begin anywhere: code times scale, rounded once, is what is multiplied
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          uint32_t products[2][8];
#pragma unroll
          for (int i = 0; i < 2; ++i) load_products<T>(products[i], w, codes, n0 + 16 * tile + 8 * i + g, k0 + SEGMENT * s + run_of(t));
#pragma unroll
          for (int step16 = 0; step16 < 4; ++step16) {
            const uint32_t a[4] = {products[0][2 * step16], products[1][2 * step16], products[0][2 * step16 + 1], products[1][2 * step16 + 1]};
#pragma unroll
            for (int h = 0; h < HALVES; ++h) {
              const uint32_t b[2] = {share[h].at[s][2 * step16], share[h].at[s][2 * step16 + 1]};
              mma<T>(sum[tile][h], a, b);
            }
          }
        }
    }
  }

  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) sums[warp][8 * h + 2 * t + j][16 * tile + 8 * i + g] = sum[tile][h][2 * i + j];
  __syncthreads();
  const AddLowrank& low = p.lowrank;
  for (int i = thread; i < M * COLUMNS; i += THREADS) {
    const int m = i / COLUMNS, c = i % COLUMNS;
    const int64_t n = n0 + c;
    if (n >= w.N) continue;
    float total = sums[0][m][c];
#pragma unroll
    for (int from = 1; from < WARPS; ++from) total += sums[from][m][c];
    if (low.R) {
      const float* u = static_cast<const float*>(low.u.data) + m * low.u.row_stride;
      float added = low.bias.data ? load_scalar(low.bias.data, low.bias.dtype, n * low.bias.col_stride) : 0.0f;
      for (int64_t r = 0; r < low.R; ++r) added = fmaf(u[r], load_scalar(low.v.data, low.v.dtype, n * low.v.row_stride + r * low.v.col_stride), added);
      total = fmaf(low.scaling, added, total);
    }
    if (p.bias.data) total += load_scalar(p.bias.data, p.bias.dtype, n * p.bias.col_stride);
    static_cast<T*>(low.y.data)[m * low.y.row_stride + n] = E::put(total);
  }
}

template <DType dtype, int HALVES, int TILES, bool wide>
int run_as(const NF4Linear& p, cudaStream_t stream) {
  const int64_t blocks = (p.w.N + 16 * TILES - 1) / (16 * TILES);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const auto kernel = decode_kernel<dtype, HALVES, TILES, wide>;
  return LK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), THREADS, stream, p);
}

// Tiles of 16 columns that a block owns: more read x less often, fewer leave no processor idle. By N alone, so that the order
// of sums is the same on every device.
int tiles(int64_t N) { return N >= 64 * 132 ? 4 : N >= 4096 ? 2 : 1; }

template <DType dtype, int HALVES>
int run(const NF4Linear& p, cudaStream_t stream) {
  const auto aligned = [](const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % 16 == 0 && bytes % 16 == 0; };
  const bool wide = p.w.K % SEGMENT == 0 && p.w.block_shift >= 6 && aligned(p.w.packed, 0) && p.x.col_stride == 1 && aligned(p.x.data, 2 * p.x.row_stride);
  if (!wide) return run_as<dtype, HALVES, 1, false>(p, stream);
  switch (tiles(p.w.N)) {
    case 4: return run_as<dtype, HALVES, 4, true>(p, stream);
    case 2: return run_as<dtype, HALVES, 2, true>(p, stream);
  }
  return run_as<dtype, HALVES, 1, true>(p, stream);
}

}  // namespace

int nf4_linear(const NF4Linear& p, void* stream) {
  const int64_t M = p.lowrank.M;
  if (M == 0) return cudaSuccess;
  if (M > 16 || p.lowrank.dropout.threshold) return cudaErrorInvalidValue;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.x.dtype) {
    case DType::bf16: return M <= 8 ? run<DType::bf16, 1>(p, s) : run<DType::bf16, 2>(p, s);
    case DType::f16: return M <= 8 ? run<DType::f16, 1>(p, s) : run<DType::f16, 2>(p, s);
    case DType::f32: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace lk::cuda
