// Few rows of x against packed NF4, the codes looked up as they lie: 4 bytes of a row to a lane of 32 bits, 8 codes. Those that lie in the
// same place of their lanes, or of the lanes' halves, are looked up at once, by an index of which only the low bits count: the shifted
// words themselves. So x is laid out once in the order that the codes come in; those of a group's rows lie behind each other, for rows
// that lie a power of two apart would drive each other out of the first cache.
#pragma once
#include "nf4.h"

namespace lk::cpu {
namespace {

// In float32: vector j has elements 8 w + (j ^ 1), w = 0 ... VL - 1, of each STEP.
struct Singles {
  using Value = float;
  static constexpr int64_t WIDTH = VL, VECTORS = 8, STEP = WIDTH * VECTORS;
  Decoder decoder;
  LK_INLINE Vec codes(const Singles& form, Vec words, int j) { return decode_place(form.decoder, words, j); }
  LK_INLINE Vec meet(Vec codes, const float* x, Vec sum) { return fma(codes, load(x), sum); }
  LK_INLINE Value value(float x) { return x; }
};

#if defined(LK_ISA_AVX512BF16) && !defined(LK_ISA_AMX)
// In pairs of bfloat16, two products an instruction: vector j has elements 4 w + (j ^ 1), w = 0 ... 31. A processor with AMX takes as long for one such
// instruction as for four of Singles, which take 0.95 of the time of these there for a row, 0.81 for two.
struct Pairs {
  using Value = uint16_t;
  static constexpr int64_t WIDTH = 2 * VL, VECTORS = 4, STEP = WIDTH * VECTORS;
  __m512i table;
  Pairs() {
    alignas(64) uint16_t half[WIDTH];
    for (int64_t i = 0; i < WIDTH; ++i) half[i] = float_to_bf16(CODES[i % 16]);
    table = _mm512_loadu_si512(half);
  }
  LK_INLINE Vec codes(const Pairs& form, Vec words, int j) {
    const __m512i index = _mm512_castps_si512(words);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(j == 0 ? index : _mm512_srli_epi16(index, 4 * j), form.table));
  }
  LK_INLINE Vec meet(Vec codes, const uint16_t* x, Vec sum) { return dot(codes, load(reinterpret_cast<const float*>(x)), sum); }
  LK_INLINE Value value(float x) { return float_to_bf16(x); }  // exact: x was bfloat16
};
#endif

// Rows m.. of x in the form's order, zeros behind K; line: scratch for K floats
template <class Form>
static void lay_out(const Matrix& x, int64_t m, int64_t rows, int64_t K, typename Form::Value* out, float* line) {
  for (int64_t r = 0; r < rows; ++r) {
    load_row_any(x, m + r, 0, K, line);
    for (int64_t k0 = 0; k0 < K; k0 += Form::STEP) {
      typename Form::Value* to = out + k0 * rows + r * Form::STEP;
      for (int64_t j = 0; j < Form::VECTORS; ++j)
        for (int64_t w = 0; w < Form::WIDTH; ++w, ++to) {
          const int64_t k = k0 + Form::VECTORS * w + (j ^ 1);
          *to = Form::value(k < K ? line[k] : 0.0f);
        }
    }
  }
}

// part[r][c] += the products of COLS vectors of words with ROWS rows of x
template <class Form, int ROWS, int COLS>
LK_INLINE void meet(const Form& form, const Vec (&words)[COLS], const typename Form::Value* x, Vec (&part)[ROWS][COLS]) {
#pragma GCC unroll 8
  for (int j = 0; j < Form::VECTORS; ++j) {
    Vec codes[COLS];
    for (int c = 0; c < COLS; ++c) codes[c] = Form::codes(form, words[c], j);
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLS; ++c) part[r][c] = Form::meet(codes[c], x + r * Form::STEP + j * Form::WIDTH, part[r][c]);
  }
}

