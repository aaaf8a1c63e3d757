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
LK_INLINE bool lie_whole(const Matrix& m, int64_t columns, const Mask& mask) { return m.col_stride == 1 && columns % TILE_DEPTH == 0 && !mask.seed && !m.index && !m.col_index; }
static Rows rows_of(const Matrix& m, int64_t m0, int64_t rows, int64_t c0, int64_t columns, const Mask& mask, uint16_t* out) {
  constexpr int64_t LD = BLOCK + TILE_DEPTH;
  if (rows % TILE_ROWS == 0 && lie_whole(m, columns, mask))
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
  float* out;             // whole tiles of rows
  int64_t out_ld;
  bool first;  // the sums begin here
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

// The first COUNT tiles, `step` floats from one to the next; ld: of a row, in bytes
template <int COUNT>
LK_INLINE void store_tiles(float* to, int64_t step = TILE_FLOATS, int64_t ld = 64) {
  if constexpr (COUNT > 1) store_tiles<COUNT - 1>(to, step, ld);
  store_tile<COUNT - 1>(to + (COUNT - 1) * step, ld);
}
template <int COUNT>
LK_INLINE void load_tiles(const float* from, int64_t step = TILE_FLOATS, int64_t ld = 64) {
  if constexpr (COUNT > 1) load_tiles<COUNT - 1>(from, step, ld);
  load_tile<COUNT - 1>(from + (COUNT - 1) * step, ld);
}
template <int COUNT>
LK_INLINE void zero_tiles() {
  if constexpr (COUNT > 1) zero_tiles<COUNT - 1>();
  zero_tile<COUNT - 1>();
}

template <int BLOCKS, int TERMS>
static void along_blocks(const AlongTiles<TERMS>& g, int64_t m, int64_t r) {
  const uint16_t* a = g.a.at + m * g.a.ld;
  const uint32_t* b = g.panel + r / TILE_ROWS * g.rank_step;
  const int64_t ld = g.a.ld, block = TILE_ROWS * ld, out_block = TILE_ROWS * g.out_ld, out_bytes = g.out_ld * sizeof(float);
  float* out = g.out + m * g.out_ld + r;
  g.first ? zero_tiles<BLOCKS>() : load_tiles<BLOCKS>(out, out_block, out_bytes);
  for (int64_t s = 0; s < g.steps; ++s, a += TILE_DEPTH, b += TERMS * TILE_WORDS) {
    load_terms<TERMS>(b);
    load_tile<4>(a, ld * 2), meet_right<0, TERMS>();
    if constexpr (BLOCKS > 1) load_tile<4>(a + block, ld * 2), meet_right<1, TERMS>();
    if constexpr (BLOCKS > 2) load_tile<4>(a + 2 * block, ld * 2), meet_right<2, TERMS>();
    if constexpr (BLOCKS > 3) load_tile<4>(a + 3 * block, ld * 2), meet_right<3, TERMS>();
  }
  store_tiles<BLOCKS>(out, out_block, out_bytes);
}

template <int TERMS>
static void along_tiles(const AlongTiles<TERMS>& g, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < width; r += TILE_ROWS) {
    int64_t m = 0;
    for (; rows - m > 3 * TILE_ROWS; m += 4 * TILE_ROWS) along_blocks<4, TERMS>(g, m, r);
    for (; rows - m > TILE_ROWS; m += 2 * TILE_ROWS) along_blocks<2, TERMS>(g, m, r);
    if (rows > m) along_blocks<1, TERMS>(g, m, r);
  }
}

// -- (R, columns) sums of p^T a, the depth across a's rows ------------------------------------------------------------------

constexpr int64_t ZIPPED = 4 * TILE_ROWS;             // columns that are summed at a time
constexpr int64_t ZIPPED_WORDS = 4 * TILE_WORDS;      // of TILE_DEPTH rows of them as right operands: four tiles, two and two in zip's order
constexpr int64_t ZIPPED_SUMS = 4 * TILE_FLOATS;      // of TILE_ROWS ranks
constexpr int64_t WIDE_DEPTH = 128;                   // rows of a whose zipped columns meet several TILE_ROWS ranks
constexpr int64_t WIDE_WORDS = WIDE_DEPTH / TILE_DEPTH * ZIPPED_WORDS;

