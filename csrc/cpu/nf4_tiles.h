// An NF4 product on tile registers (tiles.h): x is laid out once in tiles, W is decoded to tiles of bfloat16, rounded once, that stay in the
// first cache while all rows meet them.
//
// x W^T: W is the left operand, so that what is decoded along its rows lies as a tile has it, x's pairs are the right one, and sums are
// turned when they are stored. x W: the depth runs across W's rows, two of which make pairs; W is the right operand.
// A sum runs over the depth in its order: bits depend on K and N alone, not on threads or a row's place.
#pragma once
#ifdef LK_ISA_AMX
#include "nf4_product.h"
#include "pairs.h"
#include "parallel.h"
#include "tiles.h"

namespace lk::cpu {
namespace {

constexpr int64_t ROWS_AT_ONCE = 512;  // rows of x that are laid out at a time at most, for decoding W is paid for each time
constexpr int64_t LAID_OUT = 8 << 20;  // bytes that they may take, for every task reads them: they stay within the last cache
constexpr int64_t CHUNK = 4 * RUN;     // of the depth that is decoded at a time, of a unit of columns
constexpr int64_t STEPS = CHUNK / TILE_DEPTH;
// Bytes of x laid out up to which W's rows are followed along the depth, a unit of columns after the other: x stays within the second cache, W is read as
// it lies, and the sums of two blocks of rows stay in the tiles. Of the time with one thread, 4096 -> 14336: 4 rows 0.70, 16 rows 0.89, 64 rows 0.89;
// 14336 -> 4096: 4 rows 0.60, 16 rows 0.88; 64 rows, x in 1.8 MB, would take 1.04.
constexpr int64_t ALONG = 1 << 20;
constexpr int64_t COLUMNS_MOST = 320;  // of a task
constexpr int64_t COLUMNS_MORE = 24;   // that a task costs beyond its own, about: not measured by itself
constexpr int64_t CHUNK_WORDS = STEPS * TILE_WORDS;

// Columns that are decoded at a time: a RUN where W's rows are the depth; else half of one, whose tiles leave room in the first cache for x's: without
// them in cache 16 rows take 0.77 of the time of a whole one, 64 rows 0.78, 256 rows 0.87.
LK_INLINE int64_t unit_of(const Call& g) { return g.turned ? RUN : RUN / 2; }

// Whether all blocks of W begin with a RUN: then codes are looked up sixteen bits at a time, in the order that they come.
LK_INLINE bool coded(const NF4Weight& w) { return in_runs(w); }

// The elements of a RUN in the order that two vectors of looked-up codes have them: a lane's 16 bits hold elements 4 w + (j ^ 1), j = 0 ... 3.
struct Order {
  alignas(64) uint16_t at[2][2 * VL] = {};
  constexpr Order() {
    for (int v = 0; v < 2; ++v)
      for (int l = 0; l < 2 * VL; ++l) at[v][l] = static_cast<uint16_t>(4 * (l % VL) + ((2 * v + l / VL) ^ 1));
  }
};

// The compiler forgets what v is: else it works with what is the same in all lanes in single ones and spreads the result, or spreads it again each time.
LK_INLINE Vec hidden(Vec v) {
#ifndef LK_AVX512_EMULATION
  asm("" : "+v"(v));
#endif
  return v;
}

// A block's scale in all lanes, rounded as scale_of rounds it
template <bool NESTED>
struct BlockScales {
  const NF4Weight& w;
  Vec offset;
  explicit BlockScales(const NF4Weight& w) : w(w), offset(hidden(broadcast(NESTED ? load_float(w.nested, 0) : 0.0f))) {}
  LK_INLINE Vec of(const BlockScales& s, int64_t block) {
    if (!NESTED) return broadcast(load_float(s.w.absmax, block));
    const Vec second = hidden(broadcast(load_float(s.w.nested, 257 + (block >> s.w.nested_shift))));
    return add(mul(broadcast(load_float(s.w.nested, 1 + s.w.absmax[block])), second), s.offset);
  }
};

// The sixteen values of two blocks as bfloat16
LK_INLINE __m512i values_of(Vec codes, Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh(mul(codes, high), mul(codes, low)); }

// x's tiles: [CHUNK of the depth][block of TILE_ROWS rows][TILE_DEPTH], zeros behind its end and behind the last row.
static void lay_out_tiles(int64_t begin, int64_t end, void* context) {
  const Call& g = *static_cast<const Call*>(context);
  const Matrix& x = g.p->x;
  const int64_t depth = g.turned ? g.p->w.N : g.p->w.K, blocks = g.rows / TILE_ROWS;
  const bool in_order = g.turned || !coded(g.p->w);
  static constexpr Order order;
  const __m512i first = _mm512_load_si512(order.at[0]), second = _mm512_load_si512(order.at[1]);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t run = t / blocks, block = t % blocks, k0 = run * RUN, some = smaller(RUN, depth - k0);
    __m512i low[TILE_ROWS], high[TILE_ROWS];
    for (int64_t r = 0; r < TILE_ROWS; ++r) {
      const int64_t m = g.m0 + block * TILE_ROWS + r;
      const uint16_t* from = static_cast<const uint16_t*>(x.data) + m * x.row_stride + k0 * x.col_stride;
      alignas(64) uint16_t copy[RUN];
      if (m >= g.m1 || some < RUN || x.col_stride != 1) {
        for (int64_t k = 0; k < RUN; ++k) copy[k] = m < g.m1 && k < some ? from[k * x.col_stride] : uint16_t{0};
        from = copy;
      }
      low[r] = _mm512_loadu_si512(from), high[r] = _mm512_loadu_si512(from + 2 * VL);
      if (in_order) continue;
      const __m512i both = _mm512_permutex2var_epi16(low[r], first, high[r]);
      high[r] = _mm512_permutex2var_epi16(low[r], second, high[r]), low[r] = both;
    }
    if (!g.turned) turn_tile(low), turn_tile(high);
    uint32_t* to = g.x + ((k0 / CHUNK * blocks + block) * STEPS + k0 % CHUNK / TILE_DEPTH) * TILE_WORDS;
    for (int64_t r = 0; r < TILE_ROWS; ++r) _mm512_store_si512(to + r * VL, low[r]), _mm512_store_si512(to + TILE_WORDS + r * VL, high[r]);
  }
}

// What is wanted in the second cache next, where columns are met before the depth: some of it is asked for at each product, all at once would keep
// what is wanted now waiting. Codes are, for x W, of which few stand beside each other: a whole CHUNK ahead, ms with two threads, 4096 -> 14336, dx
// of 4 rows 4.2 to 3.1, of 256 13.1 to 11.7. x W^T has long pieces of rows, which decoding asks for.
struct Next {
  const char* x;  // in order
  int64_t x_lines;
  const char* codes = nullptr;  // of rows of W, which lie too far apart for the processor to guess
  int64_t pitch = 0, rows = 0, width = 0, codes_lines = 0, line = 0;
  void want_codes(const NF4Weight& w, int64_t n, int64_t n_count, int64_t k, int64_t k_count, int64_t products) {
    codes = reinterpret_cast<const char*>(w.packed) + (n * w.K + k) / 2;
    pitch = w.K / 2, rows = n_count, width = ceil_div(k_count / 2, 64), codes_lines = ceil_div(rows * width, products);
  }
  __attribute__((always_inline)) void bring() {
    for (int64_t i = 0; i < x_lines; ++i, x += 64) __builtin_prefetch(x, 0, 2);
    for (int64_t i = 0; i < codes_lines && rows; ++i) {
      __builtin_prefetch(codes + 64 * line, 0, 2);
      if (++line == width) line = 0, codes += pitch, --rows;
    }
  }
};

// Where the sums of tiles are before and after a product: as they were left in the registers, where nobody else's came between, or in memory.
enum class Sums { NONE, KEPT, STORED };

// Sums of LEFT x RIGHT tiles += `steps` products, whose tiles lie behind each other in their blocks.
template <int LEFT, int RIGHT>
LK_INLINE void meet_tiles(const uint32_t* a, const uint32_t* b, int64_t steps, Sums before, Sums after, float* sums, int64_t sums_block, Next& next) {
  if (before == Sums::STORED) {
    load_tile<0>(sums);
    if (RIGHT > 1) load_tile<1>(sums + TILE_FLOATS);
    if (LEFT > 1) load_tile<2>(sums + sums_block);
    if (LEFT > 1 && RIGHT > 1) load_tile<3>(sums + sums_block + TILE_FLOATS);
  } else if (before == Sums::NONE) {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  }
  for (int64_t s = 0; s < steps; ++s, a += TILE_WORDS, b += TILE_WORDS) {
    load_tile<4>(a), load_tile<6>(b);
    dot<0, 4, 6>();
    if (RIGHT > 1) load_tile<7>(b + CHUNK_WORDS), dot<1, 4, 7>();
    if (LEFT > 1) load_tile<5>(a + CHUNK_WORDS), dot<2, 5, 6>();
    if (LEFT > 1 && RIGHT > 1) dot<3, 5, 7>();
    next.bring();
  }
  if (after != Sums::STORED) return;
  store_tile<0>(sums);
  if (RIGHT > 1) store_tile<1>(sums + TILE_FLOATS);
  if (LEFT > 1) store_tile<2>(sums + sums_block);
  if (LEFT > 1 && RIGHT > 1) store_tile<3>(sums + sums_block + TILE_FLOATS);
}

// All of a's blocks with all of b's: sums[block of a][block of b].
static void meet_all(const uint32_t* a, int64_t a_blocks, const uint32_t* b, int64_t b_blocks, int64_t steps, Sums before, Sums after, float* sums, int64_t sums_block, Next& next) {
  for (int64_t j = 0; j < b_blocks; j += 2)
    for (int64_t i = 0; i < a_blocks; i += 2) {
      const auto meet = i + 1 < a_blocks ? (j + 1 < b_blocks ? meet_tiles<2, 2> : meet_tiles<2, 1>) : (j + 1 < b_blocks ? meet_tiles<1, 2> : meet_tiles<1, 1>);
      meet(a + i * CHUNK_WORDS, b + j * CHUNK_WORDS, steps, before, after, sums + i * sums_block + j * TILE_FLOATS, sums_block, next);
    }
}

LK_INLINE __m512i lookup(__m512i words, __m512i shift, __m512i values) { return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shift), values); }

