// y += scaling * (drop'(u v^T) + bias) of a half-precision y, in place: memory-bound, so y moves once, sixteen bytes at a time, and the products run
// on the tensor cores. A warp owns 64 columns of some tiles of 16 rows and needs no other warp. A sum runs over sixteen ranks after sixteen, so
// the bits depend on neither the grid nor the scheduling.
#include "launch.h"

#include "kernels.h"
#include "thin_half.cuh"

namespace lk::cuda {
namespace {

constexpr int ROWS = 16, COLUMNS = 64, RANKS = 16, WARPS_N = 4, WARPS_M = WARPS / WARPS_N;
constexpr int64_t MOST_TILES = 4, BLOCKS = 2 * 132;  // tiles that a warp walks, where that leaves so many blocks; not measured

template <class T>
__device__ __forceinline__ T half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(which ? pair >> 16 : pair);
  return *reinterpret_cast<const T*>(&bits);
}

// Lane 4 g + t has of y rows g and g + 8 of a tile, and the chunks t and t + 4 of eight columns: element 4 e + j of one is column
// 2 t + e of product j, whose columns c are therefore columns 4 c + j of 32. Of sixteen ranks it has 4 t ... 4 t + 3.
// LIE: of v; where it is not scattered, u is read along the ranks.
template <class T, class V, bool wide, Lie LIE>
__global__ void __launch_bounds__(THREADS, LIE == Lie::scattered ? 1 : 2) add_lowrank_half_kernel(const AddLowrank p, int tiles) {
  using O = Operands<T, V>;
  using F = typename O::Factor;
  constexpr int TERMS = O::ROUNDED ? 1 : 2;  // of u and v: y has half precision
  using E = std::conditional_t<std::is_same_v<T, __half>, Element<DType::f16>, Element<DType::bf16>>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int N = static_cast<int>(p.N), R = static_cast<int>(p.R);
  const int block0 = static_cast<int>(blockIdx.y) * WARPS_N * COLUMNS, n0 = block0 + warp % WARPS_N * COLUMNS;
  __shared__ __align__(16) float bias[THREADS];
  static_assert(THREADS == WARPS_N * COLUMNS, "a thread loads what one column's is");
  const int column = block0 + static_cast<int>(threadIdx.x);
  bias[threadIdx.x] = p.bias.data && column < N ? p.scaling * load_scalar(p.bias.data, p.bias.dtype, column * p.bias.col_stride) : 0.0f;
  __syncthreads();
  if (n0 >= N) return;
  const bool dropout = p.dropout.threshold;
  uint32_t right[2][4][2][TERMS];  // of two times 32 columns four products' share of v; what there is of one sixteen ranks stays
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * WARPS_M + warp / WARPS_N) * tiles * ROWS;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t m0 = first + tile * ROWS;
    if (m0 >= p.M) return;
    Share<1> y;
    if (O::ROUNDED) load_share<T, wide, 1>(y, p.y, m0, n0, p.M, N);
    float sum[2][4][4] = {};  // of two times 32 columns four products
#pragma unroll 1
    for (int r0 = 0; r0 < R; r0 += RANKS) {
      const int r = r0 + 4 * t;
      if (tile == 0 || R > RANKS) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int n = n0 + 32 * c + 4 * g;
          const V* at = static_cast<const V*>(p.v.data) + n * p.v.row_stride + r * p.v.col_stride;
          load_pairs<F, LIE>(right[c], at, p.v.col_stride, p.v.row_stride, R - r, N - n);
        }
      }
      uint32_t left[TERMS][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t m = m0 + 8 * i + g;
        const float* at = static_cast<const float*>(p.u.data) + m * p.u.row_stride + r;
        uint32_t pair[1][2][TERMS];
        load_pairs<F, LIE == Lie::scattered ? LIE : Lie::along>(pair, at, 1, 0, R - r, m < p.M);
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int l = 0; l < TERMS; ++l) left[l][i + 2 * k] = pair[0][k][l];
      }
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t both[TERMS][2];
#pragma unroll
          for (int l = 0; l < TERMS; ++l) both[l][0] = right[c][j][0][l], both[l][1] = right[c][j][1][l];
          mma_terms<F>(sum[c][j], left, both);
        }
    }
    if (!O::ROUNDED) load_share<T, wide, 1>(y, p.y, m0, n0, p.M, N);  // two terms of v leave no registers before

#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int n = n0 + 32 * c + 8 * t;
      float added[8];
      load_vector<float, 4>(&bias[n - block0], *reinterpret_cast<float(*)[4]>(added));
      load_vector<float, 4>(&bias[n - block0 + 4], *reinterpret_cast<float(*)[4]>(added + 4));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t m = m0 + 8 * i + g;
        if (m >= p.M || n >= N) continue;
        Philox8 draw;
        if (dropout) draw = philox8(static_cast<uint64_t>(*p.dropout.seed), static_cast<uint64_t>(m), static_cast<uint32_t>(n >> 3));
        float total[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float delta = sum[c][j % 4][2 * i + j / 4];
          if (dropout) delta = draw.lane(j) >= p.dropout.threshold ? delta * p.dropout.scale : 0.0f;
          total[j] = E::get(half_of<T>(word_of(y[0][i][c], j / 2), j % 2)) + (p.scaling * delta + added[j]);
        }
        T* to = static_cast<T*>(p.y.data) + m * p.y.row_stride + n;
        if (wide) {
          store8(to, total);
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (n + j < N) to[j] = E::put(total[j]);
        }
      }
    }
  }
}

template <class T, class V>
int run(const AddLowrank& p, cudaStream_t stream) {
  const int64_t columns = blocks_of(p.N, WARPS_N * COLUMNS), rows = blocks_of(p.M, WARPS_M * ROWS);
  const int64_t wanted = rows * columns / BLOCKS, tiles = wanted < 1 ? 1 : wanted < MOST_TILES ? wanted : MOST_TILES;
  const int64_t blocks = blocks_of(rows, tiles);
  if (blocks > 0x7fffffff || columns > 65535 || p.R > MOST) return cudaErrorInvalidValue;
  const bool usual = lie_of<float>(p.u.data, 1, p.u.row_stride, p.R, p.M, 4, 1) == Lie::along;
  const Lie lie = usual ? lie_of<V>(p.v.data, p.v.col_stride, p.v.row_stride, p.R, p.N, 4, 4) : Lie::scattered;
  const auto kernel = !is_wide_half<T>(p.y, p.N) ? add_lowrank_half_kernel<T, V, false, Lie::scattered>
                      : lie == Lie::along        ? add_lowrank_half_kernel<T, V, true, Lie::along>
                      : lie == Lie::across       ? add_lowrank_half_kernel<T, V, true, Lie::across>
                                                 : add_lowrank_half_kernel<T, V, true, Lie::scattered>;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(columns));
  return LK_LAUNCH(kernel, grid, THREADS, stream, p, static_cast<int>(tiles));
}

}  // namespace

int add_lowrank_half(const AddLowrank& p, void* to) {
  const cudaStream_t stream = static_cast<cudaStream_t>(to);
  if (p.v.dtype != DType::f32 && p.v.dtype != p.y.dtype) return cudaErrorInvalidValue;
  const bool float32 = p.v.dtype == DType::f32;
  if (p.y.dtype == DType::bf16) return float32 ? run<__nv_bfloat16, float>(p, stream) : run<__nv_bfloat16, __nv_bfloat16>(p, stream);
  return float32 ? run<__half, float>(p, stream) : run<__half, __half>(p, stream);
}

}  // namespace lk::cuda
