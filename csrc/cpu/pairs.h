// Thin products by the bfloat16 dot product, where all that meets is bfloat16; u and du, which are float32, are rounded to it, as
// the adapter they meet is (one term for adapters of half precision). A vector's lane holds two neighbours along the depth. Where the
// other side is broadcast from memory, which takes as long as a dot product, each broadcast serves two of them: along() takes four of
// the depth at once, across() two vectors of columns.
#pragma once
#include "tile.h"

namespace lk::cpu {
namespace {

LK_INLINE Matrix turned(const Matrix& m) { return {m.data, m.col_stride, m.row_stride, m.dtype, m.col_index, m.index}; }

// Where these are a product's operands, it runs on pairs.
LK_INLINE bool paired(const Matrix& a, const Matrix& b) { return HAS_DOT && a.dtype == DType::bf16 && b.dtype == DType::bf16; }

// -- operands ----------------------------------------------------------------------------------------------------------

// A row's columns as bfloat16, zero where the mask drops: where it lies, or in line.
static const uint16_t* row_bf16(const Matrix& m, int64_t row, int64_t column, int64_t count, const Mask& mask, uint16_t* line) {
  const uint16_t* at = line;
  const int64_t start = place(m, row) * m.row_stride;
  const bool whole = m.col_stride == 1 && !m.col_index;
  const auto offset = [&](int64_t c) { return start + (m.col_index ? m.col_index[column + c] : column + c) * m.col_stride; };
  if (m.dtype == DType::f32) {
    const float* data = static_cast<const float*>(m.data);
    int64_t c = 0;
    for (; whole && c + VL <= count; c += VL) store_bf16(line + c, load(data + offset(c)));
    for (; c < count; ++c) line[c] = float_to_bf16(data[offset(c)]);
  } else {
    const uint16_t* data = static_cast<const uint16_t*>(m.data);
    if (whole) at = data + offset(0);
    for (int64_t c = 0; !whole && c < count; ++c) line[c] = data[offset(c)];
  }
  if (!mask.seed) return at;
  int16_t keep[BLOCK + DRAW];
  keep_row(static_cast<uint64_t>(*mask.seed), mask.threshold, place(m, row), column, count, keep);
  for (int64_t c = 0; c < count; ++c) line[c] = at[c] & keep[c];
  return line;
}

constexpr int64_t PAD = 4;  // what along() takes at once

// Rows of bfloat16, zero up to a multiple of PAD columns; ld counts float32. Where memory holds just that, they stay there.
static View view_bf16(const Matrix& m, int64_t m0, int64_t rows, int64_t c0, int64_t columns, const Mask& mask, float* out, int64_t ld) {
  if (m.dtype == DType::bf16 && m.col_stride == 1 && m.row_stride % 2 == 0 && columns % PAD == 0 && !mask.seed && !m.index && !m.col_index)
    return {reinterpret_cast<const float*>(static_cast<const uint16_t*>(m.data) + m0 * m.row_stride + c0), m.row_stride / 2};
  for (int64_t i = 0; i < rows; ++i) {
    uint16_t* line = reinterpret_cast<uint16_t*>(out + i * ld);
    const uint16_t* at = row_bf16(m, m0 + i, c0, columns, mask, line);
    if (at != line) memcpy(line, at, columns * sizeof *line);
    memset(line + columns, 0, (round_up(columns, PAD) - columns) * sizeof *line);
  }
  return {out, ld};
}

#ifdef LK_ISA_AVX512BF16
// panel[d / 4 * ld + c] = m[row0 + d ... row0 + d + 3, column0 + c] for c < 8, where a column's words stand in memory
static void turn_words(const Matrix& m, int64_t row0, int64_t depth, int64_t column0, uint64_t* panel, int64_t ld, int64_t ahead) {
  const uint16_t* from[8];
  for (int64_t c = 0; c < 8; ++c) from[c] = static_cast<const uint16_t*>(m.data) + (m.col_index ? m.col_index[column0 + c] : column0 + c) * m.col_stride + row0;
  for (int64_t d = 0; d < depth; d += 32, panel += 8 * ld) {
    const int64_t words = smaller(8, (depth - d) / 4);
    const __mmask32 valid = words < 8 ? (1u << 4 * words) - 1 : ~0u;
    __m512i a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm512_maskz_loadu_epi16(valid, from[i] + d);
    for (int i = 0; ahead && i < 8; ++i) __builtin_prefetch(reinterpret_cast<const char*>(from[i] + d) + ahead, 0, 2);
    for (int i = 0; i < 8; i += 2) b[i] = _mm512_unpacklo_epi64(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 1]);
    for (int i = 0; i < 2; ++i) {
      const __m512i p = _mm512_shuffle_i32x4(b[i], b[i + 2], 0x44), q = _mm512_shuffle_i32x4(b[i + 4], b[i + 6], 0x44);
      const __m512i r = _mm512_shuffle_i32x4(b[i], b[i + 2], 0xee), s = _mm512_shuffle_i32x4(b[i + 4], b[i + 6], 0xee);
      a[i] = _mm512_shuffle_i32x4(p, q, 0x88), a[i + 2] = _mm512_shuffle_i32x4(p, q, 0xdd);
      a[i + 4] = _mm512_shuffle_i32x4(r, s, 0x88), a[i + 6] = _mm512_shuffle_i32x4(r, s, 0xdd);
    }
    for (int64_t w = 0; w < words; ++w) _mm512_storeu_si512(panel + w * ld, a[w]);
  }
}
#endif

#ifdef LK_ISA_AVX512BF16
// The places of a vector's sixteen-bit halves that put its upper half's between its lower half's.
LK_INLINE __m512i between() {
  return _mm512_add_epi32(_mm512_set1_epi32(0x100000), _mm512_setr_epi32(0x00000, 0x10001, 0x20002, 0x30003, 0x40004, 0x50005, 0x60006, 0x70007, 0x80008, 0x90009, 0xa000a, 0xb000b, 0xc000c, 0xd000d, 0xe000e, 0xf000f));
}

// to[c] = (a[c], b[c]) rounded; what is subnormal is zero, as it is to the dot product.
LK_INLINE void zip_rounded(const float* a, const float* b, int64_t columns, uint32_t* to) {
  const __m512i order = between();
  for (int64_t c = 0; c < columns; c += VL) {
    const int64_t some = smaller(VL, columns - c);
    const __mmask32 valid = some < VL ? (1u << 2 * some) - 1 : ~0u;
    const Vec low = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(valid, a + c)), high = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(valid, b + c));
    const __m512i words = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    if (some == VL)
      _mm512_storeu_si512(to + c, words);
    else
      memcpy(to + c, &words, some * sizeof *to);
  }
}
#endif