// A RUN of looked-up codes, whose values are the same in both halves
LK_INLINE void decode_codes(const uint8_t* packed, __m512i values, const __m512i (&shifts)[2], uint32_t* to) {
  const __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  _mm512_store_si512(to, lookup(words, shifts[0], values)), _mm512_store_si512(to + TILE_WORDS, lookup(words, shifts[1], values));
}

// Tiles [block of rows of W][step] of rows n0 ... n0 + columns, anything behind the last, whose sums nobody asks for: k0 ... k0 + depth of each, and zeros
// up to a RUN. ahead: bytes of W from here to what is decoded next, which is brought in.
template <bool NESTED>
static void decode_coded_rows(const NF4Weight& w, Vec codes, int64_t n0, int64_t columns, int64_t k0, int64_t depth, int64_t ahead, uint32_t* panel) {
  const __m512i shifts[2] = {_mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1), _mm512_inserti64x4(_mm512_set1_epi16(8), _mm256_set1_epi16(12), 1)};
  const BlockScales<NESTED> scales(w);
  const int shift = w.block_shift;
  int64_t first = n0 * w.K + k0;
  for (int64_t n = 0; n < columns; ++n, first += w.K) {
    uint32_t* to = panel + n / TILE_ROWS * CHUNK_WORDS + n % TILE_ROWS * VL;
    const uint8_t* packed = w.packed + (first >> 1);
    for (int64_t at = 0; at < CHUNK / 2; at += 64) __builtin_prefetch(packed + ahead + at, 0, 2);
    const auto scale = [&](int64_t k) __attribute__((always_inline)) { return BlockScales<NESTED>::of(scales, (first + k) >> shift); };
    int64_t k = 0;
    for (; k + 2 * RUN <= depth; k += 2 * RUN, packed += RUN, to += 4 * TILE_WORDS) {  // one rounding for two blocks, for it takes half of a RUN's time
      const __m512i both = values_of(codes, scale(k), scale(k + RUN));
      decode_codes(packed, _mm512_shuffle_i32x4(both, both, 0x44), shifts, to);
      decode_codes(packed + RUN / 2, _mm512_shuffle_i32x4(both, both, 0xee), shifts, to + 2 * TILE_WORDS);
    }
    if (k < depth) decode_codes(packed, values_of(codes, scale(k), scale(k)), shifts, to);
  }
}

