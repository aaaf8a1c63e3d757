// An NF4 product in pairs of bfloat16 (AVX-512-BF16): x is laid out once for the dot product, tiles of W are decoded as pairs along the
// depth.
#pragma once
#if defined(LK_ISA_AVX512BF16) && !defined(LK_ISA_AMX)
#include "nf4_product.h"
#include "pairs.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

constexpr int64_t SIDE = 2 * VL;    // columns that a panel has
constexpr int64_t ROWS_AT_ONCE = 512;     // rows of x that are laid out at a time at most, for decoding W is paid for each time
constexpr int64_t LAID_OUT = 8 << 20;     // bytes that they may take, for every task reads them: they stay within the last cache
constexpr int64_t DEEP = 4 * RUN;  // of the depth that a panel has at most
constexpr int64_t LINE = 64, LINE_CODES = 2 * LINE;
constexpr int64_t CODES_AHEAD = 512;  // that a row is brought into the second cache before they are needed
// rows of x that meet a panel at once: on a Zen 5 0.90 of the time of six, from 8 rows to 256; x is filled up to whole REST with zeros
constexpr int SOME_ROWS = 8, REST = 2;

// x as pairs of the depth: for each RUN of it the rows in groups, a group's pairs side by side. Of each 8 neighbours pair j is (2 j, 2 j + 1),
// or, where W's codes come in another order (decode_lines), (j ^ 1, 4 + (j ^ 1)).
static void lay_out_pairs(int64_t begin, int64_t end, void* context) {
  const Call& g = *static_cast<const Call*>(context);
  const Matrix& x = g.p->x;
  const int64_t depth = g.turned ? g.p->w.N : g.p->w.K;
  for (int64_t run = begin; run < end; ++run)
    for (int64_t m = 0; m < g.rows; m += REST) {
      const int64_t k0 = run * RUN, some = smaller(RUN, depth - k0);
      const uint16_t* line[REST];
      uint16_t copy[REST][RUN];
      for (int64_t r = 0; r < REST; ++r) {
        const uint16_t* from = static_cast<const uint16_t*>(x.data) + (g.m0 + m + r) * x.row_stride + k0 * x.col_stride;
        line[r] = g.m0 + m + r < g.m1 && x.col_stride == 1 && some == RUN ? from : copy[r];
        if (line[r] == copy[r])
          for (int64_t k = 0; k < RUN; ++k) copy[r][k] = g.m0 + m + r < g.m1 && k < some ? from[k * x.col_stride] : uint16_t{0};
      }
      const int64_t group = m / SOME_ROWS * SOME_ROWS, wide = smaller(SOME_ROWS, g.rows - group);
      uint32_t* to = g.x + run * (RUN / 2) * g.rows + RUN / 2 * group + (m - group);
      for (int64_t k = 0; k < RUN; k += 8, to += 4 * wide) {
        __m128i pairs[REST];
        for (int64_t r = 0; r < REST; ++r) {
          const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line[r] + k));
          pairs[r] = g.turned ? eight : _mm_shuffle_epi32(_mm_unpacklo_epi16(eight, _mm_srli_si128(eight, 8)), 0xb1);
        }
        const __m128i low = _mm_unpacklo_epi32(pairs[0], pairs[1]), high = _mm_unpackhi_epi32(pairs[0], pairs[1]);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), low);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + wide), _mm_unpackhi_epi64(low, low));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * wide), high);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 3 * wide), _mm_unpackhi_epi64(high, high));
      }
    }
}

// Lines of W's rows that come after a panel's: which ones, and how far its rows lie apart
struct Coming {
  const uint8_t* first;
  int64_t row;
};

