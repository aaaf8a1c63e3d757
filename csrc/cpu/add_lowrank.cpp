// y += scaling * (drop'(u v^T) + bias). Compiled once per instruction set (CMakeLists.txt), see vec.h.
//
// A task is a block of rows by a block of columns. It packs its columns of v once, as float32 or pairs, column-major within the
// block, so that any stride and dtype of v meets the same inner loop, then walks its rows in groups of four: twelve
// accumulators stay in registers while y is read and written once. Of few rows nothing is packed. A sum runs over r = 0..R-1
// in that order whatever the blocking, so the bits do not depend on the number of threads or on a row's place.
#include "kernels.h"
#include "pairs.h"
#include "parallel.h"
#include "thin_tiles.h"

namespace lk::cpu {
namespace {

constexpr int ROWS = 4, VECS = 3;              // register tile: 4 rows x 3 vectors
constexpr int64_t TILE = VECS * VL;            // columns of a register tile
// packed v of a task: 96 KiB, within the second-level cache; with AVX2 24 KiB, within the first: 0.93 to 0.97 of the time at r = 64 on a Zen 3
constexpr int64_t PANEL_FLOATS = (VL == 8 ? 6 : 24) * 1024;
constexpr int64_t COLUMNS_MAX = 10 * 48;       // a multiple of every TILE (12, 24, 48)
constexpr int64_t COLUMNS_FEW = 4 * 48;        // of few rows, which wait for the packing: it stays within the first cache
constexpr int64_t KEEP_LD = COLUMNS_MAX + DRAW;
constexpr int64_t BLOCK_ROWS = 128;            // enough rows to pay for the packing
constexpr int64_t AHEAD_BYTES = 8192;          // that v is brought in before it is turned

// y += what sum_up(sum) sums, in some rows and vecs vectors of columns from n0 + c0 on, of which `valid` - c0 are y's. ahead: as many
// rows come next.
template <DType dtype, int rows, int vecs, bool dropout, class SumUp>
LK_INLINE void tile(const AddLowrank& p, int64_t m, int64_t n0, int64_t c0, int64_t valid, const float* bias, const int16_t* keep, bool ahead, SumUp sum_up) {
  using Type = typename Element<dtype>::type;
  constexpr int64_t COLUMNS = vecs * VL;
  const auto columns_of = [&](int64_t row) { return static_cast<Type*>(p.y.data) + place(p.y, row) * p.y.row_stride + n0 + c0; };
  const bool whole = c0 + COLUMNS <= valid;
  Type *y[rows], edge[rows][COLUMNS];
  for (int i = 0; i < rows; ++i) {
    y[i] = columns_of(m + i);
    if (ahead) {
      const char* next = reinterpret_cast<const char*>(columns_of(m + rows + i));
      for (int64_t b = 0; b < COLUMNS * static_cast<int64_t>(sizeof(Type)); b += 64) __builtin_prefetch(next + b);
    }
    if (!whole) {
      memset(edge[i], 0, sizeof edge[i]);
      memcpy(edge[i], y[i], (valid - c0) * sizeof(Type));
      y[i] = edge[i];
    }
  }
  Vec sum[rows][vecs];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vecs; ++j) sum[i][j] = zero();
  sum_up(sum);
  const Vec scaling = broadcast(dropout ? p.scaling * p.dropout.scale : p.scaling);
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {  // unrolled, or the sums leave their registers
    Vec result[vecs];
    for (int j = 0; j < vecs; ++j) {
      const Vec part = dropout ? masked(sum[i][j], keep + i * KEEP_LD + c0 + j * VL) : sum[i][j], before = Element<dtype>::get(y[i] + j * VL);
      result[j] = bias ? add(before, fma(scaling, part, load(bias + c0 + j * VL))) : fma(scaling, part, before);
    }
    put_all<dtype>(y[i], result);
  }
  for (int i = 0; !whole && i < rows; ++i) memcpy(columns_of(m + i), edge[i], (valid - c0) * sizeof(Type));
}

// All columns of some rows, from a panel
template <DType dtype, int rows, bool dropout, bool PAIRS>
LK_INLINE void tiles(const AddLowrank& p, View u, int64_t m, int64_t n0, int64_t cols, int64_t valid, const float* panel, const float* bias, const int16_t* keep, bool ahead) {
  for (int64_t c = 0; c < valid; c += TILE)
    tile<dtype, rows, VECS, dropout>(p, m, n0, c, valid, bias, keep, ahead, [&](Vec(&sum)[rows][VECS]) {
      accumulate<rows, VECS, PAIRS>(u.at, u.ld, 1, panel + c, cols, PAIRS ? ceil_div(p.R, 2) : p.R, sum);
    });
}

// The same where turns(v)
template <DType dtype, int rows, bool dropout>
static void turned_tiles(const AddLowrank& p, View u, int64_t m, int64_t n0, int64_t valid, const float* bias, const int16_t* keep) {
  const int64_t ahead = larger(VL * p.v.row_stride * static_cast<int64_t>(sizeof(float)), AHEAD_BYTES);
  for (int64_t c = 0; c < valid; c += VL)
    tile<dtype, rows, 1, dropout>(p, m, n0, c, valid, bias, keep, false, [&](Vec(&sum)[rows][1]) {
      accumulate_turned<rows>(u.at, u.ld, p.v, n0 + c, valid - c, 0, p.R, ahead, sum);
    });
}

#ifdef LK_ISA_AMX

template <int COUNT>
struct Count {
  static constexpr int value = COUNT;
};

// On tiles TERMS is 1, or 2 where the adapter is float32: y is rounded to bfloat16, which the terms' second product does not reach.
constexpr int64_t TILE_COLUMNS = 128, TILE_BLOCK = 256;  // of a task: its tiles, its sums and what it takes of y stay within the first cache
constexpr int64_t SUMS_LD = TILE_COLUMNS + 16;           // an odd number of cache lines

// Of few ranks u's terms lie beside each other in one tile, for each of v's, which lie there twice: two products instead of three.
LK_INLINE bool beside(const AddLowrank& p) { return p.R <= TILE_DEPTH / 2; }
static void put_beside(uint32_t* tiles, bool right) {
  constexpr int64_t HALF = TILE_WORDS / 2;
  for (int t = 0; right && t < 2; ++t) memcpy(tiles + t * TILE_WORDS + HALF, tiles + t * TILE_WORDS, HALF * sizeof *tiles);
  for (int64_t i = 0; !right && i < TILE_ROWS; ++i) memcpy(tiles + i * VL + VL / 2, tiles + TILE_WORDS + i * VL, VL / 2 * sizeof *tiles);
}

template <int C, int TERMS, bool BESIDE>
LK_INLINE void meet_column(const uint32_t* v) {
  load_tile<6>(v);
  if constexpr (TERMS == 2) {
    load_tile<7>(v + TILE_WORDS), dot<C, 4, 7>();
    if (!BESIDE) dot<C, 5, 6>();
  }
  dot<C, 4, 6>();
}

// The first COUNT tiles = TILE_ROWS rows by as many tiles of columns, whose operands lie column_step words apart
template <int COUNT, int TERMS, bool BESIDE>
static void sum_columns(const uint32_t* u, const uint32_t* v, int64_t column_step, int64_t steps) {
  zero_tiles<COUNT>();
  for (int64_t s = 0; s < steps; ++s, u += TERMS * TILE_WORDS, v += TERMS * TILE_WORDS) {
    load_tile<4>(u);
    if (TERMS == 2 && !BESIDE) load_tile<5>(u + TILE_WORDS);
    meet_column<0, TERMS, BESIDE>(v), meet_column<1, TERMS, BESIDE>(v + column_step);
    if constexpr (COUNT > 2) meet_column<2, TERMS, BESIDE>(v + 2 * column_step), meet_column<3, TERMS, BESIDE>(v + 3 * column_step);
  }
}

template <bool dropout, int TERMS>
static void tile_tasks(int64_t begin, int64_t end, void* context) {
  const AddLowrank& p = *static_cast<const AddLowrank*>(context);
  constexpr int64_t SOME = 4 * TILE_ROWS;  // columns that are summed at a time
  constexpr int TILED_ROWS = 4, TILED_VECS = 4;
  // Whether the next rows' products run among these rows' meeting y: the processor does both at once, as far as it looks ahead. With dropout
  // that takes 0.8 of the time; without it there is less to do meanwhile, and it takes 1.1.
  constexpr bool AMONG = dropout;
  const bool narrow = TERMS == 2 && beside(p);
  const int64_t column_blocks = ceil_div(p.N, TILE_COLUMNS), step = rank_words(TERMS, p.R), steps = ceil_div(p.R, TILE_DEPTH);
  Scratch scratch(WORKER, (TILE_COLUMNS + TILE_BLOCK) / TILE_ROWS * step + 2 * TILE_ROWS * SUMS_LD + TILE_COLUMNS + 64);
  uint32_t *panel = reinterpret_cast<uint32_t*>(scratch.next(TILE_COLUMNS / TILE_ROWS * step)), *block_of_u = reinterpret_cast<uint32_t*>(scratch.next(TILE_BLOCK / TILE_ROWS * step));
  int64_t packed = -1;  // the block of rows that is in block_of_u: those of most tasks are the ones before
  float *sums = scratch.next(2 * TILE_ROWS * SUMS_LD), *bias = p.bias.data ? scratch.next(TILE_COLUMNS) : nullptr;
  int16_t keep[TILED_ROWS * KEEP_LD];
  const Tiles tiles;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t m0 = t / column_blocks * TILE_BLOCK, m1 = smaller(m0 + TILE_BLOCK, p.M), n0 = t % column_blocks * TILE_COLUMNS, valid = smaller(TILE_COLUMNS, p.N - n0);
    pack_panel<TERMS>(turned(p.v), 0, p.R, n0, round_up(valid, SOME), valid, true, panel, step);
    for (int64_t c = 0; narrow && c < round_up(valid, SOME); c += TILE_ROWS) put_beside(panel + c / TILE_ROWS * step, true);
    for (int64_t c = 0; bias && c < TILE_COLUMNS; ++c) bias[c] = c < valid ? p.scaling * load_scalar(p.bias.data, p.bias.dtype, (n0 + c) * p.bias.col_stride) : 0.0f;
    for (int64_t m = m0; m0 != packed && m < m1; m += TILE_ROWS) {
      uint32_t* rows_of_u = block_of_u + (m - m0) / TILE_ROWS * step;
      pack_panel<TERMS>(turned(p.u), 0, p.R, m, TILE_ROWS, smaller(TILE_ROWS, m1 - m), false, rows_of_u, step);
      if (narrow) put_beside(rows_of_u, false);
    }
    packed = m0;
    const auto sum_up = [&](auto count, int64_t block, int64_t c) {
      constexpr int COLUMNS = decltype(count)::value;
      (narrow ? sum_columns<COLUMNS, TERMS, true> : sum_columns<COLUMNS, TERMS, false>)(block_of_u + block * step, panel + c / TILE_ROWS * step, step, steps);
    };
    const auto sums_of = [&](int64_t block) { return sums + (AMONG ? block % 2 * TILE_ROWS * SUMS_LD : 0); };
    const auto all_columns = [&](int64_t block) {
      for (int64_t c = 0; c < valid; c += SOME) sum_up(Count<4>(), block, c), store_tiles<4>(sums_of(block) + c, TILE_ROWS, SUMS_LD * sizeof(float));
    };
    if (AMONG) all_columns(0);
    for (int64_t m = m0, block = 0; m < m1; m += TILE_ROWS, ++block) {
      const int64_t rows = smaller(TILE_ROWS, m1 - m);
      const float* mine = sums_of(block);
      const auto rows_from = [&](auto count, int64_t i) __attribute__((always_inline)) {
        constexpr int ROWS_AT_ONCE = decltype(count)::value;
        for (int r = 0; dropout && r < ROWS_AT_ONCE; ++r)
          keep_row(static_cast<uint64_t>(*p.dropout.seed), p.dropout.threshold, place(p.y, m + i + r), n0, valid, keep + r * KEEP_LD);
        for (int64_t c = 0; c < valid; c += SOME)
          tile<DType::bf16, ROWS_AT_ONCE, TILED_VECS, dropout>(p, m + i, n0, c, valid, bias, keep, m + i + 2 * ROWS_AT_ONCE <= m1, [&](Vec(&sum)[ROWS_AT_ONCE][TILED_VECS]) {
            for (int r = 0; r < ROWS_AT_ONCE; ++r)
              for (int j = 0; j < TILED_VECS; ++j) sum[r][j] = load(mine + (i + r) * SUMS_LD + c + j * VL);
          });
      };
      if (!AMONG) all_columns(block);
      int64_t i = 0;
      for (int64_t c = 0; i + TILED_ROWS <= rows; i += TILED_ROWS, c += SOME / 2) {
        const bool more = AMONG && m + TILE_ROWS < m1 && c < valid;
        if (more) sum_up(Count<2>(), block + 1, c);
        rows_from(Count<TILED_ROWS>(), i);
        if (more) store_tiles<2>(sums_of(block + 1) + c, TILE_ROWS, SUMS_LD * sizeof(float));
      }
      for (; i < rows; ++i) rows_from(Count<1>(), i);
    }
  }
}