static void decode_rows(const NF4Weight& w, const Decoder& decoder, int64_t n0, int64_t columns, int64_t k0, int64_t depth, int64_t ahead, uint32_t* panel) {
  if (coded(w)) return (w.nested ? decode_coded_rows<true> : decode_coded_rows<false>)(w, decoder.codes, n0, columns, k0, depth, ahead, panel);
  for (int64_t n = 0; n < columns; ++n) {
    uint32_t* to = panel + n / TILE_ROWS * CHUNK_WORDS + n % TILE_ROWS * VL;
    alignas(64) uint16_t line[CHUNK];
    decode_run_bf16(w, decoder, (n0 + n) * w.K + k0, depth, line);
    memset(line + depth, 0, (round_up(depth, RUN) - depth) * sizeof *line);
    for (int64_t k = 0; k < round_up(depth, RUN); k += TILE_DEPTH, to += TILE_WORDS) _mm512_store_si512(to, _mm512_load_si512(line + k));
  }
}

// Sixteen words of two rows between each other
struct Zipped {
  alignas(64) uint16_t at[2 * VL] = {};
  constexpr Zipped() {
    for (int l = 0; l < 2 * VL; ++l) at[l] = static_cast<uint16_t>(l / 2 + l % 2 * VL);
  }
};

