// The thin products of a half-precision base, on the tensor cores, so that memory is what they wait for. What is large (x or dy) goes from
// memory into the registers of the lane that multiplies it, sixteen bytes at a time; which of the summed dimension's columns stands in which
// place of a product is free, as long as both operands agree, and chosen for that. Sums are float32 in a fixed order.
//
// Lane 4 g + t of a warp; see warp.cuh for what it holds of a product's operands.
#pragma once
#include "thin.cuh"
#include "warp.cuh"

namespace lk::cuda {
namespace {

// How operands enter, for a base of type T and adapters of type V: adapters of T as they are, with u and du rounded to T; all else as
// sums of bfloat16 terms, of an adapter, u and du three, which are all of a float32's bits, of x and dy as many as they have: float16 two.
template <class T, class V>
struct Operands {
  static constexpr bool ROUNDED = std::is_same_v<T, V>;
  using Factor = std::conditional_t<ROUNDED, T, __nv_bfloat16>;
  static constexpr int LARGE = !ROUNDED && std::is_same_v<T, __half> ? 2 : 1, SMALL = ROUNDED ? 1 : 3;  // terms
};

// Two neighbours along the summed dimension as terms of type F.
template <class F, int TERMS>
__device__ __forceinline__ void split(float low, float high, uint32_t (&term)[TERMS]) {
  static_assert(TERMS == 1 || std::is_same_v<F, __nv_bfloat16>, "a bfloat16 is the upper half of a float32");
  term[0] = pair_as<F>(low, high);
#pragma unroll
  for (int i = 1; i < TERMS; ++i) {
    low -= __int_as_float(static_cast<int>(term[i - 1] << 16)), high -= __int_as_float(static_cast<int>(term[i - 1] & 0xffff0000u));
    term[i] = pair_as<F>(low, high);
  }
}

// The same of two elements of the base.
template <class T, class V>
__device__ __forceinline__ void split_large(uint32_t pair, uint32_t (&term)[Operands<T, V>::LARGE]) {
  if constexpr (Operands<T, V>::LARGE == 1) {
    term[0] = pair;
  } else {
    const __half2 both = *reinterpret_cast<const __half2*>(&pair);
    split<__nv_bfloat16>(__low2float(both), __high2float(both), term);
  }
}

// d += a b, from the smallest terms on; products of terms that lie below the last one of either are left out
template <class F, int A, int B>
__device__ __forceinline__ void mma_terms(float (&d)[4], const uint32_t (&a)[A][4], const uint32_t (&b)[B][2]) {
  constexpr int KEPT = A > B ? A : B;
#pragma unroll
  for (int both = KEPT - 1; both >= 0; --both)
#pragma unroll
    for (int i = A - 1; i >= 0; --i)
      if (both >= i && both - i < B) mma<F>(d, a[i], b[both - i]);
}

// Eight elements of row m from column c on as four pairs, zero outside of (rows, cols); `wide`: they lie side by side, 16-byte aligned, and
// cols is a multiple of eight.
template <class T, bool wide>
__device__ __forceinline__ uint4 load_words(const Matrix& x, int64_t m, int c, int64_t rows, int cols) {
  const T* at = static_cast<const T*>(x.data) + m * x.row_stride + c * x.col_stride;
  uint4 words = {};
  if constexpr (wide) {
    if (m < rows && c < cols) words = *reinterpret_cast<const uint4*>(at);
  } else {
    uint32_t word[4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j, at += x.col_stride)
      if (m < rows && c + j < cols) word[j / 2] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(at)) << 16 * (j % 2);
    words = make_uint4(word[0], word[1], word[2], word[3]);
  }
  return words;
}
__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }

// Zero where the mask drops: row m, columns c to c + 7, c a multiple of 8.
__device__ __forceinline__ void drop_words(uint4& words, int64_t seed, uint32_t threshold, int64_t m, int c) {
  const Philox8 draw = philox8(static_cast<uint64_t>(seed), static_cast<uint64_t>(m), static_cast<uint32_t>(c >> 3));
  const auto kept = [&](int i) { return (draw.lane(2 * i) < threshold ? 0u : 0xffffu) | (draw.lane(2 * i + 1) < threshold ? 0u : 0xffff0000u); };
  words.x &= kept(0), words.y &= kept(1), words.z &= kept(2), words.w &= kept(3);
}

constexpr int64_t MOST = 0x7fffff00;  // columns or ranks: int counts them

template <class T>
bool is_wide_half(const Matrix& x, int64_t cols) {
  return is_wide<T>(x) && cols % 8 == 0;
}

// -- the small factor: A, B ---------------------------------------------------------------------------------------------------

// How a lane reads its share of one, several elements at a time along the summed dimension (depth) or across it, or one by one.
enum class Lie { along, across, scattered };

// depth, width: how many elements there are of either; the lanes' shares are E by N
template <class V>
Lie lie_of(const void* data, int64_t depth_stride, int64_t width_stride, int64_t depth, int64_t width, int E, int N) {
  const auto whole = [&](int64_t stride, int64_t count, int vector) {
    const size_t bytes = vector * sizeof(V);
    return stride % vector == 0 && count % vector == 0 && reinterpret_cast<uintptr_t>(data) % (bytes < 16 ? bytes : 16) == 0;
  };
  if (depth_stride == 1 && whole(width_stride, depth, E)) return Lie::along;
  if (width_stride == 1 && whole(depth_stride, width, N)) return Lie::across;
  return Lie::scattered;
}

// N elements that lie side by side.
template <class V, int N>
__device__ __forceinline__ void load_vector(const V* from, V (&v)[N]) {
  struct alignas(N * sizeof(V) < 16 ? N * sizeof(V) : 16) Pack { V at[N]; };
  const Pack pack = *reinterpret_cast<const Pack*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = pack.at[i];
}

// pair[i][q] = the terms of elements 2 q and 2 q + 1 of the depth, of N across; zero from `depth` and `width` on, of which `at` is that far away
template <class F, Lie LIE, int N, int PAIRS, int TERMS, class V>
__device__ __forceinline__ void load_pairs(uint32_t (&pair)[N][PAIRS][TERMS], const V* at, int64_t depth_stride, int64_t width_stride, int depth, int width) {
  constexpr int E = 2 * PAIRS;
  constexpr bool whole = std::is_same_v<V, F>;  // elements enter as they are
  if constexpr (whole && LIE == Lie::along) {   // ... two to a word
#pragma unroll
    for (int i = 0; i < N; ++i) {
      uint32_t words[PAIRS] = {};
      if (i < width && 0 < depth) load_vector(reinterpret_cast<const uint32_t*>(at + i * width_stride), words);
#pragma unroll
      for (int q = 0; q < PAIRS; ++q) pair[i][q][0] = words[q];
    }
  } else {
    V v[N][E];
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < E; ++e) v[i][e] = V(0.0f);
    if constexpr (LIE == Lie::along) {
#pragma unroll
      for (int i = 0; i < N; ++i, at += width_stride)
        if (i < width && 0 < depth) load_vector(at, v[i]);
    } else if constexpr (LIE == Lie::across) {
#pragma unroll
      for (int e = 0; e < E; ++e)
        if (0 < width && e < depth) {
          V some[N];
          load_vector(at + e * depth_stride, some);
#pragma unroll
          for (int i = 0; i < N; ++i) v[i][e] = some[i];
        }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const V* from = at;  // step by step: as many addresses would not fit the registers
#pragma unroll
        for (int e = 0; e < E; ++e, from += depth_stride)
          if (i < width && e < depth) v[i][e] = *from;
        at += width_stride;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int q = 0; q < PAIRS; ++q)
        if constexpr (whole)
          pair[i][q][0] = pair_of(v[i][2 * q], v[i][2 * q + 1]);
        else
          split<F>(static_cast<float>(v[i][2 * q]), static_cast<float>(v[i][2 * q + 1]), pair[i][q]);
  }
}