template <int TERMS>
static void on_tiles(const AddLowrank& p) {
  const int64_t count = ceil_div(p.M, TILE_BLOCK) * ceil_div(p.N, TILE_COLUMNS);
  parallel_for(count, p.M * p.N * (p.R + 4), p.dropout.threshold ? tile_tasks<true, TERMS> : tile_tasks<false, TERMS>, const_cast<AddLowrank*>(&p));
}

#endif

static int64_t pairs_ld(const AddLowrank& p) { return round_up(p.R, PAD) / 2; }
static int64_t lines_of(const AddLowrank& p, int64_t cols) { return larger(TURN * p.R, cols); }

template <DType dtype, bool dropout, bool PAIRS>
static void task(const AddLowrank& p, int64_t m0, int64_t m1, int64_t n0, int64_t valid, int64_t cols, Scratch scratch) {
  float *panel = scratch.next(p.R * cols), *bias = scratch.next(cols), *lines = scratch.next(lines_of(p, cols)), *pairs = scratch.next(ROWS * pairs_ld(p));
  const bool few = !PAIRS && turns(p.v, m1 - m0, p.R);
  if (PAIRS)
    pack_words(turned(p.v), 0, p.R, n0, valid, cols, cols, reinterpret_cast<uint32_t*>(panel), lines);
  else if (!few)
    pack_turned(p.v, n0, valid, 0, p.R, cols, cols, panel, lines, valid * p.v.row_stride * static_cast<int64_t>(sizeof(float)));
  for (int64_t c = 0; p.bias.data && c < cols; ++c)
    bias[c] = c < valid ? p.scaling * load_scalar(p.bias.data, p.bias.dtype, (n0 + c) * p.bias.col_stride) : 0.0f;
  if (!p.bias.data) bias = nullptr;
  int16_t keep[ROWS * KEEP_LD];
  const auto draw_rows = [&](int64_t m, int rows) {
    for (int i = 0; i < rows; ++i)
      keep_row(static_cast<uint64_t>(*p.dropout.seed), p.dropout.threshold, place(p.y, m + i), n0, valid, keep + i * KEEP_LD);
  };
  const auto rows_of_u = [&](int64_t m, int64_t rows) -> View {
    if (PAIRS) return view_bf16(p.u, m, rows, 0, p.R, {}, pairs, pairs_ld(p));
    return {static_cast<const float*>(p.u.data) + m * p.u.row_stride, p.u.row_stride};
  };
  if (few) {
    const int64_t rows = m1 - m0;
    const auto all = rows == 1 ? turned_tiles<dtype, 1, dropout> : rows == 2 ? turned_tiles<dtype, 2, dropout> : rows == 3 ? turned_tiles<dtype, 3, dropout> : turned_tiles<dtype, FEW, dropout>;
    static_assert(FEW == ROWS, "as many rows' masks are kept");
    if (dropout) draw_rows(m0, static_cast<int>(rows));
    return all(p, rows_of_u(m0, rows), m0, n0, valid, bias, keep);
  }
  int64_t m = m0;
  for (; m + ROWS <= m1; m += ROWS) {
    if (dropout) draw_rows(m, ROWS);
    tiles<dtype, ROWS, dropout, PAIRS>(p, rows_of_u(m, ROWS), m, n0, cols, valid, panel, bias, keep, m + 2 * ROWS <= m1);
  }
  for (; m < m1; ++m) {
    if (dropout) draw_rows(m, 1);
    tiles<dtype, 1, dropout, PAIRS>(p, rows_of_u(m, 1), m, n0, cols, valid, panel, bias, keep, false);
  }
}

