// du = s dy B and dB = s dy^T u in one pass over dy, then dA = du^T drop(x) in one pass over x. Compiled once per
// instruction set (CMakeLists.txt), see vec.h.
//
// A task owns a stripe of columns for all rows, so dB and dA are each summed by one task, over the rows in their order.
// du is summed stripe by stripe; the stripes' parts are added in their order. How the work is cut depends on the shape
// alone, never on the number of threads.
#include "kernels.h"
#include "parallel.h"
#include "tile.h"

namespace lk::cpu {
namespace {

constexpr int64_t ROWS = 32;                  // rows of a block that is copied to float32
constexpr int64_t STRIPES = 32;               // at most so many: they are the parallel work, and the parts of du
constexpr int64_t PART_FLOATS = 2 << 20;      // all parts of du of a slab of rows: 8 MiB

struct Split {
  int64_t width, count;
};

// A multiple of four stripes of about BLOCK columns, so that 2 or 4 threads have equal shares.
static Split split(int64_t columns) {
  const int64_t wanted = smaller(round_up(ceil_div(columns, BLOCK), 4), STRIPES);
  const int64_t width = round_up(ceil_div(columns, wanted), 8);
  return {width, ceil_div(columns, width)};
}

struct Grad {
  const LowrankGrad* p;
  Split stripes;
  int64_t width;        // the rank, rounded up to whole vectors
  float* parts;         // (stripes, slab, width) of du
  float* dB;            // (N, width)
  int64_t slab, m0, m1;  // rows in hand
};

// -- du and dB ---------------------------------------------------------------------------------------------------------

static void up_stripe(const Grad& g, int64_t t, float* panel, float* block, float* lines) {
  const LowrankGrad& p = *g.p;
  const int64_t begin = t * g.stripes.width, end = smaller(begin + g.stripes.width, p.N);
  for (int64_t n0 = begin; n0 < end; n0 += BLOCK) {
    const int64_t columns = smaller(BLOCK, end - n0);
    if (p.B.col_index)
      pack_turned({p.B.data, p.B.col_stride, p.B.row_stride, p.B.dtype, p.B.col_index}, 0, p.R, n0, columns, g.width, g.width, panel, block);
    else if (p.B.data)
      pack_rows(p.B, n0, columns, 0, p.R, g.width, g.width, panel);
    for (int64_t m = g.m0; m < g.m1; m += ROWS) {
      const int64_t rows = smaller(ROWS, g.m1 - m);
      const View dy = p.u.data ? copy(p.dy, m, rows, n0, columns, {}, block, m + 2 * ROWS <= g.m1) : view(p.dy, m, rows, n0, columns, {}, block);
      if (p.B.data)
        product({dy.at, dy.ld, 1, panel, g.width, columns, g.parts + (t * g.slab + m - g.m0) * g.width, g.width, n0 > begin}, rows, g.width / VL);
      if (p.u.data) {
        View u = {static_cast<const float*>(p.u.data) + m * p.u.row_stride, p.u.row_stride};
        if (p.R != g.width) {
          pack_rows(p.u, m, rows, 0, p.R, g.width, g.width, lines);
          u = {lines, g.width};
        }
        product({dy.at, 1, dy.ld, u.at, u.ld, rows, g.dB + n0 * g.width, g.width, m > 0}, columns, g.width / VL);
      }
    }
    if (p.u.data && g.m1 == p.M)
      for (int64_t n = n0; n < n0 + columns; ++n) store_row_any(p.dB, n, 0, p.R, g.dB + n * g.width, p.scaling);
  }
}

static void up_tasks(int64_t begin, int64_t end, void* context) {
  const Grad& g = *static_cast<const Grad*>(context);
  Scratch scratch(WORKER, BLOCK * g.width + ROWS * BLOCK_LD + ROWS * g.width + 48);
  float *panel = scratch.next(BLOCK * g.width), *block = scratch.next(ROWS * BLOCK_LD), *lines = scratch.next(ROWS * g.width);
  for (int64_t t = begin; t < end; ++t) up_stripe(g, t, panel, block, lines);
}

constexpr int64_t SUM_ROWS = 64;

static void sum_parts(int64_t begin, int64_t end, void* context) {
  const Grad& g = *static_cast<const Grad*>(context);
  for (int64_t m = begin * SUM_ROWS; m < smaller(end * SUM_ROWS, g.m1 - g.m0); ++m) {
    float* sum = g.parts + m * g.width;  // the first stripe's part takes the others
    for (int64_t c = 0; c < g.width; c += VL) {
      Vec total = load(sum + c);
      for (int64_t t = 1; t < g.stripes.count; ++t) total = add(total, load(sum + t * g.slab * g.width + c));
      store(sum + c, total);
    }
    store_row<DType::f32>(g.p->du, g.m0 + m, 0, g.p->R, sum, g.p->scaling);
  }
}

static void up(const LowrankGrad& p) {
  Grad g = {&p, split(p.N), round_up(p.R, VL), nullptr, nullptr, 0, 0, 0};
  g.slab = smaller(p.M, larger(ROWS, PART_FLOATS / (g.stripes.count * g.width) / ROWS * ROWS));
  const int64_t parts = p.B.data ? g.stripes.count * g.slab * g.width : 0, dB = p.u.data ? p.N * g.width : 0;
  Scratch scratch(CALLER, parts + dB + 16);
  g.parts = scratch.next(parts), g.dB = scratch.next(dB);
  for (g.m0 = 0; g.m0 < p.M; g.m0 = g.m1) {
    g.m1 = smaller(g.m0 + g.slab, p.M);
    parallel_for(g.stripes.count, (g.m1 - g.m0) * p.N * 2 * g.width, up_tasks, &g);
    if (p.B.data) parallel_for(ceil_div(g.m1 - g.m0, SUM_ROWS), (g.m1 - g.m0) * g.stripes.count * g.width, sum_parts, &g);
  }
}

// -- dA ----------------------------------------------------------------------------------------------------------------

static void down_tasks(int64_t begin, int64_t end, void* context) {
  const Grad& g = *static_cast<const Grad*>(context);
  const LowrankGrad& p = *g.p;
  const bool dropout = p.dropout.threshold;
  const Mask mask = {dropout ? p.dropout.seed : nullptr, p.dropout.threshold};
  Scratch scratch(WORKER, ROWS * BLOCK_LD + 16 + p.R * BLOCK_LD);
  float *block = scratch.next(ROWS * BLOCK_LD), *sums = scratch.next(p.R * BLOCK_LD);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t end_k = smaller((t + 1) * g.stripes.width, p.K);
    for (int64_t k0 = t * g.stripes.width; k0 < end_k; k0 += BLOCK) {
      const int64_t columns = smaller(BLOCK, end_k - k0);
      for (int64_t m = 0; m < p.M; m += ROWS) {
        const int64_t rows = smaller(ROWS, p.M - m);
        const View x = copy(p.x, m, rows, k0, columns, mask, block, m + 2 * ROWS <= p.M);
        const float* du = static_cast<const float*>(p.du.data) + m * p.du.row_stride;
        product({du, 1, p.du.row_stride, x.at, x.ld, rows, sums, BLOCK_LD, m > 0}, p.R, ceil_div(columns, VL));
      }
      for (int64_t r = 0; r < p.R; ++r) store_row_any(p.dA, r, k0, columns, sums + r * BLOCK_LD, dropout ? p.dropout.scale : 1.0f);
    }
  }
}

static void down(const LowrankGrad& p) {
  Grad g = {&p, split(p.K), 0, nullptr, nullptr, 0, 0, 0};
  parallel_for(g.stripes.count, p.M * p.K * p.R, down_tasks, &g);
}

}  // namespace

namespace LK_ISA_NAME {

void lowrank_grad(const LowrankGrad& p) {
  if (p.M == 0) return;
  if (p.B.data || p.u.data) up(p);
  if (p.x.data) down(p);
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