// -- over x's or dy's columns: u, du ------------------------------------------------------------------------------------

// A warp takes 64 columns of TILES tiles of 16 rows at a time. A lane holds of rows g and g + 8 of each its chunks of eight columns, t and
// t + 4; elements 4 s ... 4 s + 3 of a chunk are its share of product s.
constexpr int DEPTH = 64;
template <int TILES> using Share = uint4[TILES][2][2];

template <class T, bool wide, int TILES>
__device__ __forceinline__ void load_share(Share<TILES>& share, const Matrix& x, int64_t m0, int c0, int64_t rows, int cols) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int c = 0; c < 2; ++c) share[tile][i][c] = load_words<T, wide>(x, m0 + 16 * tile + 8 * i + g, c0 + 32 * c + 8 * t, rows, cols);
}

template <int TILES>
__device__ __forceinline__ void drop_share(Share<TILES>& share, int64_t seed, uint32_t threshold, int64_t m0, int c0) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int c = 0; c < 2; ++c) drop_words(share[tile][i][c], seed, threshold, m0 + 16 * tile + 8 * i + g, c0 + 32 * c + 8 * t);
}

template <int TILES>
__device__ __forceinline__ void copy_share(Share<TILES>& to, const Share<TILES>& from) {
#pragma unroll
  for (int i = 0; i < 4 * TILES; ++i) (&to[0][0][0])[i] = (&from[0][0][0])[i];
}

// Of GROUPS * 8 ranks a lane has VEC side by side in each VEC groups: so it reads them at once where ranks are what lies side by side.
template <int GROUPS> constexpr int VEC = GROUPS < 4 ? GROUPS : 4;
template <int GROUPS>
__device__ __forceinline__ int rank_of(int group, int place) {
  return 8 * VEC<GROUPS> * (group / VEC<GROUPS>) + VEC<GROUPS> * place + group % VEC<GROUPS>;
}

// The small factor (columns, ranks), A transposed or B, from rank r0 on.
template <class V>
struct Small {
  const V* data;
  int64_t stride, rank_stride;
  int columns, ranks, r0;
};

// sum[tile][group] += the products of a share, columns c0 to c0 + 63, with the small factor; groups whose ranks all lie behind the last are left out
template <class T, class V, int GROUPS, Lie LIE, int TILES>
__device__ __forceinline__ void row_products(float (&sum)[TILES][GROUPS][4], const Share<TILES>& share, const Small<V>& a, int c0) {
  using O = Operands<T, V>;
  using F = typename O::Factor;
  constexpr int N = VEC<GROUPS>;
#pragma unroll(GROUPS > 2 || O::LARGE > 1 ? 1 : 2)  // else what is loaded for the second chunk, too, takes registers that sums need
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int group = 0; group < GROUPS; group += N) {
      if (group && a.r0 + 8 * group >= a.ranks) continue;
      const int column = c0 + 32 * c + 8 * static_cast<int>(threadIdx.x % 4), r = a.r0 + rank_of<GROUPS>(group, threadIdx.x % 32 / 4);
      uint32_t pair[N][4][O::SMALL];
      load_pairs<F, LIE>(pair, a.data + column * a.stride + r * a.rank_stride, a.stride, a.rank_stride, a.columns - column, a.ranks - r);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t left[TILES][O::LARGE][4];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
          for (int i = 0; i < 4; ++i) {  // row g or g + 8, first or second pair
            uint32_t term[O::LARGE];
            split_large<T, V>(word_of(c ? share[tile][i % 2][1] : share[tile][i % 2][0], 2 * s + i / 2), term);
#pragma unroll
            for (int l = 0; l < O::LARGE; ++l) left[tile][l][i] = term[l];
          }
#pragma unroll
        for (int n = 0; n < N; ++n) {
          uint32_t right[O::SMALL][2];
#pragma unroll
          for (int l = 0; l < O::SMALL; ++l) right[l][0] = pair[n][2 * s][l], right[l][1] = pair[n][2 * s + 1][l];
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) mma_terms<F>(sum[tile][group + n], left[tile], right);
        }
      }
    }
}

