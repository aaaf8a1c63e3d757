// y = x W^T + bias on packed NF4, without the low-rank term, for few rows of x. Compiled once per instruction set (CMakeLists.txt), see vec.h.
//
// A task owns columns of y: it streams their packed rows once. The sum over a block of W runs over the codes alone and
// meets the block's scale once: sum over blocks of scale * (sum over k of x code). The order depends on K alone, so bits
// don't depend on threads or on the rows beside a row.
#include "kernels.h"
#include "nf4.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

constexpr int64_t COLUMNS = 16;  // of a task
constexpr int GROUP = 4;         // rows of x that meet a code while it is in a register
constexpr int PARTS = 2;         // sums of a row, which hide the latency of the additions

struct Call {
  const NF4Linear* p;
  const float* x;  // (M, x_ld), float32
  int64_t x_ld;
  const uint16_t* pairs = nullptr;  // where x is bfloat16 and stays so: in the order of Pairs, pairs_ld for each row
  int64_t pairs_ld = 0;
};

// The sum of a vector's lanes: the upper half onto the lower, and again.
LK_INLINE float total(Vec sum) {
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX2)
#ifdef LK_ISA_AVX512
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sum), 1)));
#else
  const __m256 eight = sum;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  return (sum.lane[0] + sum.lane[2]) + (sum.lane[1] + sum.lane[3]);
#endif
}

LK_INLINE float bias_of(const NF4Linear& p, int64_t n) { return p.bias.data ? load_scalar(p.bias.data, p.bias.dtype, n * p.bias.col_stride) : 0.0f; }

// out[r] = the dot product of row n of W with rows m..m+ROWS of x
template <int ROWS>
static void dot(const Call& call, const Decoder& decoder, int64_t n, int64_t m, float* out) {
  const NF4Weight& w = call.p->w;
  const float* x = call.x + m * call.x_ld;
  const int64_t first = n * w.K, blocksize = int64_t{1} << w.block_shift;
  Vec sum[ROWS];
  float edge[ROWS];
  for (int r = 0; r < ROWS; ++r) sum[r] = zero(), edge[r] = 0.0f;
  for (int64_t at = first, end = first + w.K; at < end;) {
    const int64_t block = at >> w.block_shift, stop = smaller(end, (block + 1) * blocksize);
    const float scale = scale_of(w, block);
    const auto single = [&] {
      const float value = code_of(w.packed, at) * scale;
      for (int r = 0; r < ROWS; ++r) edge[r] += value * x[r * call.x_ld + at - first];
      ++at;
    };
    if (at & 1) single();
    const uint8_t* packed = w.packed + (at >> 1);
    const float* here = x + (at - first);
    int64_t steps = (stop - at) / VL;
    at += steps * VL;
    Vec part[ROWS][PARTS];
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < PARTS; ++j) part[r][j] = zero();
    for (; steps >= PARTS; steps -= PARTS)
      for (int j = 0; j < PARTS; ++j, here += VL, packed += VL / 2) {
        const Vec codes = decode(decoder, packed);
        for (int r = 0; r < ROWS; ++r) part[r][j] = fma(codes, load(here + r * call.x_ld), part[r][j]);
      }
    for (; steps; --steps, here += VL, packed += VL / 2) {
      const Vec codes = decode(decoder, packed);
      for (int r = 0; r < ROWS; ++r) part[r][0] = fma(codes, load(here + r * call.x_ld), part[r][0]);
    }
    for (int r = 0; r < ROWS; ++r) sum[r] = fma(broadcast(scale), add(part[r][0], part[r][1]), sum[r]);
    while (at < stop) single();
  }
  for (int r = 0; r < ROWS; ++r) out[r] = total(sum[r]) + edge[r];
}

#ifdef LK_ISA_AVX512BF16
// The same with x and the codes in bfloat16, two products an instruction. Of 128 codes, 64 bytes, the ones that lie in the same
// place of their 16 bits are looked up at once, by an index of which only the low bits count: the shifted words themselves. So
// x is laid out once in the order that the codes come in: vector j has elements 4 w + (j ^ 1), w = 0..31, of each 128; those of a
// group's rows lie behind each other, for rows that lie a power of two apart would drive each other out of the first cache.
struct Pairs {
  static constexpr int64_t STEP = 128, VECTORS = 4, WORDS = 32;
  __m512i codes;
  Pairs() {
    alignas(64) uint16_t half[WORDS];
    for (int64_t i = 0; i < WORDS; ++i) half[i] = float_to_bf16(CODES[i % 16]);
    codes = _mm512_loadu_si512(half);
  }
};

