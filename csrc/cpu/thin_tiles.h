// Thin products on tile registers (tiles.h), where one side is bfloat16. What else is float32 goes in as TERMS bfloat16 that add up to it:
// three, of which a product keeps every bit, or one, rounded, where the adapter is bfloat16 itself.
//
// A sum runs over the depth in its order, all terms of a step after each other, block by block: bits do not depend on a row's place. Terms share
// their sums' tiles, so that four of these meet what is loaded.
#pragma once
#ifdef LK_ISA_AMX
#include "pairs.h"
#include "tiles.h"

namespace lk::cpu {
namespace {

// Whether a product of these runs on tiles: few rows fill none.
template <class Params>
LK_INLINE bool tiled(const Params& p, const Matrix& a, DType adapter) {
  return a.dtype == DType::bf16 && adapter != DType::f16 && (p.among ? p.among : p.M) >= TILE_ROWS;
}
LK_INLINE bool whole_terms(DType adapter) { return adapter == DType::f32; }

// -- operands ----------------------------------------------------------------------------------------------------------

// low's lanes, then high's, as bfloat16 that add up to them. Of what is not finite there is one term.
template <int TERMS>
LK_INLINE void split(Vec low, Vec high, __m512i (&term)[TERMS]) {
  const auto rest = [](Vec all, __m256i half) __attribute__((always_inline)) {
    const Vec there = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    return _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(_mm512_sub_ps(there, there), zero(), _CMP_EQ_OQ), all, there);
  };
#pragma GCC unroll 3
  for (int t = 0; t < TERMS; ++t) {
    term[t] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (t + 1 < TERMS) low = rest(low, _mm512_castsi512_si256(term[t])), high = rest(high, _mm512_extracti64x4_epi64(term[t], 1));
  }
}

// `count` neighbours, at most a vector of them, zeros behind
LK_INLINE Vec load_some(const Matrix& m, int64_t start, int64_t count) {
  if (m.dtype == DType::f32) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), static_cast<const float*>(m.data) + start);
  const __m512i halves = _mm512_maskz_loadu_epi16((1u << count) - 1, static_cast<const uint16_t*>(m.data) + start);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves)), 16));
}

// A row's columns c0 ... c0 + width, at most a vector of them, zeros behind
static Vec vector_of(const Matrix& m, int64_t row, int64_t c0, int64_t width) {
  const int64_t start = place(m, row) * m.row_stride;
  if (m.col_stride == 1 && !m.col_index && m.dtype != DType::f16) return load_some(m, start + c0, width);
  float line[VL] = {};
  for (int64_t c = 0; c < width; ++c) line[c] = load_scalar(m.data, m.dtype, start + (m.col_index ? m.col_index[c0 + c] : c0 + c) * m.col_stride);
  return load(line);
}

// Tiles of m's rows d0 ... d0 + depth, a product's depth, at most TILE_DEPTH, and columns c0 ... c0 + width, its ranks, at most TILE_ROWS; zeros
// behind either. A tile for each term, behind each other: as a right operand, else as a left one.
template <int TERMS>
static void pack_tiles(const Matrix& m, int64_t d0, int64_t depth, int64_t c0, int64_t width, bool right, uint32_t* out) {
  __m512i rows[TERMS][TILE_ROWS], term[TERMS];
  const bool along = m.row_stride == 1 && !m.index && m.dtype != DType::f16;
  const __m512i order = between();
  for (int64_t i = 0; i < TILE_ROWS; ++i) {
    Vec low = zero(), high = zero();
    if (!along) {
      if (2 * i < depth) low = vector_of(m, d0 + 2 * i, c0, width);
      if (2 * i + 1 < depth) high = vector_of(m, d0 + 2 * i + 1, c0, width);
    } else if (i < width) {
      const int64_t start = (m.col_index ? m.col_index[c0 + i] : c0 + i) * m.col_stride + d0;
      low = load_some(m, start, smaller(VL, depth));
      if (depth > VL) high = load_some(m, start + VL, depth - VL);
    }
    split<TERMS>(low, high, term);
    for (int t = 0; t < TERMS; ++t) rows[t][i] = along ? term[t] : _mm512_permutexvar_epi16(order, term[t]);
  }
  for (int t = 0; t < TERMS; ++t) {
    if (along == right) turn_tile(rows[t]);
    for (int64_t i = 0; i < TILE_ROWS; ++i) _mm512_store_si512(out + t * TILE_WORDS + i * VL, rows[t][i]);
  }
}