// panel[d / EACH * ld + c] = m[row0 + d ... row0 + d + EACH - 1, column0 + c], zero behind the last row and for c up to width, where a Word
// holds EACH bfloat16; lines: scratch for larger(EACH * columns / 2, TURN * depth / 2) floats. row0 is a multiple of EACH. ahead: pack_turned's.
template <class Word>
static void pack_words(const Matrix& m, int64_t row0, int64_t depth, int64_t column0, int64_t columns, int64_t width, int64_t ld,
                       Word* panel, float* lines, int64_t ahead = 0) {
  constexpr int EACH = sizeof(Word) / 2;
  int64_t d = 0;
  if (m.dtype == DType::bf16 && m.row_stride == 1 && !m.index) {  // words stand in memory
    d = depth / EACH * EACH;
    if (EACH == 2 && m.col_stride % 2 == 0) {
      const Matrix words = {m.data, m.col_stride / 2, 1, DType::f32, m.col_index};
      pack_turned(words, column0, columns, row0 / 2, depth / 2, width, ld, reinterpret_cast<float*>(panel), lines, ahead);
    } else {
      int64_t c = 0;
#ifdef LK_ISA_AVX512BF16
      if (EACH == 4)
        for (; c + 8 <= columns; c += 8) turn_words(m, row0, d, column0 + c, reinterpret_cast<uint64_t*>(panel) + c, ld, ahead);
#endif
      for (; c < width; ++c) {
        const int64_t column = m.col_index && c < columns ? m.col_index[column0 + c] : column0 + c;
        const uint16_t* from = static_cast<const uint16_t*>(m.data) + column * m.col_stride + row0;
        for (int64_t i = 0; i < d; i += EACH) {
          Word word = 0;
          if (c < columns) memcpy(&word, from + i, sizeof word);
          panel[i / EACH * ld + c] = word;
        }
      }
    }
  }
  for (; d < depth; d += EACH) {
    Word* to = panel + d / EACH * ld;
    const int64_t some = smaller(EACH, depth - d);
#ifdef LK_ISA_AVX512BF16
    if (EACH == 2 && some == EACH && m.dtype == DType::f32 && m.col_stride == 1 && !m.col_index && width == columns) {
      const float* data = static_cast<const float*>(m.data) + column0;
      zip_rounded(data + place(m, row0 + d) * m.row_stride, data + place(m, row0 + d + 1) * m.row_stride, columns, reinterpret_cast<uint32_t*>(to));
      continue;
    }
#endif
    const uint16_t* row[EACH];
    for (int64_t i = 0; i < some; ++i) row[i] = row_bf16(m, row0 + d + i, column0, columns, {}, reinterpret_cast<uint16_t*>(lines) + i * columns);
    if (some == EACH)  // nearly always: one pass over the columns
      for (int64_t c = 0; c < columns; ++c) {
        Word word = row[0][c];
        for (int i = 1; i < EACH; ++i) word |= static_cast<Word>(row[i][c]) << 16 * i;
        to[c] = word;
      }
    else
      for (int64_t c = 0; c < columns; ++c) {
        to[c] = 0;
        for (int64_t i = 0; i < some; ++i) to[c] |= static_cast<Word>(row[i][c]) << 16 * i;
      }
    for (int64_t c = columns; c < width; ++c) to[c] = 0;
  }
}