static void lay_out(const Matrix& x, int64_t m, int64_t rows, int64_t K, uint16_t* out) {
  for (int64_t k0 = 0; k0 < K; k0 += Pairs::STEP)
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t* row = static_cast<const uint16_t*>(x.data) + (m + r) * x.row_stride;
      for (int64_t j = 0; j < Pairs::VECTORS; ++j)
        for (int64_t w = 0; w < Pairs::WORDS; ++w, ++out) {
          const int64_t k = k0 + 4 * w + (j ^ 1);
          *out = k < K ? row[k * x.col_stride] : uint16_t{0};
        }
    }
}

// K is a multiple of 8: eight neighbours, a float32 lane's share, are of one block.
template <int ROWS>
static void dot_pairs(const Call& call, const Pairs& pairs, int64_t n, int64_t m, float* out) {
  const NF4Weight& w = call.p->w;
  const int64_t first = n * w.K, end = first + w.K;
  Vec sum[ROWS];
  for (int r = 0; r < ROWS; ++r) sum[r] = zero();
  const uint16_t* x = call.pairs + m * call.pairs_ld;
  for (int64_t at = first; at < end; at += Pairs::STEP, x += ROWS * Pairs::STEP) {
    const int64_t left = smaller(Pairs::STEP, end - at);
    uint8_t bytes[64];
    const uint8_t* packed = w.packed + (at >> 1);
    if (left < Pairs::STEP) {  // what lies behind the row meets zeros of x, but may be behind the weight too
      memset(bytes, 0, sizeof bytes);
      memcpy(bytes, packed, left / 2);
      packed = bytes;
    }
    float scales[VL];
    for (int64_t i = 0; i < VL;) {
      const int64_t from = smaller(at + 8 * i, end - 8), block = from >> w.block_shift;
      const float scale = scale_of(w, block);
      const int64_t stop = i + larger(1, (((block + 1) << w.block_shift) - at) / 8 - i);
      for (; i < smaller(stop, VL); ++i) scales[i] = scale;
    }
    const __m512i words = _mm512_loadu_si512(packed);
    Vec part[ROWS];
    for (int r = 0; r < ROWS; ++r) part[r] = zero();
    const auto meet = [&](__m512i index, int64_t j) {
      const __m512i codes = _mm512_permutexvar_epi16(index, pairs.codes);
      for (int r = 0; r < ROWS; ++r)
        part[r] = _mm512_dpbf16_ps(part[r], (__m512bh)codes, (__m512bh)_mm512_loadu_si512(x + r * Pairs::STEP + j * Pairs::WORDS));
    };
    meet(words, 0);
    meet(_mm512_srli_epi16(words, 4), 1);
    meet(_mm512_srli_epi16(words, 8), 2);
    meet(_mm512_srli_epi16(words, 12), 3);
    for (int r = 0; r < ROWS; ++r) sum[r] = fma(load(scales), part[r], sum[r]);
  }
  for (int r = 0; r < ROWS; ++r) out[r] = total(sum[r]);
}

// The same where K is a multiple of RUN and RUN neighbours are of one block, for COLS rows of W at once, which share what is loaded of x.
constexpr int64_t RUN = 64;
constexpr int64_t FIRST_CACHE = 12 << 10;  // elements of x

LK_INLINE bool in_runs(const NF4Weight& w) { return w.K % RUN == 0 && (int64_t{1} << w.block_shift) >= RUN; }
LK_INLINE int64_t runs_ld(const NF4Weight& w) { return ceil_div(w.K, Pairs::STEP) * (Pairs::STEP / RUN); }

static void scale_runs(const NF4Weight& w, int64_t n0, int64_t columns, float* scales) {
  const int64_t ld = runs_ld(w), runs = w.K / RUN, wide = (int64_t{1} << w.block_shift) / RUN;
  for (int64_t c = 0; c < columns; ++c, scales += ld) {
    const int64_t first = (n0 + c) * runs;
    int64_t i = 0;
    if (wide == 1 && w.nested) {  // the usual format: four at a time, for one is what a lookup takes
      const float offset = load_float(w.nested, 0);
      const auto at = [&](int64_t i) { return load_float(w.nested, 1 + w.absmax[first + i]); };
      while (i + 4 <= runs) {
        const int64_t stop = smaller(runs, ((((first + i) >> w.nested_shift) + 1) << w.nested_shift) - first);
        const __m128 second = _mm_set1_ps(load_float(w.nested, 257 + ((first + i) >> w.nested_shift)));
        if (i + 4 > stop) break;
        __builtin_prefetch(w.absmax + first + i + COLUMNS * runs);
        for (; i + 4 <= stop; i += 4)
          _mm_storeu_ps(scales + i, _mm_add_ps(_mm_mul_ps(_mm_setr_ps(at(i), at(i + 1), at(i + 2), at(i + 3)), second), _mm_set1_ps(offset)));
      }
    }
    for (; i < runs; ++i) scales[i] = scale_of(w, (first + i) / wide);
    for (; i < ld; ++i) scales[i] = 0.0f;
  }
}