// sums[r][c] += the products of a panel, `count` of the depth, and of x's pairs, whose runs lie x_step apart. Each `depth` of them meets its
// scales[c] once: a multiple of RUN, or half of it. Meanwhile what comes next is asked for, a line at a time: all at once they would wait
// for each other, and the copying of others for them (on a Zen 5 16 rows take 0.87 to 0.91 of the time).
template <int ROWS, bool AHEAD>
static void meet_group(const uint32_t* panel, const uint32_t* x, int64_t x_step, int64_t count, int64_t depth, const float* scales, float* sums, Coming coming) {
  Vec sum[ROWS][2];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) sum[r][0] = load(sums + r * SIDE), sum[r][1] = load(sums + r * SIDE + VL);
  for (int64_t k = 0; k < count; k += depth, scales += SIDE) {
    Vec part[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) part[r][0] = part[r][1] = zero();
    const int64_t end = smaller(count, k + depth);
    for (int64_t at = k; at < end; at += RUN) {
      const uint32_t* pairs = x + at / RUN * x_step + at % RUN / 2 * ROWS;
      const uint8_t* line = coming.first + at / LINE_CODES * LINE + at % LINE_CODES * SIDE / LINE_CODES * coming.row;
      for (int64_t left = smaller(RUN, end - at) / 2; left; --left, panel += SIDE, pairs += ROWS) {
        if (AHEAD && left % 2 == 0) __builtin_prefetch(line, 0, 2), line += coming.row;
        const __m512i low = _mm512_loadu_si512(panel), high = _mm512_loadu_si512(panel + VL);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[r]));
          part[r][0] = _mm512_dpbf16_ps(part[r][0], (__m512bh)low, pair);
          part[r][1] = _mm512_dpbf16_ps(part[r][1], (__m512bh)high, pair);
        }
      }
    }
    const Vec low = load(scales), high = load(scales + VL);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sum[r][0] = fma(low, part[r][0], sum[r][0]), sum[r][1] = fma(high, part[r][1], sum[r][1]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) store(sums + r * SIDE, sum[r][0]), store(sums + r * SIDE + VL, sum[r][1]);
}

template <bool AHEAD>
static auto group_of(int64_t rows) {
  return rows == 8 ? meet_group<8, AHEAD> : rows == 6 ? meet_group<6, AHEAD> : rows == 4 ? meet_group<4, AHEAD> : meet_group<2, AHEAD>;
}

// All of x's rows with a panel: `count` of the depth from k0 on.
static void meet_panel(const Call& g, const uint32_t* panel, int64_t k0, int64_t count, int64_t depth, const float* scales, float* sums, Coming coming = {}) {
  const int64_t x_step = RUN / 2 * g.rows;
  for (int64_t m = 0; m < g.rows; m += SOME_ROWS) {
    const int64_t wide = smaller(SOME_ROWS, g.rows - m);
    const auto meet_rows = m || !coming.first ? group_of<false>(wide) : group_of<true>(wide);
    meet_rows(panel, g.x + k0 / RUN * x_step + RUN / 2 * m, x_step, count, depth, scales, sums + m * SIDE, coming);
  }
}

// x W^T: the depth runs along W's rows. A task owns SIDE columns, which are rows of W. Of each it takes 128 codes, a cache line, at a time.
// Turned in registers, a vector's lane has four bytes of its row, 8 codes; words that are shifted by 4 j index the codes j ^ 1 and
// 4 + (j ^ 1), a pair for a dot product. A block's sum runs over the codes alone and meets its columns' scales once.

// panel[d][0 ... 15]: 16 pairs of each of 16 rows of W, whose 16 bytes stand in lines
LK_INLINE void decode_lines(const Pairs& pairs, const uint8_t* lines, uint32_t* panel) {
  const auto four_rows = [&](int64_t r) __attribute__((always_inline)) {
    const auto bytes = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines + (r + i) * LINE)); };
    __m512i rows = _mm512_castsi128_si512(bytes(0));
    rows = _mm512_mask_broadcast_i32x4(rows, 0x00f0, bytes(4));
    rows = _mm512_mask_broadcast_i32x4(rows, 0x0f00, bytes(8));
    return _mm512_mask_broadcast_i32x4(rows, 0xf000, bytes(12));
  };
  const __m512i a = four_rows(0), b = four_rows(1), c = four_rows(2), d = four_rows(3);
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d), AB = _mm512_unpackhi_epi32(a, b), CD = _mm512_unpackhi_epi32(c, d);
  const __m512i words[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd), _mm512_unpacklo_epi64(AB, CD), _mm512_unpackhi_epi64(AB, CD)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // the high half of a product is a shift that leaves the units for permutations to them
      const __m512i index = j == 0 ? words[i] : _mm512_mulhi_epu16(words[i], _mm512_set1_epi16(static_cast<short>(1 << (16 - 4 * j))));
      _mm512_storeu_si512(panel + (4 * i + j) * SIDE, _mm512_permutexvar_epi16(index, pairs.table));
    }
}