template <int TERMS>
struct AcrossTiles {
  const uint32_t* p;  // pack_panel, left
  int64_t rank_step;  // words from TILE_ROWS ranks to the next
  Rows a;             // rows_of: whole tiles of rows; columns behind the last may be anything
  int64_t depth;      // where R is more than TILE_ROWS, at most WIDE_DEPTH
  bool first;         // the sums begin here
};

struct Zip {
  const uint16_t* a;
  int64_t ld, depth;
  __mmask32 valid[2];

  Zip(const Rows& rows, int64_t depth_, int64_t c, int64_t columns) : a(rows.at + c), ld(rows.ld), depth(depth_) {
    const auto first = [](int64_t count) { return count >= 2 * VL ? ~0u : count > 0 ? (1u << count) - 1 : 0; };
    valid[0] = first(columns - c), valid[1] = first(columns - c - 2 * VL);
  }
  bool whole(int64_t d) const { return valid[1] == ~0u && d + TILE_DEPTH <= depth; }
  // Rows d ... d + COUNT of the TILE_DEPTH that `to` has. WHOLE: there are as many, and ZIPPED columns; else zeros stand behind the last.
  template <int COUNT, bool WHOLE>
  __attribute__((always_inline)) void rows(int64_t d, uint32_t* tiles) const {
    static const uint16_t nothing[ZIPPED] = {};
    float* to = reinterpret_cast<float*>(tiles + d % TILE_DEPTH / 2 * VL);
    const uint16_t* row = a + d * ld;
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i += 2, to += VL, row += 2 * ld) {
      const uint16_t *low = WHOLE || d + i < depth ? row : nothing, *high = WHOLE || d + i + 1 < depth ? row + ld : nothing;
      const Two left = zip(low, high, WHOLE ? ~0u : valid[0]), right = zip(low + 2 * VL, high + 2 * VL, WHOLE ? ~0u : valid[1]);
      store(to, left.low), store(to + TILE_WORDS, left.high), store(to + 2 * TILE_WORDS, right.low), store(to + 3 * TILE_WORDS, right.high);
    }
  }
  __attribute__((always_inline)) void step(int64_t d, uint32_t* tiles) const {
    if (whole(d)) return rows<TILE_DEPTH, true>(d, tiles);
    for (int i = 0; i < TILE_DEPTH; i += 2) rows<2, false>(d + i, tiles);
  }
};

// What one pass over a takes besides: out (rows, TILE_ROWS) = or += a panel, as AlongTiles; null where nothing is wanted.
template <int TERMS>
struct Besides {
  const uint32_t* panel;
  float* out;
  bool first;
};

// A step's rows of it, whose sums pass through the last tile
template <int TERMS>
LK_INLINE void along_step(const Besides<TERMS>& g, const Rows& a, int64_t d, int64_t depth, int64_t c, int64_t columns) {
  for (int64_t i = d; i < smaller(d + TILE_DEPTH, depth); i += TILE_ROWS) {
    const uint16_t* at = a.at + i * a.ld + c;
    const uint32_t* b = g.panel + c / TILE_DEPTH * TERMS * TILE_WORDS;
    float* out = g.out + i * TILE_ROWS;
    g.first && c == 0 ? zero_tile<7>() : load_tile<7>(out);
    for (int64_t k = 0; k < smaller(ZIPPED, columns - c); k += TILE_DEPTH, b += TERMS * TILE_WORDS) {
      load_tile<4>(at + k, a.ld * 2), load_tile<5>(b), dot<7, 4, 5>();
      if constexpr (TERMS == 3) load_tile<6>(b + TILE_WORDS), dot<7, 4, 6>(), load_tile<5>(b + 2 * TILE_WORDS), dot<7, 4, 5>();
    }
    store_tile<7>(out);
  }
}

