// What the thin products share. One side of each has few columns (the rank), so all of them are the same register tile:
// broadcast an element of p, multiply it with a row of a packed float32 panel, add to sums that stay in registers.
// A sum runs over the depth in its order whatever the tile, so bits do not depend on a row's place. Callers cut a long depth into
// blocks, and a block's sum is made by itself before it joins the others: one chain over all of K = 2048 rounds three times as much.
#pragma once
#include "keep.h"
#include "scratch.h"
#include "vec.h"

namespace lk::cpu {
namespace {

LK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
LK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LK_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

LK_INLINE int64_t place(const Matrix& m, int64_t row) { return m.index ? m.index[row] : row; }

struct Nothing {  // is wanted next
  __attribute__((always_inline)) void bring() {}
};

// Rows m0.. and columns c0.. of a matrix that are wanted next. A product asks for them line by line while it computes: all at once they
// would fill the few places that the first cache has for what is on its way, and what is wanted now would wait for them. Row by row,
// for memory reads neighbours faster; a block's rows lie too far apart for the processor to guess the next one.
struct Ahead {
  const Matrix* m = nullptr;
  int64_t row = 0, rows = 0, start = 0, lines = 0, line = 0;
  const char* at = nullptr;

  Ahead() = default;
  Ahead(const Matrix& m_, int64_t m0, int64_t count, int64_t c0, int64_t columns) {
    if (m_.col_stride != 1 || count <= 0) return;
    const int64_t size = m_.dtype == DType::f32 ? 4 : 2;
    m = &m_, row = m0, rows = count, start = c0 * size, line = lines = (columns * size + 63) / 64;
    at = of_row();
  }
  const char* of_row() const { return static_cast<const char*>(m->data) + place(*m, row) * m->row_stride * (m->dtype == DType::f32 ? 4 : 2) + start; }
  __attribute__((always_inline)) void bring() {
    if (!rows) return;
    __builtin_prefetch(at);
    at += 64;
    if (--line) return;
    line = lines, ++row;
    if (--rows) at = of_row();
  }
  // Runs a loop that calls bring(); where there is nothing to bring, one compiled without.
  template <class Loop>
  __attribute__((always_inline)) void with(Loop loop) {
    if (!rows) return loop(Nothing());
    Ahead here = *this;  // in registers
    loop(here);
    *this = here;
  }
};

// sum[i][j] += sum over d of p[i * p_row + d * p_step] * panel[d * ld + j * VL ...]; with PAIRS, p and the panel hold two
// bfloat16 of the depth in the place of each float32 (pairs.h)
template <int ROWS, int VECS, bool PAIRS = false, class Next = Nothing>
LK_INLINE void accumulate(const float* p, int64_t p_row, int64_t p_step, const float* panel, int64_t ld, int64_t depth,
                          Vec (&sum)[ROWS][VECS], Next&& next = {}) {
  const float* row[ROWS];
  for (int i = 0; i < ROWS; ++i) row[i] = p + i * p_row;
  for (int64_t d = 0; d < depth; ++d) {
    if (d % 2 == 0) next.bring();
    Vec b[VECS];
    for (int j = 0; j < VECS; ++j) b[j] = load(panel + d * ld + j * VL);
    for (int i = 0; i < ROWS; ++i) {
      const Vec a = broadcast(row[i][d * p_step]);
      for (int j = 0; j < VECS; ++j) sum[i][j] = PAIRS ? dot(a, b[j], sum[i][j]) : fma(a, b[j], sum[i][j]);
    }
  }
}

struct Product {
  const float* p;
  int64_t p_row, p_step;
  const float* panel;
  int64_t ld, depth;
  float* out;
  int64_t out_ld;
  bool add;  // to what is in out
};

template <int ROWS, int VECS, class Next>
LK_INLINE void product_tile(const Product& g, int64_t i0, int64_t j0, Next&& next) {
  Vec sum[ROWS][VECS];
  float* out = g.out + i0 * g.out_ld + j0 * VL;
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) sum[i][j] = zero();
  accumulate<ROWS, VECS>(g.p + i0 * g.p_row, g.p_row, g.p_step, g.panel + j0 * VL, g.ld, g.depth, sum, next);
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) {
      float* to = out + i * g.out_ld + j * VL;
      store(to, g.add ? add(load(to), sum[i][j]) : sum[i][j]);
    }
}

