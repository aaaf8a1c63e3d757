// u = drop(x) A^T for the A's of one x. Compiled once per instruction set (CMakeLists.txt), see vec.h.
//
// The A's are packed once, rank along the vector; a task owns ROWS rows, reads its part of x once and keeps its sums
// between blocks of K. Where there is one task, it packs each block as it comes, which then never leaves the first cache; of few rows
// nothing is packed. Without dropout all packed A's are one product; with it each has its own mask of the same block of x.
#include "kernels.h"
#include "pairs.h"
#include "parallel.h"
#include "thin_tiles.h"

namespace lk::cpu {
namespace {

constexpr int64_t ROWS = 64;   // of a task
constexpr int64_t AHEAD_COLUMNS = 2 * BLOCK;  // that A is brought in before they are packed
constexpr int64_t GROUP = 16;  // at most so many rows' copies stay in the first cache

struct Down {
  const LowrankDown* p;
  float* panel;  // (K, width), or four of K at a time (K / 4, width); null where each block is packed as it comes
  int64_t width;  // every part's rank, rounded up to whole vectors
  bool turned;    // the A's are turned in registers, nothing is packed
};

static int64_t lines_of(const Down& d) { return larger(TURN * BLOCK, 2 * d.width); }

template <bool PAIRS>
static void pack(const Down& d, int64_t k0, float* panel, float* lines) {
  const int64_t columns = smaller(BLOCK, d.p->K - k0);
  for (int i = 0; i < d.p->parts; ++i) {
    const LowrankDown::Part& part = d.p->part[i];
    const int64_t padded = round_up(part.R, VL);
    if (PAIRS)
      pack_words(turned(part.A), k0, columns, 0, part.R, padded, d.width, reinterpret_cast<uint64_t*>(panel), lines, AHEAD_COLUMNS * 2);
    else
      pack_turned(part.A, 0, part.R, k0, columns, padded, d.width, panel, lines, AHEAD_COLUMNS * 4);
    panel += PAIRS ? 2 * padded : padded;
  }
}

template <bool PAIRS>
static void pack_block(int64_t begin, int64_t end, void* context) {
  const Down& d = *static_cast<const Down*>(context);
  Scratch scratch(WORKER, lines_of(d));
  for (int64_t t = begin; t < end; ++t) pack<PAIRS>(d, t * BLOCK, d.panel + t * BLOCK * d.width / (PAIRS ? 2 : 1), scratch.at);
}

// sums (rows, width) = or += x A^T for at most FEW rows, where turns(A)
template <int ROWS>
static void meet_turned(const View& x, const LowrankDown::Part& part, int64_t k0, int64_t columns, int64_t ahead, float* sums, int64_t width, bool add_up) {
  for (int64_t r = 0; r < part.R; r += VL) {
    Vec sum[ROWS][1];
    for (auto& row : sum) row[0] = zero();
    accumulate_turned<ROWS>(x.at, x.ld, part.A, r, part.R - r, k0, columns, ahead * static_cast<int64_t>(sizeof(float)), sum);
    for (int i = 0; i < ROWS; ++i) {
      float* to = sums + i * width + r;
      store(to, add_up ? add(load(to), sum[i][0]) : sum[i][0]);
    }
  }
}

static void store_u(const Down& d, int64_t m0, int64_t rows, const float* sums) {
  const LowrankDown& p = *d.p;
  for (int64_t m = 0; m < rows; ++m) {
    int64_t from = 0;
    for (int i = 0; i < p.parts; ++i) {
      store_row<DType::f32>(p.u, m0 + m, p.part[i].column, p.part[i].R, sums + m * d.width + from, p.dropout.threshold ? p.dropout.scale : 1.0f);
      from += round_up(p.part[i].R, VL);
    }
  }
}

template <bool PAIRS>
static void tasks(int64_t begin, int64_t end, void* context) {
  const Down& d = *static_cast<const Down*>(context);
  const LowrankDown& p = *d.p;
  const bool dropout = p.dropout.threshold, apart = dropout || d.turned;  // each A by itself
  // as tiles go into it: on a Zen 5 float32 at r = 16 takes 0.84 to 0.87 of the time of twelve, but at r = 64 1.01 to 1.06, pairs 1.2
  const int64_t group = !PAIRS && d.width == VL ? GROUP : 12;
  const int64_t own = d.panel ? 0 : BLOCK * d.width;
  Scratch scratch(WORKER, ROWS * d.width + GROUP * BLOCK_LD + own + lines_of(d) + 64);
  float *sums = scratch.next(ROWS * d.width), *block = scratch.next(GROUP * BLOCK_LD), *packed = scratch.next(own), *lines = scratch.next(lines_of(d));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t m0 = t * ROWS, rows = smaller(ROWS, p.M - m0);
    for (int64_t k0 = 0; k0 < p.K; k0 += BLOCK) {
      const int64_t columns = smaller(BLOCK, p.K - k0);
      const float* panel = d.panel ? d.panel + k0 * d.width / (PAIRS ? 2 : 1) : packed;
      const int64_t next = p.next && k0 + BLOCK + AHEAD_COLUMNS > p.K ? p.next + AHEAD_COLUMNS - p.K : AHEAD_COLUMNS;
      if (!d.panel && !d.turned) pack<PAIRS>(d, k0, packed, lines);
      for (int64_t m = 0; m < rows; m += group) {
        const int64_t some = smaller(group, rows - m);
        Ahead ahead = m + group < rows ? Ahead(p.x, m0 + m + group, smaller(group, rows - m - group), k0, columns)
                                       : Ahead(p.x, m0, k0 + BLOCK < p.K ? smaller(group, rows) : 0, k0 + BLOCK, smaller(BLOCK, p.K - k0 - BLOCK));
        int64_t at = 0;
        for (int i = 0; i < (apart ? p.parts : 1); ++i) {
          const Mask mask = {dropout ? p.dropout.seed + i : nullptr, p.dropout.threshold};
          const int64_t width = apart ? round_up(p.part[i].R, VL) : d.width;
          float* to = sums + m * d.width + at;
          if (PAIRS) {
            const View x = view_bf16(p.x, m0 + m, some, k0, columns, mask, block, BLOCK_LD);
            along({x, reinterpret_cast<const uint64_t*>(panel) + at, d.width, columns, to, d.width, k0 > 0}, some, width, ahead);
          } else {
            const View x = view(p.x, m0 + m, some, k0, columns, mask, block);
            if (d.turned)
              (some == 1 ? meet_turned<1> : some == 2 ? meet_turned<2> : some == 3 ? meet_turned<3> : meet_turned<FEW>)(x, p.part[i], k0, columns, next, to, d.width, k0 > 0);
            else
              product({x.at, x.ld, 1, panel + at, d.width, columns, to, d.width, k0 > 0}, some, width / VL, ahead);
          }
          at += width;
        }
      }
    }
    store_u(d, m0, rows, sums);
  }
}

#ifdef LK_ISA_AMX

// The same on tiles: d.panel has each part's tiles behind those of the last.
template <int TERMS>
static void pack_tile_block(int64_t begin, int64_t end, void* context) {
  const Down& d = *static_cast<const Down*>(context);
  const int64_t rank_step = rank_words(TERMS, d.p->K);
  for (int64_t t = begin; t < end; ++t) {
    uint32_t* panel = reinterpret_cast<uint32_t*>(d.panel) + rank_words(TERMS, t * BLOCK);
    for (int i = 0; i < d.p->parts; ++i) {
      const LowrankDown::Part& part = d.p->part[i];
      pack_panel<TERMS>(turned(part.A), t * BLOCK, smaller(BLOCK, d.p->K - t * BLOCK), 0, part.R, part.R, true, panel, rank_step);
      panel += ceil_div(part.R, TILE_ROWS) * rank_step;
    }
  }
}

// How many of the columns that are left come next: all whole tiles of them where one pass takes x as it lies, else as many as stay in the
// first cache for the next pass, or are copied.
static int64_t columns_at_once(const LowrankDown& p, int64_t rows, int64_t left, int64_t width) {
  const Mask mask = {p.dropout.threshold ? p.dropout.seed : nullptr, p.dropout.threshold};
  const int64_t whole = left / TILE_DEPTH * TILE_DEPTH;
  return width == TILE_ROWS && whole && rows % TILE_ROWS == 0 && lie_whole(p.x, whole, mask) ? whole : smaller(BLOCK, left);
}

template <int TERMS>
static void tile_tasks(int64_t begin, int64_t end, void* context) {
  const Down& d = *static_cast<const Down*>(context);
  const LowrankDown& p = *d.p;
  const bool dropout = p.dropout.threshold;
  const int64_t rank_step = rank_words(TERMS, p.K);
  Scratch scratch(WORKER, ROWS * d.width + rows_floats(ROWS) + 32);
  float* sums = scratch.next(ROWS * d.width);
  uint16_t* block = reinterpret_cast<uint16_t*>(scratch.next(rows_floats(ROWS)));
  const Tiles tiles;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t m0 = t * ROWS, rows = smaller(ROWS, p.M - m0);
    for (int64_t k0 = 0, columns; k0 < p.K; k0 += columns) {
      columns = columns_at_once(p, rows, p.K - k0, d.width);
      const uint32_t* panel = reinterpret_cast<const uint32_t*>(d.panel) + rank_words(TERMS, k0);
      int64_t at = 0;
      for (int i = 0; i < (dropout ? p.parts : 1); ++i) {
        const Rows x = rows_of(p.x, m0, rows, k0, columns, {dropout ? p.dropout.seed + i : nullptr, p.dropout.threshold}, block);
        const int64_t width = dropout ? round_up(p.part[i].R, VL) : d.width;
        along_tiles<TERMS>({x, panel + at / TILE_ROWS * rank_step, rank_step, ceil_div(columns, TILE_DEPTH), sums + at, d.width, k0 == 0}, rows, width);
        at += width;
      }
    }
    store_u(d, m0, rows, sums);
  }
}