// A tile of each of `teams` teams of warps, the first from row m0 on, one `apart` rows behind the other: out[row * pitch + rank] = scale * the sum
// over the team's warps, in their order, for rows below M and ranks that exist.
template <int GROUPS>
__device__ __forceinline__ void reduce_tile(float* parts, const float (&sum)[GROUPS][4], int teams, float* out, int64_t pitch, int64_t m0, int apart, int64_t M,
                                            int64_t ranks, float scale) {
  constexpr int RANKS = 8 * GROUPS, SIZE = 16 * RANKS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, warps = WARPS / teams;
  __syncthreads();  // what stood there has been read
#pragma unroll
  for (int group = 0; group < GROUPS; ++group)
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[warp * SIZE + (8 * (i / 2) + g) * RANKS + rank_of<GROUPS>(group, 2 * t + i % 2)] = sum[group][i];
  __syncthreads();
  for (int i = threadIdx.x; i < teams * SIZE; i += THREADS) {
    const int team = i / SIZE, at = i % SIZE;
    float total = parts[team * warps * SIZE + at];
    for (int w = 1; w < warps; ++w) total += parts[(team * warps + w) * SIZE + at];
    const int64_t m = m0 + team * apart + at / RANKS;
    if (m < M && at % RANKS < ranks) out[m * pitch + at % RANKS] = scale * total;
  }
}

// -- over x's or dy's rows: dA, dB ------------------------------------------------------------------------------------------

// The left operand is u or du, 16 ranks by 16 rows; a lane's two ranks are neighbours, 2 g and 2 g + 1. The right one is 16 rows of x or dy by
// 64 columns in eight products; a lane holds of rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 the columns 8 g ... 8 g + 7, one for each product.
struct Thin {
  const float* data;  // u or du, float32
  int64_t stride, rows, ranks;
};
__device__ __forceinline__ int row_of(int t, int i) { return 2 * t + 8 * (i / 2) + i % 2; }

// v[i][j] = row row_of(t, i) from m on, rank r + j; zero outside
__device__ __forceinline__ void load_thin(float (&v)[4][2], const Thin& u, int64_t m, int64_t r, int t) {
  const float* at = u.data + (m + 2 * t) * u.stride + r;
  const int64_t left = u.rows - m;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) v[i][j] = row_of(t, i) < left && r + j < u.ranks ? at[(8 * (i / 2) + i % 2) * u.stride + j] : 0.0f;
}

template <class F, int TERMS>
__device__ __forceinline__ void split_thin(const float (&v)[4][2], uint32_t (&left)[TERMS][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // rank 2 g or 2 g + 1, first or second pair of rows
    uint32_t term[TERMS];
    split<F>(v[i / 2 * 2][i % 2], v[i / 2 * 2 + 1][i % 2], term);
#pragma unroll
    for (int l = 0; l < TERMS; ++l) left[l][i] = term[l];
  }
}

// right = column j of the lane's four rows, as two pairs along the rows
template <class T, class V>
__device__ __forceinline__ void split_column(const uint4 (&rows)[4], int j, uint32_t (&right)[Operands<T, V>::LARGE][2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t first = word_of(rows[2 * i], j / 2), second = word_of(rows[2 * i + 1], j / 2);
    uint32_t term[Operands<T, V>::LARGE];
    split_large<T, V>(__byte_perm(first, second, j % 2 ? 0x7632 : 0x5410), term);
#pragma unroll
    for (int l = 0; l < Operands<T, V>::LARGE; ++l) right[l][i] = term[l];
  }
}

}  // namespace
}  // namespace lk::cuda