template <int VECS>
static void product_columns(const Product& g, int64_t rows, int64_t j0, Ahead& next) {
  constexpr int ROWS = VECS == 1 ? 8 : 6;
  int64_t i = 0;
  while (i < rows) {
    const int64_t left = rows - i;
    if (left >= ROWS && (VECS == 1 || left != 8)) {  // at least eight sums, for two begin in a cycle and take four
      next.with([&](auto&& n) __attribute__((always_inline)) { product_tile<ROWS, VECS>(g, i, j0, n); });
      i += ROWS;
    } else if (left >= 4) {
      next.with([&](auto&& n) __attribute__((always_inline)) { product_tile<4, VECS>(g, i, j0, n); });
      i += 4;
    } else if (left >= 2) {
      next.with([&](auto&& n) __attribute__((always_inline)) { product_tile<2, VECS>(g, i, j0, n); });
      i += 2;
    } else {
      next.with([&](auto&& n) __attribute__((always_inline)) { product_tile<1, VECS>(g, i, j0, n); });
      i += 1;
    }
  }
}

// out (rows, vecs * VL) = or += p (rows, depth) panel (depth, vecs * VL)
static void product(const Product& g, int64_t rows, int64_t vecs, Ahead& next) {
  int64_t j = 0;
  for (; j + 2 <= vecs; j += 2) product_columns<2>(g, rows, j, next);
  if (j < vecs) product_columns<1>(g, rows, j, next);
}

static void product(const Product& g, int64_t rows, int64_t vecs) {
  Ahead nothing;
  product(g, rows, vecs, nothing);
}

// -- operands as float32 ----------------------------------------------------------------------------------------------

template <DType dtype>
static void load_row(const Matrix& m, int64_t row, int64_t column, int64_t count, float* out) {
  using E = Element<dtype>;
  const typename E::type* from =
      static_cast<const typename E::type*>(m.data) + place(m, row) * m.row_stride + column * m.col_stride;
  int64_t c = 0;
  if (m.col_stride == 1) {
    for (; c + VL <= count; c += VL) store(out + c, E::get(from + c));
    for (; c < count; ++c) out[c] = E::scalar(from[c]);
  } else {
    for (; c < count; ++c) out[c] = E::scalar(from[c * m.col_stride]);
  }
}

static void load_row_any(const Matrix& m, int64_t row, int64_t column, int64_t count, float* out) {
  switch (m.dtype) {
    case DType::f32: return load_row<DType::f32>(m, row, column, count, out);
    case DType::bf16: return load_row<DType::bf16>(m, row, column, count, out);
    case DType::f16: return load_row<DType::f16>(m, row, column, count, out);
  }
}

struct Mask {
  const int64_t* seed;  // null: nothing is dropped
  uint32_t threshold;
};

struct View {
  const float* at;
  int64_t ld;
};

constexpr int64_t BLOCK = 256;                // columns of a block: its rows and panels stay within the first two caches
constexpr int64_t BLOCK_LD = BLOCK + 16;      // an odd number of cache lines, so that a column spreads over the sets

// Rows m0.. and columns c0.. of a matrix (at most BLOCK of them, c0 a multiple of 8) as float32, copied to out (row length
// BLOCK_LD) with zeros up to a multiple of VL columns and for what the mask drops; kept elements are not scaled.
static View copy(const Matrix& m, int64_t m0, int64_t rows, int64_t c0, int64_t columns, const Mask& mask, float* out) {
  int16_t keep[BLOCK + DRAW];
  const int64_t padded = round_up(columns, VL);
  for (int64_t i = 0; i < rows; ++i) {
    float* line = out + i * BLOCK_LD;
    load_row_any(m, m0 + i, c0, columns, line);
    for (int64_t c = columns; c < padded; ++c) line[c] = 0.0f;
    if (mask.seed) {
      keep_row(static_cast<uint64_t>(*mask.seed), mask.threshold, place(m, m0 + i), c0, columns, keep);
      for (int64_t c = 0; c < padded; c += VL) store(line + c, masked(load(line + c), keep + c));
    }
  }
  return {out, BLOCK_LD};
}

// The same without the zeros behind the last column, and without a copy where memory holds just that.
static View view(const Matrix& m, int64_t m0, int64_t rows, int64_t c0, int64_t columns, const Mask& mask, float* out) {
  if (m.dtype == DType::f32 && m.col_stride == 1 && !mask.seed && !m.index)
    return {static_cast<const float*>(m.data) + m0 * m.row_stride + c0, m.row_stride};
  return copy(m, m0, rows, c0, columns, mask, out);
}