// The products of a step; among them, where NEXT, the next one's rows are zipped: the processor does both at once, as far as it looks ahead.
template <int TERMS, bool NEXT>
LK_INLINE void across_step(const uint32_t* p, const uint32_t* here, const Zip& zip, int64_t d, uint32_t* there) {
  constexpr int EACH = TILE_DEPTH / 4;
  load_terms<TERMS>(p);
  load_tile<4>(here), meet_left<0, TERMS>();
  if (NEXT) zip.rows<EACH, true>(d, there);
  load_tile<4>(here + TILE_WORDS), meet_left<1, TERMS>();
  if (NEXT) zip.rows<EACH, true>(d + EACH, there);
  load_tile<4>(here + 2 * TILE_WORDS), meet_left<2, TERMS>();
  if (NEXT) zip.rows<EACH, true>(d + 2 * EACH, there);
  load_tile<4>(here + 3 * TILE_WORDS), meet_left<3, TERMS>();
  if (NEXT) zip.rows<EACH, true>(d + 3 * EACH, there);
}

// sums[r / TILE_ROWS][4][TILE_FLOATS] of columns c ... c + ZIPPED; zipped: WIDE_WORDS
template <int TERMS>
static void across_columns(const AcrossTiles<TERMS>& g, int64_t R, int64_t c, int64_t columns, float* sums, uint32_t* zipped, const Besides<TERMS>& besides) {
  const Zip zip(g.a, g.depth, c, columns);
  const int64_t steps = ceil_div(g.depth, TILE_DEPTH);
  const int64_t kept = R <= TILE_ROWS ? 2 : steps;  // steps whose zipped rows are met again, and the next one
  zip.step(0, zipped);
  for (int64_t r = 0; r < R; r += TILE_ROWS, sums += ZIPPED_SUMS) {
    const uint32_t* p = g.p + r / TILE_ROWS * g.rank_step;
    g.first ? zero_tiles<4>() : load_tiles<4>(sums);
    for (int64_t s = 0; s < steps; ++s, p += TERMS * TILE_WORDS) {
      const uint32_t* here = zipped + s % kept * ZIPPED_WORDS;
      uint32_t* there = zipped + (s + 1) % kept * ZIPPED_WORDS;
      const int64_t next = (s + 1) * TILE_DEPTH;
      if (besides.out) along_step<TERMS>(besides, g.a, s * TILE_DEPTH, g.depth, c, columns);
      if (r == 0 && zip.whole(next)) {
        across_step<TERMS, true>(p, here, zip, next, there);
        continue;
      }
      across_step<TERMS, false>(p, here, zip, next, there);
      if (r == 0 && s + 1 < steps) zip.step(next, there);
    }
    store_tiles<4>(sums);
  }
}

// sums: [columns / ZIPPED] of these
template <int TERMS>
static void across_tiles(const AcrossTiles<TERMS>& g, int64_t R, int64_t columns, float* sums, uint32_t* zipped, const Besides<TERMS>& besides = {}) {
  for (int64_t c = 0; c < columns; c += ZIPPED, sums += ceil_div(R, TILE_ROWS) * ZIPPED_SUMS) across_columns<TERMS>(g, R, c, columns, sums, zipped, besides);
}

// out (R, columns) = or += the sums
static void store_sums(const float* sums, int64_t R, int64_t columns, float* out, int64_t ld, bool add_up) {
  for (int64_t c = 0; c < columns; c += 2 * VL)
    for (int64_t r = 0; r < R; ++r) {
      const float* from = sums + (c / ZIPPED * ceil_div(R, TILE_ROWS) + r / TILE_ROWS) * ZIPPED_SUMS + c % ZIPPED / (2 * VL) * 2 * TILE_FLOATS + r % TILE_ROWS * VL;
      float* to = out + r * ld + c;
      const Two total = in_order(load(from), load(from + TILE_FLOATS));
      store(to, add_up ? add(load(to), total.low) : total.low);
      store(to + VL, add_up ? add(load(to + VL), total.high) : total.high);
    }
}

}  // namespace
}  // namespace lk::cpu
#endif