// scales[run][c] of a task's columns, `depth` codes, 32 or 64, to a run: they are of one block
static void lay_out_scales(const NF4Weight& w, int64_t n0, int64_t columns, int64_t depth, float* __restrict scales) {
  const int64_t runs = w.K / depth;
  const int shift = w.block_shift - (depth == RUN ? RUN_SHIFT : RUN_SHIFT - 1);
  for (int64_t c = 0; c < columns; ++c) {
    float* to = scales + c;
    for (int64_t i = 0, first = (n0 + c) * runs; i < runs;) {
      const int64_t block = (first + i) >> shift;
      if (!w.nested) {
        to[i++ * SIDE] = load_float(w.absmax, block);
        continue;
      }
      const int64_t second = block >> w.nested_shift, stop = smaller(runs, ((second + 1) << w.nested_shift << shift) - first);
      const float factor = load_float(w.nested, 257 + second), offset = load_float(w.nested, 0);
      for (; i < stop; ++i) to[i * SIDE] = load_float(w.nested, 1 + w.absmax[(first + i) >> shift]) * factor + offset;
    }
  }
}

static void pair_tasks(int64_t begin, int64_t end, void* context) {
  const Call& g = *static_cast<const Call*>(context);
  const NF4Linear& p = *g.p;
  const int64_t K = p.w.K, row = K / 2, depth = smaller(RUN, int64_t{1} << p.w.block_shift);
  const Pairs pairs;
  Scratch scratch(WORKER, (K / depth + g.rows) * SIDE);
  float *scales = scratch.next(K / depth * SIDE), *sums = scratch.next(g.rows * SIDE);
  memset(scales, 0, sizeof(float) * K / depth * SIDE);
  alignas(64) uint8_t lines[SIDE * LINE] = {};
  alignas(64) uint32_t panel[DEEP / 2 * SIDE];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n0 = t * SIDE, columns = smaller(SIDE, p.w.N - n0);
    const uint8_t* packed = p.w.packed + n0 * row;
    lay_out_scales(p.w, n0, columns, depth, scales);
    memset(sums, 0, sizeof(float) * g.rows * SIDE);
    for (int64_t k0 = 0; k0 < K; k0 += DEEP) {
      const int64_t count = smaller(DEEP, K - k0);
      for (int64_t line = 0; line < count; line += LINE_CODES) {
        const int64_t at = k0 + line, codes = smaller(LINE_CODES, K - at);
        for (int64_t c = 0; c < columns; ++c) {
          const uint8_t* from = packed + c * row + at / 2;
          codes == LINE_CODES ? memcpy(lines + c * LINE, from, LINE) : memcpy(lines + c * LINE, from, RUN / 2);
        }
        for (int64_t k = 0; k < codes; k += 32)
          for (int64_t c = 0; c < SIDE; c += VL) decode_lines(pairs, lines + c * LINE + k / 2, panel + (line + k) / 2 * SIDE + c);
      }
      const int64_t later = k0 + CODES_AHEAD;
      meet_panel(g, panel, k0, count, depth, scales + k0 / depth * SIDE, sums, {packed + (later < K ? later : SIDE * K + later - K) / 2, row});  // behind a row's end: the next task's
    }
    for (int64_t m = g.m0; m < g.m1; ++m) store_sums(p.lowrank.y, p.bias, m, n0, columns, sums + (m - g.m0) * SIDE);
  }
}