// Tiles [block of columns][step], pairs of W's rows n0 ... n0 + depth, zeros behind the last up to a RUN: of a RUN of columns from k0, which makes
// four blocks. Of looked-up codes block j has columns 4 w + (j ^ 1), else zip's order holds for two and two.
template <bool NESTED>
static void decode_coded_pairs(const NF4Weight& w, Vec codes, int64_t n0, int64_t depth, int64_t k0, uint32_t* panel) {
  static constexpr Zipped zipped;
  const __m512i zip_words = _mm512_load_si512(zipped.at), code = _mm512_set1_epi16(15);
  const __m512i odd = _mm512_castps_si512(hidden(_mm512_castsi512_ps(_mm512_set1_epi32(0x100000))));
  const BlockScales<NESTED> scales(w);
  const int shift = w.block_shift;
  for (int64_t n = 0; n < depth; n += 2) {
    uint32_t* to = panel + n / TILE_DEPTH * TILE_WORDS + n % TILE_DEPTH / 2 * VL;
    const int64_t first = (n0 + n) * w.K + k0, second = n + 1 < depth ? first + w.K : first;  // where there is none x has zeros
    const auto words_of = [&](int64_t at) __attribute__((always_inline)) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.packed + (at >> 1))); };
    const __m512i words = _mm512_permutexvar_epi16(zip_words, _mm512_inserti64x4(_mm512_castsi256_si512(words_of(first)), words_of(second), 1));
    const __m512i values = values_of(codes, BlockScales<NESTED>::of(scales, first >> shift), BlockScales<NESTED>::of(scales, second >> shift));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i index = _mm512_ternarylogic_epi32(j == 0 ? words : _mm512_srli_epi16(words, 4 * j), code, odd, 0xea);  // (words & code) | odd
      _mm512_store_si512(to + j * CHUNK_WORDS, _mm512_permutexvar_epi16(index, values));
    }
  }
}

static void decode_pairs(const NF4Weight& w, const Decoder& decoder, int64_t n0, int64_t depth, int64_t k0, int64_t columns, uint32_t* panel) {
  if (coded(w)) (w.nested ? decode_coded_pairs<true> : decode_coded_pairs<false>)(w, decoder.codes, n0, depth, k0, panel);
  for (int64_t n = coded(w) ? round_up(depth, 2) : 0; n < round_up(depth, RUN); n += 2) {
    uint32_t* to = panel + n / TILE_DEPTH * TILE_WORDS + n % TILE_DEPTH / 2 * VL;
    alignas(64) uint16_t line[2][RUN] = {};
    if (n < depth) decode_run_bf16(w, decoder, (n0 + n) * w.K + k0, columns, line[0]);
    if (n + 1 < depth) decode_run_bf16(w, decoder, (n0 + n + 1) * w.K + k0, columns, line[1]);
    for (int64_t c = 0; c < RUN; c += 2 * VL, to += 2 * CHUNK_WORDS) {
      const Two two = zip(line[0] + c, line[1] + c, ~0u);
      store(reinterpret_cast<float*>(to), two.low), store(reinterpret_cast<float*>(to + CHUNK_WORDS), two.high);
    }
  }
}