// sums[r][c] += the products of columns k0 .. k1 of W's rows n.. and x's rows m.., in vectors; rows of sums are sums_ld apart.
template <int ROWS, int COLS>
static void dot_runs(const Call& call, const Pairs& pairs, int64_t n, int64_t m, int64_t k0, int64_t k1, const float* scales, float* sums, int64_t sums_ld) {
  const NF4Weight& w = call.p->w;
  const int64_t ld = runs_ld(w), row = w.K / 2;
  const uint8_t* packed = w.packed + n * row;
  const uint16_t* x = call.pairs + m * call.pairs_ld + k0 * ROWS;
  scales += k0 / RUN;
  Vec sum[ROWS][COLS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLS; ++c) sum[r][c] = load(sums + r * sums_ld + c * VL);
  const auto step = [&](const __m512i* words) __attribute__((always_inline)) {
    Vec part[ROWS][COLS];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLS; ++c) part[r][c] = zero();
    const auto meet = [&](const auto& shifted, int64_t j) __attribute__((always_inline)) {
      __m512i codes[COLS];
      for (int c = 0; c < COLS; ++c) codes[c] = _mm512_permutexvar_epi16(shifted(words[c]), pairs.codes);
      for (int r = 0; r < ROWS; ++r) {
        const __m512i values = _mm512_loadu_si512(x + r * Pairs::STEP + j * Pairs::WORDS);
        for (int c = 0; c < COLS; ++c) part[r][c] = _mm512_dpbf16_ps(part[r][c], (__m512bh)codes[c], (__m512bh)values);
      }
    };
    meet([](__m512i a) __attribute__((always_inline)) { return a; }, 0);
    meet([](__m512i a) __attribute__((always_inline)) { return _mm512_srli_epi16(a, 4); }, 1);
    meet([](__m512i a) __attribute__((always_inline)) { return _mm512_srli_epi16(a, 8); }, 2);
    meet([](__m512i a) __attribute__((always_inline)) { return _mm512_srli_epi16(a, 12); }, 3);
    for (int c = 0; c < COLS; ++c) {
      const Vec both = _mm512_mask_blend_ps(0xff00, broadcast(scales[c * ld]), broadcast(scales[c * ld + 1]));
      for (int r = 0; r < ROWS; ++r) sum[r][c] = fma(both, part[r][c], sum[r][c]);
    }
    x += ROWS * Pairs::STEP, scales += Pairs::STEP / RUN;
  };
  int64_t k = k0;
  __m512i words[COLS];
  // The first rows of x bring the next COLS rows of W in, one after the other, as memory likes it; the others find them.
  const uint8_t *next = packed + COLS * row + k0 / 2, *stop = next + (k1 - k0) / 2;
  for (; k + Pairs::STEP <= k1; k += Pairs::STEP) {
    for (int c = 0; c < COLS; ++c) words[c] = _mm512_loadu_si512(packed + c * row + k / 2);
    if (m == 0) {
      for (int c = 0; c < COLS; ++c, next += Pairs::STEP / 2) __builtin_prefetch(next);
      if (next >= stop) next += row - (k1 - k0) / 2, stop += row;
    }
    step(words);
  }
  if (k < k1) {  // half of it meets zeros of x, but may lie behind the weight
    for (int c = 0; c < COLS; ++c) {
      uint8_t bytes[64] = {};
      memcpy(bytes, packed + c * row + k / 2, RUN / 2);
      words[c] = _mm512_loadu_si512(bytes);
    }
    step(words);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLS; ++c) store(sums + r * sums_ld + c * VL, sum[r][c]);
}

template <int COLS>
static void dot_runs_of(int64_t rows, const Call& call, const Pairs& pairs, int64_t n, int64_t m, int64_t k0, int64_t k1, const float* scales, float* sums) {
  constexpr int64_t ld = COLUMNS * VL;
  switch (rows) {
    case 1: return dot_runs<1, COLS>(call, pairs, n, m, k0, k1, scales, sums, ld);
    case 2: return dot_runs<2, COLS>(call, pairs, n, m, k0, k1, scales, sums, ld);
    case 3: return dot_runs<3, COLS>(call, pairs, n, m, k0, k1, scales, sums, ld);
    default: return dot_runs<GROUP, COLS>(call, pairs, n, m, k0, k1, scales, sums, ld);
  }
}