// m's rows d0 ... d0 + depth and columns c0 ... c0 + ranks of it, zeros up to width: [width / TILE_ROWS], rank_step words apart, [depth / TILE_DEPTH][TERMS]
template <int TERMS>
static void pack_panel(const Matrix& m, int64_t d0, int64_t depth, int64_t c0, int64_t width, int64_t ranks, bool right, uint32_t* out, int64_t rank_step) {
  for (int64_t r = 0; r < width; r += TILE_ROWS, out += rank_step)
    for (int64_t d = 0; d < depth; d += TILE_DEPTH)
      pack_tiles<TERMS>(m, d0 + d, smaller(TILE_DEPTH, depth - d), c0 + r, larger(0, smaller(TILE_ROWS, ranks - r)), right, out + d / TILE_DEPTH * TERMS * TILE_WORDS);
}

LK_INLINE int64_t rank_words(int64_t terms, int64_t depth) { return ceil_div(depth, TILE_DEPTH) * terms * TILE_WORDS; }
LK_INLINE int64_t panel_words(int64_t terms, int64_t depth, int64_t ranks) { return ceil_div(ranks, TILE_ROWS) * rank_words(terms, depth); }

// Rows of bfloat16 in whole tiles, zeros behind the last row and column: where they lie, or in out (rows_floats).
struct Rows {
  const uint16_t* at;
  int64_t ld;
};
static Rows rows_of(const Matrix& m, int64_t m0, int64_t rows, int64_t c0, int64_t columns, const Mask& mask, uint16_t* out) {
  constexpr int64_t LD = BLOCK + TILE_DEPTH;
  if (m.col_stride == 1 && rows % TILE_ROWS == 0 && columns % TILE_DEPTH == 0 && !mask.seed && !m.index && !m.col_index)
    return {static_cast<const uint16_t*>(m.data) + m0 * m.row_stride + c0, m.row_stride};
  const int64_t whole = round_up(columns, TILE_DEPTH);
  for (int64_t i = 0; i < round_up(rows, TILE_ROWS); ++i) {
    uint16_t* line = out + i * LD;
    int64_t some = 0;
    if (i < rows) {
      const uint16_t* at = row_bf16(m, m0 + i, c0, columns, mask, line);
      if (at != line) memcpy(line, at, columns * sizeof *line);
      some = columns;
    }
    memset(line + some, 0, (whole - some) * sizeof *line);
  }
  return {out, LD};
}
LK_INLINE int64_t rows_floats(int64_t rows) { return (rows + TILE_ROWS) * (BLOCK + TILE_DEPTH) / 2; }

// -- out (rows, R) = or += a panel, the depth along a's rows ----------------------------------------------------------

template <int TERMS>
struct AlongTiles {
  Rows a;
  const uint32_t* panel;  // pack_panel, right
  int64_t rank_step;      // words from TILE_ROWS ranks to the next
  int64_t steps;          // TILE_DEPTH of the depth each
  float* out;
  int64_t out_ld;
  bool add;  // to what is in out
};

// The tile of sums C += left * right, for each of the right side's terms, or of the left one's
template <int C, int TERMS>
LK_INLINE void meet_right() {
  dot<C, 4, 5>();
  if constexpr (TERMS == 3) dot<C, 4, 6>(), dot<C, 4, 7>();
}
template <int C, int TERMS>
LK_INLINE void meet_left() {
  dot<C, 5, 4>();
  if constexpr (TERMS == 3) dot<C, 6, 4>(), dot<C, 7, 4>();
}
// All terms of a step
template <int TERMS>
LK_INLINE void load_terms(const uint32_t* from) {
  load_tile<5>(from);
  if constexpr (TERMS == 3) load_tile<6>(from + TILE_WORDS), load_tile<7>(from + 2 * TILE_WORDS);
}

// The first COUNT tiles to memory
template <int COUNT>
LK_INLINE void store_tiles(float* to) {
  if constexpr (COUNT > 1) store_tiles<COUNT - 1>(to);
  store_tile<COUNT - 1>(to + (COUNT - 1) * TILE_FLOATS);
}
template <int COUNT>
LK_INLINE void zero_tiles() {
  if constexpr (COUNT > 1) zero_tiles<COUNT - 1>();
  zero_tile<COUNT - 1>();
}

template <int BLOCKS, int TERMS>
static void along_blocks(const AlongTiles<TERMS>& g, int64_t m, int64_t rows, int64_t r) {
  const uint16_t* a = g.a.at + m * g.a.ld;
  const uint32_t* b = g.panel + r / TILE_ROWS * g.rank_step;
  const int64_t ld = g.a.ld, block = TILE_ROWS * ld;
  zero_tiles<BLOCKS>();
  for (int64_t s = 0; s < g.steps; ++s, a += TILE_DEPTH, b += TERMS * TILE_WORDS) {
    load_terms<TERMS>(b);
    load_tile<4>(a, ld * 2), meet_right<0, TERMS>();
    if constexpr (BLOCKS > 1) load_tile<4>(a + block, ld * 2), meet_right<1, TERMS>();
    if constexpr (BLOCKS > 2) load_tile<4>(a + 2 * block, ld * 2), meet_right<2, TERMS>();
    if constexpr (BLOCKS > 3) load_tile<4>(a + 3 * block, ld * 2), meet_right<3, TERMS>();
  }
  alignas(64) float sums[BLOCKS * TILE_FLOATS];
  store_tiles<BLOCKS>(sums);
  for (int64_t i = 0; i < smaller(BLOCKS * TILE_ROWS, rows - m); ++i) {
    float* to = g.out + (m + i) * g.out_ld + r;
    const Vec total = load(sums + i * VL);
    store(to, g.add ? add(load(to), total) : total);
  }
}