// A row's RUN of sums in the order of its columns, from the four blocks of decode_pairs
LK_INLINE void in_columns(const float* from, bool codes, float* to) {
  Vec v[4];
  for (int j = 0; j < 4; ++j) v[j] = load(from + j * TILE_FLOATS);
  if (!codes) {
    for (int j = 0; j < 4; j += 2) {
      const Two two = in_order(v[j], v[j + 1]);
      store(to + j * VL, two.low), store(to + (j + 1) * VL, two.high);
    }
    return;
  }
  const Vec a = _mm512_unpacklo_ps(v[1], v[0]), b = _mm512_unpackhi_ps(v[1], v[0]), c = _mm512_unpacklo_ps(v[3], v[2]), d = _mm512_unpackhi_ps(v[3], v[2]);
  const auto pairs = [](Vec p, Vec q, bool high) __attribute__((always_inline)) {
    const __m512i x = _mm512_castps_si512(p), y = _mm512_castps_si512(q);
    return high ? _mm512_unpackhi_epi64(x, y) : _mm512_unpacklo_epi64(x, y);
  };
  __m512i quad[4] = {pairs(a, c, false), pairs(a, c, true), pairs(b, d, false), pairs(b, d, true)};  // 128 bits i of quad[q]: columns 16 i + 4 q ...
  const __m512i e = _mm512_shuffle_i32x4(quad[0], quad[1], 0x44), f = _mm512_shuffle_i32x4(quad[2], quad[3], 0x44), g = _mm512_shuffle_i32x4(quad[0], quad[1], 0xee), h = _mm512_shuffle_i32x4(quad[2], quad[3], 0xee);
  const __m512i out[4] = {_mm512_shuffle_i32x4(e, f, 0x88), _mm512_shuffle_i32x4(e, f, 0xdd), _mm512_shuffle_i32x4(g, h, 0x88), _mm512_shuffle_i32x4(g, h, 0xdd)};
  for (int i = 0; i < 4; ++i) store(to + i * VL, _mm512_castsi512_ps(out[i]));
}

// y's columns c0 ... c0 + columns from their sums. out: scratch for TILE_ROWS rows of them
static void store_columns(const Call& g, int64_t c0, int64_t columns, const float* sums, float* out) {
  const int64_t blocks = g.rows / TILE_ROWS, wide = round_up(columns, g.turned ? RUN : TILE_ROWS) / TILE_ROWS;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t m0 = g.m0 + block * TILE_ROWS, rows = smaller(TILE_ROWS, g.m1 - m0);
    for (int64_t c = 0; !g.turned && c < wide; ++c) {
      __m512i tile[TILE_ROWS];
      for (int64_t r = 0; r < TILE_ROWS; ++r) tile[r] = _mm512_load_si512(sums + (c * blocks + block) * TILE_FLOATS + r * VL);
      turn_tile(tile);
      for (int64_t r = 0; r < TILE_ROWS; ++r) _mm512_store_si512(out + r * g.wide + c * VL, tile[r]);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; g.turned && c < wide; c += 4) in_columns(sums + (block * wide + c) * TILE_FLOATS + r * VL, coded(g.p->w), out + r * g.wide + c * VL);
      store_sums(g.p->lowrank.y, g.p->bias, m0 + r, c0, columns, out + r * g.wide);
    }
  }
}

// Where a thread is: at column c of task `task`, at d of the depth
struct Place {
  int64_t task, c, d;
};

