// u = drop(x) A^T for the A's of one x. Compiled once per instruction set (CMakeLists.txt), see vec.h.
//
// The A's are packed once, rank along the vector; a task owns ROWS rows, reads its part of x once and keeps its sums
// between blocks of K. Where there is one task, it packs each block as it comes, which then never leaves the first cache. Without dropout all A's are one product; with it each has its own mask of the same block of x.
#include "kernels.h"
#include "parallel.h"
#include "tile.h"

namespace lk::cpu {
namespace {

constexpr int64_t ROWS = 64;   // of a task
constexpr int64_t GROUP = 12;  // rows whose copies stay in the first cache

struct Down {
  const LowrankDown* p;
  float* panel;  // (K, width); null where each block is packed as it comes
  int64_t width;  // every part's rank, rounded up to whole vectors
};

static void pack(const Down& d, int64_t k0, float* panel, float* lines) {
  for (int i = 0; i < d.p->parts; ++i) {
    const LowrankDown::Part& part = d.p->part[i];
    const int64_t padded = round_up(part.R, VL);
    pack_turned(part.A, 0, part.R, k0, smaller(BLOCK, d.p->K - k0), padded, d.width, panel, lines);
    panel += padded;
  }
}

static void pack_block(int64_t begin, int64_t end, void* context) {
  const Down& d = *static_cast<const Down*>(context);
  Scratch scratch(WORKER, TURN * BLOCK);
  for (int64_t t = begin; t < end; ++t) pack(d, t * BLOCK, d.panel + t * BLOCK * d.width, scratch.at);
}

static void tasks(int64_t begin, int64_t end, void* context) {
  const Down& d = *static_cast<const Down*>(context);
  const LowrankDown& p = *d.p;
  const bool dropout = p.dropout.threshold;
  const int64_t own = d.panel ? 0 : BLOCK * d.width;
  Scratch scratch(WORKER, ROWS * d.width + GROUP * BLOCK_LD + own + TURN * BLOCK + 64);
  float *sums = scratch.next(ROWS * d.width), *block = scratch.next(GROUP * BLOCK_LD), *packed = scratch.next(own), *lines = scratch.next(TURN * BLOCK);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t m0 = t * ROWS, rows = smaller(ROWS, p.M - m0);
    for (int64_t k0 = 0; k0 < p.K; k0 += BLOCK) {
      const int64_t columns = smaller(BLOCK, p.K - k0);
      const float* panel = d.panel ? d.panel + k0 * d.width : packed;
      if (!d.panel) pack(d, k0, packed, lines);
      for (int64_t m = 0; m < rows; m += GROUP) {
        const int64_t some = smaller(GROUP, rows - m);
        int64_t at = 0;
        for (int i = 0; i < (dropout ? p.parts : 1); ++i) {
          const Mask mask = {dropout ? p.dropout.seed + i : nullptr, p.dropout.threshold};
          const View x = view(p.x, m0 + m, some, k0, columns, mask, block, m + 2 * GROUP <= rows);
          const int64_t width = dropout ? round_up(p.part[i].R, VL) : d.width;
          product({x.at, x.ld, 1, panel + at, d.width, columns, sums + m * d.width + at, d.width, k0 > 0}, some, width / VL);
          at += width;
        }
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      int64_t from = 0;
      for (int i = 0; i < p.parts; ++i) {
        store_row<DType::f32>(p.u, m0 + m, p.part[i].column, p.part[i].R, sums + m * d.width + from, dropout ? p.dropout.scale : 1.0f);
        from += round_up(p.part[i].R, VL);
      }
    }
  }
}

}  // namespace

namespace LK_ISA_NAME {

void lowrank_down(const LowrankDown& p) {
  if (p.M == 0) return;
  Down d = {&p, nullptr, 0};
  for (int i = 0; i < p.parts; ++i) d.width += round_up(p.part[i].R, VL);
  if (p.M <= ROWS) return tasks(0, 1, &d);
  Scratch scratch(CALLER, p.K * d.width);
  d.panel = scratch.at;
  parallel_for(ceil_div(p.K, BLOCK), p.K * d.width, pack_block, &d);
  parallel_for(ceil_div(p.M, ROWS), p.M * p.K * d.width, tasks, &d);
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