// A group of rows of x comes from the first cache for all columns of a task: K is cut into pieces that let it.
static void run_tasks(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  const NF4Linear& p = *call.p;
  const int64_t M = p.lowrank.M, K = p.w.K, pieces = ceil_div(K * smaller(M, GROUP), FIRST_CACHE), depth = round_up(ceil_div(K, pieces), Pairs::STEP);
  const Pairs pairs;
  Scratch scratch(WORKER, round_up(COLUMNS * runs_ld(p.w), 16) + M * COLUMNS * VL);
  float *scales = scratch.next(COLUMNS * runs_ld(p.w)), *sums = scratch.next(M * COLUMNS * VL);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n0 = t * COLUMNS, columns = smaller(COLUMNS, p.w.N - n0);
    scale_runs(p.w, n0, columns, scales);
    memset(sums, 0, sizeof(float) * M * COLUMNS * VL);
    for (int64_t k0 = 0; k0 < K; k0 += depth)
      for (int64_t m = 0; m < M; m += GROUP) {
        const int64_t rows = smaller(GROUP, M - m), k1 = smaller(K, k0 + depth);
        int64_t c = 0;
        const auto at = [&](int64_t c) { return sums + (m * COLUMNS + c) * VL; };
        for (; c + 2 <= columns; c += 2) dot_runs_of<2>(rows, call, pairs, n0 + c, m, k0, k1, scales + c * runs_ld(p.w), at(c));
        if (c < columns) dot_runs_of<1>(rows, call, pairs, n0 + c, m, k0, k1, scales + c * runs_ld(p.w), at(c));
      }
    for (int64_t m = 0; m < M; ++m) {
      float out[COLUMNS];
      for (int64_t c = 0; c < columns; ++c) out[c] = total(load(sums + (m * COLUMNS + c) * VL)) + bias_of(p, n0 + c);
      store_row_any(p.lowrank.y, m, n0, columns, out, 1.0f);
    }
  }
}
#endif

struct Lookup {
  Decoder decoder;
#ifdef LK_ISA_AVX512BF16
  Pairs pairs;
#endif
};

template <int ROWS>
static void dot_any(const Call& call, const Lookup& lookup, int64_t n, int64_t m, float* out) {
#ifdef LK_ISA_AVX512BF16
  if (call.pairs) return dot_pairs<ROWS>(call, lookup.pairs, n, m, out);
#endif
  dot<ROWS>(call, lookup.decoder, n, m, out);
}

static void tasks(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  const NF4Linear& p = *call.p;
  const int64_t M = p.lowrank.M;
  const Lookup lookup;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n0 = t * COLUMNS, columns = smaller(COLUMNS, p.w.N - n0);
    for (int64_t m = 0; m < M; m += GROUP) {
      const int64_t rows = smaller(GROUP, M - m);
      float out[GROUP][COLUMNS];
      for (int64_t c = 0; c < columns; ++c) {
        float sums[GROUP];
        switch (rows) {
          case 1: dot_any<1>(call, lookup, n0 + c, m, sums); break;
          case 2: dot_any<2>(call, lookup, n0 + c, m, sums); break;
          case 3: dot_any<3>(call, lookup, n0 + c, m, sums); break;
          default: dot_any<GROUP>(call, lookup, n0 + c, m, sums);
        }
        for (int64_t r = 0; r < rows; ++r) out[r][c] = sums[r] + bias_of(p, n0 + c);
      }
      for (int64_t r = 0; r < rows; ++r) store_row_any(p.lowrank.y, m + r, n0, columns, out[r], 1.0f);
    }
  }
}

}  // namespace

namespace LK_ISA_NAME {

void nf4_linear(const NF4Linear& p) {
  const int64_t M = p.lowrank.M;
  if (M == 0) return;
  Call call = {&p, static_cast<const float*>(p.x.data), p.x.row_stride};
#ifdef LK_ISA_AVX512BF16
  if (p.x.dtype == DType::bf16 && p.w.K % 8 == 0) {
    call.pairs_ld = round_up(p.w.K, Pairs::STEP);
    Scratch scratch(CALLER, ceil_div(M * call.pairs_ld, 2));
    uint16_t* pairs = reinterpret_cast<uint16_t*>(scratch.at);
    for (int64_t m = 0; m < M; m += GROUP) lay_out(p.x, m, smaller(GROUP, M - m), p.w.K, pairs + m * call.pairs_ld);
    call.pairs = pairs;
    return parallel_for(ceil_div(p.w.N, COLUMNS), M * p.w.N * p.w.K, in_runs(p.w) ? run_tasks : tasks, &call);
  }
#endif
  const bool as_it_is = p.x.dtype == DType::f32 && p.x.col_stride == 1;
  Scratch scratch(CALLER, as_it_is ? 1 : M * p.w.K);
  if (!as_it_is) {
    for (int64_t m = 0; m < M; ++m) load_row_any(p.x, m, 0, p.w.K, scratch.at + m * p.w.K);
    call.x = scratch.at, call.x_ld = p.w.K;
  }
  parallel_for(ceil_div(p.w.N, COLUMNS), M * p.w.N * p.w.K, tasks, &call);
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