static void tile_tasks(int64_t begin, int64_t end, void* context) {
  const Call& g = *static_cast<const Call*>(context);
  const NF4Weight& w = g.p->w;
  const int64_t depth = g.turned ? w.N : w.K, blocks = g.rows / TILE_ROWS;
  const Decoder decoder;
  const int64_t unit = unit_of(g), panel_words = unit / TILE_ROWS * CHUNK_WORDS;
  Scratch scratch(WORKER, panel_words + g.rows * g.wide + g.wide * TILE_ROWS + 64);
  uint32_t* panel = reinterpret_cast<uint32_t*>(scratch.next(panel_words));
  float *sums = scratch.next(g.rows * g.wide), *out = scratch.next(g.wide * TILE_ROWS);
  const bool along = !g.turned && 2 * g.rows * depth <= ALONG, kept = along && blocks <= 2;
  const auto columns_of = [&](int64_t task) { return smaller(g.wide, g.columns - task * g.wide); };
  const auto after = [&](Place at) {
    const int64_t columns = columns_of(at.task);
    int64_t &inner = along ? at.d : at.c, &outer = along ? at.c : at.d;
    if ((inner += along ? CHUNK : unit) < (along ? depth : columns)) return at;
    if (inner = 0, (outer += along ? unit : CHUNK) < (along ? columns : depth)) return at;
    return Place{at.task + 1, 0, 0};
  };
  const auto code = [&](const Place& at) { return ((at.task * g.wide + at.c) * w.K + at.d) / 2; };
  Next next = {nullptr, 0};
  const Tiles tiles;
  for (Place at = {begin, 0, 0}; at.task < end;) {
    const Place next_place = after(at);
    const int64_t c0 = at.task * g.wide, columns = columns_of(at.task), count = smaller(unit, columns - at.c), count_blocks = ceil_div(g.turned ? unit : count, TILE_ROWS);
    const int64_t some = smaller(CHUNK, depth - at.d), steps = round_up(some, RUN) / TILE_DEPTH;
    const bool first = at.d == 0, last = at.d + CHUNK >= depth;
    const uint32_t* x = g.x + at.d / CHUNK * blocks * CHUNK_WORDS;
    if (!along && at.c == 0) {  // while the columns meet this CHUNK, the next
      const int64_t products = ceil_div(columns, unit) * ceil_div(blocks, 2) * (unit / TILE_ROWS / 2) * steps;
      next = {reinterpret_cast<const char*>(last ? g.x : x + blocks * CHUNK_WORDS), ceil_div(blocks * CHUNK_WORDS * 4 / 64, products)};
      const int64_t next_c = last ? c0 + g.wide : c0, next_d = last ? 0 : at.d + CHUNK;
      if (g.turned && next_c < g.columns) next.want_codes(w, next_d, smaller(CHUNK, depth - next_d), next_c, smaller(g.wide, g.columns - next_c), products);
    }
    const Sums before = first ? Sums::NONE : kept ? Sums::KEPT : Sums::STORED, behind = kept && !last ? Sums::KEPT : Sums::STORED;
    if (g.turned) {
      decode_pairs(w, decoder, at.d, some, c0 + at.c, count, panel);
      meet_all(x, blocks, panel, count_blocks, steps, before, behind, sums + at.c * TILE_ROWS, round_up(columns, RUN) * TILE_ROWS, next);
    } else {
      decode_rows(w, decoder, c0 + at.c, count, at.d, some, next_place.task < end ? code(next_place) - code(at) : 0, panel);
      meet_all(panel, count_blocks, x, blocks, steps, before, behind, sums + at.c * g.rows, blocks * TILE_FLOATS, next);
    }
    if (next_place.task != at.task) store_columns(g, c0, columns, sums, out);
    at = next_place;
  }
}

// How wide tasks are: threads take equal counts of them, so of the widths that leave the busiest thread the least to do, the widest.
static int64_t columns_of_task(int64_t columns) {
  int64_t best = 0, least = 0;
  for (int64_t wide = RUN; wide <= COLUMNS_MOST; wide += RUN) {
    const int64_t time = ceil_div(ceil_div(columns, wide), threads()) * (wide + COLUMNS_MORE);
    if (!best || time <= least) best = wide, least = time;
  }
  return best;
}

static void product_in_tiles(Call g) {
  const NF4Weight& w = g.p->w;
  const int64_t M = g.p->lowrank.M, runs = ceil_div(g.turned ? w.N : w.K, RUN);
  g.wide = columns_of_task(g.columns);
  const int64_t most = smaller(ROWS_AT_ONCE, larger(LAID_OUT / (2 * RUN * runs) / TILE_ROWS * TILE_ROWS, 8 * TILE_ROWS));
  const int64_t at_once = round_up(ceil_div(M, larger(1, ceil_div(M, most))), TILE_ROWS);
  for (g.m0 = 0; g.m0 < M; g.m0 += at_once) {
    g.m1 = smaller(M, g.m0 + at_once), g.rows = round_up(g.m1 - g.m0, TILE_ROWS);
    Scratch scratch(CALLER, ceil_div(runs * RUN, CHUNK) * CHUNK / 2 * g.rows);
    g.x = reinterpret_cast<uint32_t*>(scratch.at);
    parallel_for(runs * (g.rows / TILE_ROWS), runs * RUN * g.rows, lay_out_tiles, &g);
    parallel_for(ceil_div(g.columns, g.wide), g.rows * w.N * w.K, tile_tasks, &g);
  }
}

}  // namespace
}  // namespace lk::cpu
#endif