// panel[d * ld + c] = m[row0 + d, column0 + c] for c < columns, zero up to width
static void pack_rows(const Matrix& m, int64_t row0, int64_t depth, int64_t column0, int64_t columns, int64_t width,
                      int64_t ld, float* panel) {
  for (int64_t d = 0; d < depth; ++d) {
    load_row_any(m, row0 + d, column0, columns, panel + d * ld);
    for (int64_t c = columns; c < width; ++c) panel[d * ld + c] = 0.0f;
  }
}

#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX2)
// out[i][j] = line[j][d + i] for i, j < 8
LK_INLINE void turn8(const float* const* line, int64_t d, __m256 (&out)[8]) {
  __m256 a[8], b[8];
  for (int j = 0; j < 8; ++j) a[j] = _mm256_loadu_ps(line[j] + d);
  for (int j = 0; j < 8; j += 2) b[j] = _mm256_unpacklo_ps(a[j], a[j + 1]), b[j + 1] = _mm256_unpackhi_ps(a[j], a[j + 1]);
  for (int j = 0; j < 8; j += 4) {
    a[j] = _mm256_shuffle_ps(b[j], b[j + 2], 0x44), a[j + 1] = _mm256_shuffle_ps(b[j], b[j + 2], 0xee);
    a[j + 2] = _mm256_shuffle_ps(b[j + 1], b[j + 3], 0x44), a[j + 3] = _mm256_shuffle_ps(b[j + 1], b[j + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) out[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20), out[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
}

// out[i][j] = line[j][d + i] for i < 8, j < VL
#ifdef LK_ISA_AVX512
LK_INLINE void turn(const float* const* line, int64_t d, Vec (&out)[8]) {
  Vec a[8], b[8];
  for (int j = 0; j < 8; ++j) {
    const int at = j < 4 ? j : j + 4;  // lines at and at + 4 share a vector, so that the last step leaves all in order
    a[j] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(line[at] + d)), _mm256_loadu_ps(line[at + 4] + d), 1);
  }
  for (int j = 0; j < 8; j += 2) b[j] = _mm512_unpacklo_ps(a[j], a[j + 1]), b[j + 1] = _mm512_unpackhi_ps(a[j], a[j + 1]);
  for (int j = 0; j < 8; j += 4) {
    a[j] = _mm512_shuffle_ps(b[j], b[j + 2], 0x44), a[j + 1] = _mm512_shuffle_ps(b[j], b[j + 2], 0xee);
    a[j + 2] = _mm512_shuffle_ps(b[j + 1], b[j + 3], 0x44), a[j + 3] = _mm512_shuffle_ps(b[j + 1], b[j + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_castps_si512(a[i]), high = _mm512_castps_si512(a[i + 4]);
    out[i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(low, high, 0x88)), out[i + 4] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(low, high, 0xdd));
  }
}
#else
LK_INLINE void turn(const float* const* line, int64_t d, Vec (&out)[8]) { turn8(line, d, out); }
#endif
#endif

// panel[d * ld + c] = m[row0 + c, column0 + d] for c < rows, zero up to width; lines: scratch for TURN * depth floats. ahead: how many bytes
// behind this lies what is wanted next, 0 for nothing: it is brought into the second cache meanwhile, a little at a time, for the first
// has few places for what is on its way.
constexpr int64_t TURN = 8;
static void pack_turned(const Matrix& m, int64_t row0, int64_t rows, int64_t column0, int64_t depth, int64_t width,
                        int64_t ld, float* panel, float* lines, int64_t ahead = 0) {
  if (m.col_index || (m.row_stride == 1 && m.col_stride != 1)) {  // its transpose lies in order
    const Matrix turned = {m.data, m.col_stride, m.row_stride, m.dtype, m.col_index};
    return pack_rows(turned, column0, depth, row0, rows, width, ld, panel);
  }
  const bool there = m.dtype == DType::f32 && m.col_stride == 1;
  for (int64_t c = 0; c < width; c += TURN) {
    const int64_t some = smaller(TURN, width - c);
    const float* line[TURN];
    for (int64_t i = 0; i < some; ++i) {
      line[i] = lines + i * depth;
      if (c + i >= rows)
        memset(lines + i * depth, 0, depth * sizeof *lines);
      else if (there)
        line[i] = static_cast<const float*>(m.data) + place(m, row0 + c + i) * m.row_stride + column0;
      else
        load_row_any(m, row0 + c + i, column0, depth, lines + i * depth);
    }
    int64_t d = 0;
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX2)
    for (; some == TURN && d + TURN <= depth; d += TURN) {
      if (there && ahead && d % 16 == 0)
        for (int64_t i = 0; i < TURN; ++i) __builtin_prefetch(reinterpret_cast<const char*>(line[i] + d) + ahead, 0, 2);
      __m256 out[TURN];
      turn8(line, d, out);
      for (int i = 0; i < TURN; ++i) _mm256_storeu_ps(panel + (d + i) * ld + c, out[i]);
    }
#endif
    for (; d < depth; ++d)
      for (int64_t i = 0; i < some; ++i) panel[d * ld + c + i] = line[i][d];
  }
}

// Few rows read a packed panel about once: where m's rows stand in memory as float32, they are turned in registers and meet them there,
// with the bits of a panel.
constexpr int FEW = 4;
LK_INLINE bool turns(const Matrix& m, int64_t rows, int64_t depth) {
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX2)
  return rows <= FEW && depth % TURN == 0 && m.dtype == DType::f32 && m.col_stride == 1 && !m.col_index && m.row_stride != 1;
#else
  return false;
#endif
}