// x W: the depth runs across W's rows. A scale holds for a block of columns of one row, so values meet theirs where they are decoded, rounded
// once to bfloat16.
// panels[c / SIDE][d][c % SIDE, in zip's order]: columns k0.. of rows n0.. of W, two rows to a pair
static void decode_panels(const NF4Weight& w, const Decoder& decoder, int64_t n0, int64_t depth, int64_t k0, int64_t columns, uint32_t* panels) {
  uint16_t line[2][WIDE] = {};
  for (int64_t n = 0; n < DEEP; n += 2, panels += SIDE) {
    for (int64_t i = 0; i < 2; ++i) {
      prefetch_codes(w, n0 + n + i, k0);
      if (n + i < depth)
        decode_run_bf16(w, decoder, (n0 + n + i) * w.K + k0, columns, line[i]);
      else
        memset(line[i], 0, sizeof line[i]);
    }
    for (int64_t c = 0; c < columns; c += SIDE) {
      const Two both = zip(line[0] + c, line[1] + c, ~0u);
      float* to = reinterpret_cast<float*>(panels + c * (DEEP / 2));
      store(to, both.low), store(to + VL, both.high);
    }
  }
}

static void turned_pair_tasks(int64_t begin, int64_t end, void* context) {
  const Call& g = *static_cast<const Call*>(context);
  const NF4Linear& p = *g.p;
  const Decoder decoder;
  float ones[SIDE];
  for (float& one : ones) one = 1.0f;
  Scratch scratch(WORKER, DEEP / 2 * WIDE + g.rows * WIDE + WIDE);
  uint32_t* panels = reinterpret_cast<uint32_t*>(scratch.next(DEEP / 2 * WIDE));
  float *sums = scratch.next(g.rows * WIDE), *out = scratch.next(WIDE);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t k0 = t * g.wide, columns = smaller(g.wide, p.w.K - k0);
    memset(sums, 0, sizeof(float) * g.rows * WIDE);
    for (int64_t n0 = 0; n0 < p.w.N; n0 += DEEP) {
      decode_panels(p.w, decoder, n0, p.w.N - n0, k0, columns, panels);
      const int64_t depth = smaller(DEEP, round_up(p.w.N - n0, RUN));
      for (int64_t c = 0; c < columns; c += SIDE) meet_panel(g, panels + c * (DEEP / 2), n0, depth, DEEP, ones, sums + c * g.rows);
    }
    for (int64_t m = g.m0; m < g.m1; ++m) {
      for (int64_t c = 0; c < columns; c += SIDE) {
        const float* from = sums + c * g.rows + (m - g.m0) * SIDE;
        const Two both = in_order(load(from), load(from + VL));
        store(out + c, both.low), store(out + c + VL, both.high);
      }
      store_sums(p.lowrank.y, p.bias, m, k0, columns, out);
    }
  }
}

// Of a product whose blocks of W begin with a RUN, or that is turned: all of it.
static void product_in_pairs(Call g) {
  const NF4Weight& w = g.p->w;
  const int64_t M = g.p->lowrank.M, runs = ceil_div(g.turned ? w.N : w.K, RUN);
  if (!g.turned) g.wide = SIDE;
  const int64_t at_once = smaller(ROWS_AT_ONCE, larger(LAID_OUT / (2 * RUN * runs) / SOME_ROWS * SOME_ROWS, 16 * SOME_ROWS));
  for (g.m0 = 0; g.m0 < M; g.m0 += at_once) {
    g.m1 = smaller(M, g.m0 + at_once), g.rows = round_up(g.m1 - g.m0, REST);
    Scratch scratch(CALLER, runs * (RUN / 2) * g.rows);
    g.x = reinterpret_cast<uint32_t*>(scratch.at);
    parallel_for(runs, runs * RUN * g.rows, lay_out_pairs, &g);
    parallel_for(ceil_div(g.columns, g.wide), g.rows * w.N * w.K, g.turned ? turned_pair_tasks : pair_tasks, &g);
  }
}

}  // namespace
}  // namespace lk::cpu
#endif