LK_INLINE Vec load_words(const uint8_t* packed) { return load(reinterpret_cast<const float*>(packed)); }

// Bytes of a row's end as a vector's: what lies behind meets zeros of x, but may lie behind the weight too.
LK_INLINE Vec rest_of(const uint8_t* packed, int64_t count) {
  uint8_t bytes[4 * VL] = {};
  memcpy(bytes, packed, count);
  return load_words(bytes);
}

// out[r] = the dot product of row n of W with row r of a group of x. K is a multiple of 8: eight neighbours, a lane's share, are of one block.
template <class Form, int ROWS>
static void dot_lanes(const NF4Weight& w, const Form& form, int64_t n, const typename Form::Value* x, float* out) {
  const int64_t first = n * w.K, end = first + w.K;
  Vec sum[ROWS];
  for (int r = 0; r < ROWS; ++r) sum[r] = zero();
  for (int64_t at = first; at < end; at += Form::STEP, x += ROWS * Form::STEP) {
    const int64_t left = end - at;
    const uint8_t* packed = w.packed + (at >> 1);
    float scales[VL];
    for (int64_t i = 0; i < VL;) {
      const int64_t from = smaller(at + 8 * i, end - 8), block = from >> w.block_shift;
      const float scale = scale_of(w, block);
      const int64_t stop = i + larger(1, (((block + 1) << w.block_shift) - at) / 8 - i);
      for (; i < smaller(stop, VL); ++i) scales[i] = scale;
    }
    const Vec words[1] = {left < Form::STEP ? rest_of(packed, left / 2) : load_words(packed)};
    Vec part[ROWS][1];
    for (int r = 0; r < ROWS; ++r) part[r][0] = zero();
    meet(form, words, x, part);
    for (int r = 0; r < ROWS; ++r) sum[r] = fma(load(scales), part[r][0], sum[r]);
  }
  for (int r = 0; r < ROWS; ++r) out[r] = total(sum[r]);
}

// The same where K is a multiple of RUN and RUN neighbours are of one block, for COLS rows of W at once, which share what is loaded of x.
constexpr int64_t RUN = 64;
constexpr int RUN_SHIFT = 6;
// bytes of x that stay within the first cache: on a Zen 5 4 rows of K = 14336 take 0.55 of the time, float32 with AVX-512 0.65. Decoding with AVX2
// takes longer than x's way from the second cache, and parts only cost.
constexpr int64_t NEAR = (VL == 8 ? 256 : 32) << 10;
constexpr int64_t AHEAD_BYTES = 8 << 10;  // of W that are brought in before they are needed: 4 rows of K = 4096 take 0.88 of the time of half as many there
constexpr int64_t COLUMNS = 16;  // of a task of few rows
constexpr int GROUP = 4;         // rows of x that meet a code while it is in a register

LK_INLINE bool in_runs(const NF4Weight& w) { return w.K % RUN == 0 && w.block_shift >= RUN_SHIFT; }

// low in the lanes of a vector's first RUN codes, high in the others, where it has that many
LK_INLINE Vec per_run(float low, float high) {
#ifdef LK_ISA_AVX512
  return _mm512_mask_blend_ps(0xff00, broadcast(low), broadcast(high));
#else
  return broadcast(low);
#endif
}

// W's scales. Where they are nested, what each byte stands for is worked out once for all blocks of a second scale: done for each
// scale again, it was a fifth of one row's time. A ring holds the maps of as many second scales as `rows` rows have.
struct Scales {
  static constexpr int64_t MAP = 256;
  const NF4Weight& w;
  const int64_t many;  // maps, a power of two
  float* const maps;
  int64_t begin = 0, end = 0;  // the second scales whose maps are there