template <int TERMS>
static void on_tiles(Down& d) {
  const LowrankDown& p = *d.p;
  Scratch scratch(CALLER, d.width / TILE_ROWS * rank_words(TERMS, p.K));
  d.panel = scratch.at;
  parallel_for(ceil_div(p.K, BLOCK), p.K * d.width, pack_tile_block<TERMS>, &d);
  parallel_for(ceil_div(p.M, ROWS), p.M * p.K * d.width, tile_tasks<TERMS>, &d);
}

#endif

}  // namespace

namespace LK_ISA_NAME {

void lowrank_down(const LowrankDown& p) {
  if (p.M == 0) return;
  Down d = {&p, nullptr, 0, true};
  bool pairs = HAS_DOT;
  for (int i = 0; i < p.parts; ++i) {
    d.width += round_up(p.part[i].R, VL);
    pairs = pairs && paired(p.x, p.part[i].A);
    d.turned = d.turned && turns(p.part[i].A, p.M, p.K);
  }
#ifdef LK_ISA_AMX
  bool tiles = true, whole = false;
  for (int i = 0; i < p.parts; ++i) tiles = tiles && tiled(p, p.x, p.part[i].A.dtype), whole = whole || whole_terms(p.part[i].A.dtype);
  if (tiles) return whole ? on_tiles<3>(d) : on_tiles<1>(d);
#endif
  const Body run = pairs ? tasks<HAS_DOT> : tasks<false>;
  if (p.M <= ROWS) return run(0, 1, &d);
  Scratch scratch(CALLER, round_up(p.K, 4) * d.width);
  d.panel = scratch.at;
  parallel_for(ceil_div(p.K, BLOCK), p.K * d.width, pairs ? pack_block<HAS_DOT> : pack_block<false>, &d);
  parallel_for(ceil_div(p.M, ROWS), p.M * p.K * d.width, run, &d);
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