template <int TERMS>
static void along_tiles(const AlongTiles<TERMS>& g, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < width; r += TILE_ROWS) {
    int64_t m = 0;
    for (; rows - m > 3 * TILE_ROWS; m += 4 * TILE_ROWS) along_blocks<4, TERMS>(g, m, rows, r);
    for (; rows - m > TILE_ROWS; m += 2 * TILE_ROWS) along_blocks<2, TERMS>(g, m, rows, r);
    if (rows > m) along_blocks<1, TERMS>(g, m, rows, r);
  }
}

// -- out (R, columns) = or += p^T a, the depth across a's rows --------------------------------------------------------------

template <int TERMS>
struct AcrossTiles {
  const uint32_t* p;  // pack_panel, left
  Rows a;             // rows_of: whole tiles of rows; columns behind the last may be anything
  int64_t depth;
  float* out;
  int64_t out_ld;
  bool add;  // to what is in out
};

constexpr int64_t ZIPPED = 4 * TILE_ROWS;  // columns that are zipped at a time

// Some rows of ZIPPED columns as right operands: four tiles for each TILE_DEPTH, two and two in zip's order.
static void zip_tiles(const uint16_t* a, int64_t ld, int64_t depth, int64_t columns, uint32_t* out) {
  static const uint16_t nothing[ZIPPED] = {};
  const auto first = [](int64_t count) { return count >= 2 * VL ? ~0u : count > 0 ? (1u << count) - 1 : 0; };
  const __mmask32 valid[2] = {first(columns), first(columns - 2 * VL)};
  for (int64_t d = 0; d < round_up(depth, TILE_DEPTH); d += 2, a += 2 * ld) {
    const uint16_t *low = d < depth ? a : nothing, *high = d + 1 < depth ? a + ld : nothing;
    float* to = reinterpret_cast<float*>(out + d / TILE_DEPTH * 4 * TILE_WORDS + d % TILE_DEPTH / 2 * VL);
    for (int half = 0; half < 2; ++half, to += 2 * TILE_WORDS) {
      const Two both = zip(low + half * 2 * VL, high + half * 2 * VL, valid[half]);
      store(to, both.low), store(to + TILE_WORDS, both.high);
    }
  }
}

template <int TERMS>
static void across_tiles(const AcrossTiles<TERMS>& g, int64_t R, int64_t columns, uint32_t* zipped) {
  const int64_t steps = ceil_div(g.depth, TILE_DEPTH);
  for (int64_t c = 0; c < columns; c += ZIPPED) {
    zip_tiles(g.a.at + c, g.a.ld, g.depth, columns - c, zipped);
    const uint32_t* p = g.p;
    const bool all = columns - c > ZIPPED / 2;
    for (int64_t r = 0; r < R; r += TILE_ROWS) {
      zero_tiles<4>();
      const uint32_t* b = zipped;
      for (int64_t s = 0; s < steps; ++s, p += TERMS * TILE_WORDS, b += 4 * TILE_WORDS) {
        load_terms<TERMS>(p);
        load_tile<4>(b), meet_left<0, TERMS>(), load_tile<4>(b + TILE_WORDS), meet_left<1, TERMS>();
        if (all) load_tile<4>(b + 2 * TILE_WORDS), meet_left<2, TERMS>(), load_tile<4>(b + 3 * TILE_WORDS), meet_left<3, TERMS>();
      }
      alignas(64) float sums[4 * TILE_FLOATS];
      store_tiles<4>(sums);
      for (int64_t i = 0; i < smaller(TILE_ROWS, R - r); ++i)
        for (int64_t half = 0; half < (all ? 2 : 1); ++half) {
          float* to = g.out + (r + i) * g.out_ld + c + half * 2 * VL;
          const float* from = sums + half * 2 * TILE_FLOATS + i * VL;
          const Two total = in_order(load(from), load(from + TILE_FLOATS));
          store(to, g.add ? add(load(to), total.low) : total.low);
          store(to + VL, g.add ? add(load(to + VL), total.high) : total.high);
        }
    }
  }
}

}  // namespace
}  // namespace lk::cpu
#endif