  Scales(const NF4Weight& w, int64_t rows, float* scratch) : w(w), many(places(w, rows)), maps(scratch) {}
  LK_INLINE int64_t floats(const NF4Weight& w, int64_t rows) { return w.nested ? places(w, rows) * MAP : 0; }  // of scratch
  LK_INLINE int64_t places(const NF4Weight& w, int64_t rows) {
    const int64_t most = (rows * w.K >> w.block_shift >> w.nested_shift) + 2;  // begun and ended within one
    int64_t many = 1;
    while (many < most) many *= 2;
    return many;
  }

  // of blocks first ... last
  void prepare(int64_t first, int64_t last) {
    if (!w.nested) return;
    first >>= w.nested_shift, last >>= w.nested_shift;
    if (first < begin || first > end) begin = end = first;
    const Vec offset = broadcast(load_float(w.nested, 0));
    for (; end <= last; ++end) {
      const Vec second = broadcast(load_float(w.nested, 257 + end));
      const float* map = reinterpret_cast<const float*>(w.nested) + 1;
      float* to = maps + (end & (many - 1)) * MAP;
      for (int64_t i = 0; i < MAP; i += VL) store(to + i, add(mul(load(map + i), second), offset));
    }
    begin = larger(begin, end - many);
  }

  LK_INLINE const float* map(const Scales& s, int64_t block) { return s.maps + ((block >> s.w.nested_shift) & (s.many - 1)) * MAP; }
  template <bool NESTED>
  LK_INLINE float of(const Scales& s, int64_t block) {
    return NESTED ? map(s, block)[s.w.absmax[block]] : load_float(s.w.absmax, block);
  }
};

// sums[c][r] = or += row n + c of W with row r of a group of x, of the codes k0 ... k1 of each. ahead: what will be needed, COLS rows of W from
// `next`, is brought in meanwhile.
template <class Form, int ROWS, int COLS, bool NESTED>
static void dot_runs(Scales& scales, const Form& form, int64_t n, int64_t k0, int64_t k1, const typename Form::Value* x, bool ahead, const uint8_t* next, Vec* sums) {
  constexpr int64_t STEP_RUNS = Form::STEP / RUN;  // 1 or 2
  const NF4Weight& w = scales.w;
  const int64_t row = w.K / 2, row_runs = w.K / RUN, runs = k1 / RUN, first = n * row_runs;
  const int shift = w.block_shift - RUN_SHIFT;
  const uint8_t *absmax = w.absmax, *packed = w.packed + n * row;
  scales.prepare(first >> shift, (first + COLS * row_runs - 1) >> shift);
  Vec sum[ROWS][COLS];  // in registers
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLS; ++c) sum[r][c] = k0 ? sums[c * ROWS + r] : zero();
  const auto step = [&](const Vec(&words)[COLS], int64_t i, int64_t j, const auto& scale) __attribute__((always_inline)) {
    Vec part[ROWS][COLS];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLS; ++c) part[r][c] = zero();
    meet(form, words, x, part);
    for (int c = 0; c < COLS; ++c) {
      const Vec both = per_run(scale(c, i), scale(c, j));
      for (int r = 0; r < ROWS; ++r) sum[r][c] = fma(both, part[r][c], sum[r][c]);
    }
    x += ROWS * Form::STEP;
  };
  int64_t i = k0 / RUN;
  const bool whole_rows = k1 - k0 == w.K;  // which come one after the other, as memory likes it
  const int64_t next_row = whole_rows ? Form::STEP / 2 : row, advance = whole_rows ? COLS * (Form::STEP / 2) : Form::STEP / 2;
  Vec words[COLS];
  const auto whole = [&](const auto& scale) __attribute__((always_inline)) {
    for (int c = 0; c < COLS; ++c) words[c] = load_words(packed + c * row + i * (RUN / 2));
    if (ahead) {
      for (int c = 0; c < COLS; ++c) __builtin_prefetch(next + c * next_row);
      next += advance;
    }
    step(words, i, i + STEP_RUNS - 1, scale);
    i += STEP_RUNS;
  };
  const auto block = [&](int c, int64_t run) __attribute__((always_inline)) { return (first + c * row_runs + run) >> shift; };
  const auto any = [&](int c, int64_t run) __attribute__((always_inline)) { return Scales::of<NESTED>(scales, block(c, run)); };
  while (i + STEP_RUNS <= runs) {
    int64_t stop = runs;
    const float* map[COLS];
    for (int c = 0; NESTED && c < COLS; ++c) {
      map[c] = Scales::map(scales, block(c, i));
      const int64_t second = (block(c, i) >> w.nested_shift) + 1;  // until there the map is the same
      stop = smaller(stop, (second << w.nested_shift << shift) - first - c * row_runs);
    }
    const auto same = [&](int c, int64_t run) __attribute__((always_inline)) { return NESTED ? map[c][absmax[block(c, run)]] : any(c, run); };
    if (stop < i + STEP_RUNS) whole(any);
    while (i + STEP_RUNS <= stop) whole(same);
  }
  if (i < runs) {
    for (int c = 0; c < COLS; ++c) words[c] = rest_of(packed + c * row + i * (RUN / 2), RUN / 2);
    step(words, i, i, any);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLS; ++c) sums[c * ROWS + r] = sum[r][c];
}