struct Grid {
  const AddLowrank* p;
  int64_t block_cols, column_blocks;
};

template <DType dtype, bool dropout, bool PAIRS>
static void tasks(int64_t begin, int64_t end, void* context) {
  const Grid& grid = *static_cast<const Grid*>(context);
  const AddLowrank& p = *grid.p;
  Scratch scratch(WORKER, (p.R + 1) * grid.block_cols + lines_of(p, grid.block_cols) + ROWS * pairs_ld(p) + 64);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t m0 = t / grid.column_blocks * BLOCK_ROWS, n0 = t % grid.column_blocks * grid.block_cols;
    const int64_t valid = smaller(grid.block_cols, p.N - n0);
    task<dtype, dropout, PAIRS>(p, m0, smaller(m0 + BLOCK_ROWS, p.M), n0, valid, ceil_div(valid, TILE) * TILE, scratch);
  }
}

template <DType dtype, bool PAIRS = false>
static void run(Grid grid, int64_t count) {
  parallel_for(count, grid.p->M * grid.p->N * (grid.p->R + 4), grid.p->dropout.threshold ? tasks<dtype, true, PAIRS> : tasks<dtype, false, PAIRS>, &grid);
}

}  // namespace

namespace LK_ISA_NAME {

void add_lowrank(const AddLowrank& p) {
  if (p.M == 0 || p.N == 0) return;
#ifdef LK_ISA_AMX
  if (tiled(p, p.y, p.v.dtype)) return whole_terms(p.v.dtype) ? on_tiles<2>(p) : on_tiles<1>(p);
#endif
  const int64_t fits = larger(48, PANEL_FLOATS / larger(p.R, 1) / 48 * 48);
  const bool pairs = paired(p.y, p.v);
  const int64_t block_cols = smaller(smaller(fits, p.M <= 4 * ROWS ? COLUMNS_FEW : COLUMNS_MAX), round_up(p.N, 48));
  const Grid grid = {&p, block_cols, ceil_div(p.N, block_cols)};
  const int64_t count = ceil_div(p.M, BLOCK_ROWS) * grid.column_blocks;
  switch (p.y.dtype) {
    case DType::f32: return run<DType::f32>(grid, count);
    case DType::bf16: return pairs ? run<DType::bf16, HAS_DOT>(grid, count) : run<DType::bf16>(grid, count);
    case DType::f16: return run<DType::f16>(grid, count);
  }
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