#if defined(LK_ISA_AVX512BF16)

// Four bfloat16 that stand together, in every 64 bits.
LK_INLINE Vec broadcast2(const float* p) {
  double both;
  memcpy(&both, p, sizeof both);
  return _mm512_castpd_ps(_mm512_set1_pd(both));
}

struct Two {
  Vec low, high;
};

// (a[c], b[c]) of up to 32 columns, in an order that in_order() undoes.
LK_INLINE Two zip(const uint16_t* a, const uint16_t* b, __mmask32 columns) {
  const __m512i x = _mm512_maskz_loadu_epi16(columns, a), y = _mm512_maskz_loadu_epi16(columns, b);
  return {_mm512_castsi512_ps(_mm512_unpacklo_epi16(x, y)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(x, y))};
}

LK_INLINE Two in_order(Vec low, Vec high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(low, first, high), _mm512_permutex2var_ps(low, second, high)};
}

// Each two neighbours' sum.
LK_INLINE Vec add_lanes(Vec a, Vec b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return add(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
}

#endif

// -- out (rows, R) = or += a panel, the depth along a's rows ---------------------------------------------------------------

struct Along {
  View a;                 // view_bf16
  const uint64_t* panel;  // pack_words: four of the depth, ld ranks
  int64_t ld, depth;
  float* out;
  int64_t out_ld;
  bool add;  // to what is in out
};

#if defined(LK_ISA_AVX512BF16)
template <int ROWS, class Next>
LK_INLINE void along_tile(const Along& g, int64_t m, int64_t r0, Next&& next) {
  Vec sum[ROWS][2];
  for (auto& row : sum) row[0] = row[1] = zero();
  const float* panel = reinterpret_cast<const float*>(g.panel + r0);
  const float* a = g.a.at + m * g.a.ld;
  for (int64_t d = 0; d < g.depth; d += 4, a += 2, panel += 2 * g.ld) {
    next.bring();
    const Vec low = load(panel), high = load(panel + VL);
    for (int i = 0; i < ROWS; ++i) {
      const Vec four = broadcast2(a + i * g.a.ld);
      sum[i][0] = dot(four, low, sum[i][0]), sum[i][1] = dot(four, high, sum[i][1]);
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    float* to = g.out + (m + i) * g.out_ld + r0;
    const Vec total = add_lanes(sum[i][0], sum[i][1]);
    store(to, g.add ? add(load(to), total) : total);
  }
}

static void along(const Along& g, int64_t rows, int64_t width, Ahead& next) {
  for (int64_t r = 0; r < width; r += VL) {
    int64_t m = 0;
    for (; m + 6 <= rows; m += 6) next.with([&](auto&& n) __attribute__((always_inline)) { along_tile<6>(g, m, r, n); });
    for (; m + 2 <= rows; m += 2) next.with([&](auto&& n) __attribute__((always_inline)) { along_tile<2>(g, m, r, n); });
    if (m < rows) next.with([&](auto&& n) __attribute__((always_inline)) { along_tile<1>(g, m, r, n); });
  }
}
#else
static void along(const Along&, int64_t, int64_t, Ahead&) {}  // never called
#endif

// -- out (R, columns) = or += p^T a, the depth across a's rows --------------------------------------------------------------

struct Across {
  const uint32_t* p;  // (depth / 2, R), pack_words
  View a;             // view_bf16
  int64_t depth;
  float* out;
  int64_t out_ld;
  bool add;  // to what is in out
};

#if defined(LK_ISA_AVX512BF16)
template <int RANKS, class Next>
LK_INLINE void across_tile(const Across& g, int64_t R, int64_t r0, int64_t c, int64_t columns, Next&& next) {
  static const uint16_t nothing[2 * VL] = {};
  const int64_t ld = 2 * g.a.ld;
  const __mmask32 valid = columns - c < 2 * VL ? (1u << (columns - c)) - 1 : ~0u;
  Vec sum[RANKS][2];
  for (auto& rank : sum) rank[0] = rank[1] = zero();
  const uint16_t* row = reinterpret_cast<const uint16_t*>(g.a.at) + c;
  const float* p = reinterpret_cast<const float*>(g.p + r0);
  for (int64_t d = 0; d < g.depth; d += 2, row += 2 * ld, p += R) {
    next.bring();
    const Two both = zip(row, d + 1 < g.depth ? row + ld : nothing, valid);
    for (int r = 0; r < RANKS; ++r) {
      const Vec pair = broadcast(p[r]);
      sum[r][0] = dot(pair, both.low, sum[r][0]), sum[r][1] = dot(pair, both.high, sum[r][1]);
    }
  }
  for (int r = 0; r < RANKS; ++r) {
    float* to = g.out + (r0 + r) * g.out_ld + c;
    const Two total = in_order(sum[r][0], sum[r][1]);
    store(to, g.add ? add(load(to), total.low) : total.low);
    store(to + VL, g.add ? add(load(to + VL), total.high) : total.high);
  }
}

template <int RANKS>
static void across_ranks(const Across& g, int64_t R, int64_t r0, int64_t columns, Ahead& next) {
  for (int64_t c = 0; c < columns; c += 2 * VL)
    next.with([&](auto&& n) __attribute__((always_inline)) { across_tile<RANKS>(g, R, r0, c, columns, n); });
}

static void across(const Across& g, int64_t R, int64_t columns, Ahead& next) {
  int64_t r = 0;
  for (; r + 8 <= R; r += 8) across_ranks<8>(g, R, r, columns, next);
  for (; r + 4 <= R; r += 4) across_ranks<4>(g, R, r, columns, next);
  for (; r < R; ++r) across_ranks<1>(g, R, r, columns, next);
}
#else
static void across(const Across&, int64_t, int64_t, Ahead&) {}  // never called
#endif

}  // namespace
}  // namespace lk::cpu