// The sums of a task's columns, which meet x a part of K at a time that stays in the first cache.
template <class Form, int ROWS, int COLS, bool NESTED>
static void dot_columns(Scales& scales, const Form& form, int64_t n, int64_t columns, const typename Form::Value* x, bool ahead, Vec* sums) {
  const NF4Weight& w = scales.w;
  const int64_t parts = ceil_div(ROWS * w.K * static_cast<int64_t>(sizeof(typename Form::Value)), NEAR), part = round_up(ceil_div(w.K, parts), Form::STEP);
  const int64_t rows_ahead = COLS * larger(1, AHEAD_BYTES / (COLS * part / 2));
  for (int64_t k0 = 0; k0 < w.K; k0 += part) {
    const int64_t k1 = smaller(w.K, k0 + part);
    for (int64_t c = 0; c < columns; c += COLS) {
      const int64_t later = c + rows_ahead, over = later - columns;
      const int64_t behind = over < 0 ? (n + later) * w.K + k0 : k1 < w.K ? (n + over) * w.K + k1 : (n + later) * w.K;
      dot_runs<Form, ROWS, COLS, NESTED>(scales, form, n + c, k0, k1, x + k0 * ROWS, ahead, w.packed + behind / 2, sums + c * ROWS);
    }
  }
}

// out[r * out_ld + c]: rows n ... n + columns of W with ROWS rows of a group of x
template <int ROWS, class Form>
static void dot_group(Scales& scales, const Form& form, int64_t n, int64_t columns, const typename Form::Value* x, int64_t, bool ahead, float* out, int64_t out_ld) {
  const NF4Weight& w = scales.w;
  if (in_runs(w)) {
    constexpr int COLS = 2;
    const int64_t whole = columns / COLS * COLS;
    Vec sums[COLUMNS * ROWS];
    (w.nested ? dot_columns<Form, ROWS, COLS, true> : dot_columns<Form, ROWS, COLS, false>)(scales, form, n, whole, x, ahead, sums);
    if (whole < columns) (w.nested ? dot_columns<Form, ROWS, 1, true> : dot_columns<Form, ROWS, 1, false>)(scales, form, n + whole, 1, x, ahead, sums + whole * ROWS);
    for (int64_t c = 0; c < columns; ++c)
      for (int r = 0; r < ROWS; ++r) out[r * out_ld + c] = total(sums[c * ROWS + r]);
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    float sums[ROWS];
    dot_lanes<Form, ROWS>(w, form, n + c, x, sums);
    for (int r = 0; r < ROWS; ++r) out[r * out_ld + c] = sums[r];
  }
}

}  // namespace
}  // namespace lk::cpu