// sum[i][0] += sum over d < depth of p[i * p_row + d] * m[row0 + 0 ... VL - 1, column0 + d], where turns(); columns from `count` on are not used.
// ahead: pack_turned's
template <int ROWS>
LK_INLINE void accumulate_turned(const float* p, int64_t p_row, const Matrix& m, int64_t row0, int64_t count, int64_t column0, int64_t depth, int64_t ahead, Vec (&sum)[ROWS][1]) {
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX2)
  const float* line[VL];
  for (int64_t c = 0; c < VL; ++c) line[c] = static_cast<const float*>(m.data) + place(m, row0 + smaller(c, count - 1)) * m.row_stride + column0;
  for (int64_t d = 0; d < depth; d += TURN) {
    Vec part[TURN];
    turn(line, d, part);
    if (d % 16 == 0)
      for (int64_t c = 0; c < VL; ++c) __builtin_prefetch(reinterpret_cast<const char*>(line[c] + d) + ahead, 0, 2);
#pragma GCC unroll 8
    for (int k = 0; k < TURN; ++k)
      for (int i = 0; i < ROWS; ++i) sum[i][0] = fma(broadcast(p[i * p_row + d + k]), part[k], sum[i][0]);
  }
#endif
}

template <DType dtype>
static void store_row(const Matrix& m, int64_t row, int64_t column, int64_t count, const float* from, float factor) {
  using E = Element<dtype>;
  typename E::type* to = static_cast<typename E::type*>(m.data) + place(m, row) * m.row_stride + column;
  int64_t c = 0;
  for (; c + VL <= count; c += VL) E::put(to + c, mul(load(from + c), broadcast(factor)));
  if (c < count) {
    float rest[VL] = {};
    typename E::type edge[VL];
    memcpy(rest, from + c, (count - c) * sizeof *rest);
    E::put(edge, mul(load(rest), broadcast(factor)));
    memcpy(to + c, edge, (count - c) * sizeof *to);
  }
}

// m[row, column + c] = factor * from[c], rounded once
static void store_row_any(const Matrix& m, int64_t row, int64_t column, int64_t count, const float* from, float factor) {
  switch (m.dtype) {
    case DType::f32: return store_row<DType::f32>(m, row, column, count, from, factor);
    case DType::bf16: return store_row<DType::bf16>(m, row, column, count, from, factor);
    case DType::f16: return store_row<DType::f16>(m, row, column, count, from, factor);
  }
}

// Row m of y from column n0 on: sums and bias, rounded once
static void store_sums(const Matrix& y, const Matrix& bias, int64_t m, int64_t n0, int64_t columns, float* sums) {
  for (int64_t c = 0; bias.data && c < columns; ++c) sums[c] += load_scalar(bias.data, bias.dtype, (n0 + c) * bias.col_stride);
  store_row_any(y, m, n0, columns, sums, 1.0f);
}

// A thread's scratch for the time of a block (scratch.h).
struct Scratch {
  float* at;
  const int slot;
  Scratch(int slot_, int64_t floats) : at(scratch_take(slot_, floats)), slot(slot_) {}
  ~Scratch() { scratch_give(slot); }
  float* next(int64_t floats) {
    float* here = at;
    at += round_up(floats, 16);
    return here;
  }
};

}  // namespace
}  // namespace lk::cpu
