// A product of many rows of x with a side that is made on its way, a panel of float32 at a time (nf4_product.cpp: decoded; linear.cpp: widened).
//
// A sum over the depth runs in blocks, in their order, whatever the tile: bits depend on that side's sizes alone, not on threads or a row's place.
#pragma once
#include "parallel.h"
#include "tile.h"

namespace lk::cpu {
namespace {

constexpr int64_t WIDE = 128;       // columns of a task at most; where they lie along a packed W's rows, a cache line of codes
constexpr int64_t TASK_ROWS = 256;  // of x

// y (M,columns) = x (M,depth) times the side + bias
struct Panels {
  Matrix x, bias, y;
  int64_t M, depth, columns;
  int64_t first = 0;  // row of y, where x is rows of a larger one
  int64_t wide() const { return columns >= 16 * WIDE ? WIDE : WIDE / 4; }  // of narrow layers more tasks, for threads to share evenly
  int64_t row_blocks() const { return ceil_div(M, TASK_ROWS); }
  int64_t tasks() const { return row_blocks() * ceil_div(columns, wide()); }
};

// make(d, depth, c0, columns, panel, lines): panel[k * WIDE + c] = the side at (d + k, c0 + c); lines: scratch for so many floats
template <class Make>
static void panel_tasks(int64_t begin, int64_t end, const Panels& g, int64_t lines_size, const Make& make) {
  Scratch scratch(WORKER, BLOCK * WIDE + TASK_ROWS * (WIDE + BLOCK_LD) + lines_size);
  float *panel = scratch.next(BLOCK * WIDE), *sums = scratch.next(TASK_ROWS * WIDE), *block = scratch.next(TASK_ROWS * BLOCK_LD), *lines = scratch.next(lines_size);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t m0 = t % g.row_blocks() * TASK_ROWS, c0 = t / g.row_blocks() * g.wide();
    const int64_t rows = smaller(TASK_ROWS, g.M - m0), columns = smaller(g.wide(), g.columns - c0);
    for (int64_t d = 0; d < g.depth; d += BLOCK) {
      const int64_t depth = smaller(BLOCK, g.depth - d);
      make(d, depth, c0, columns, panel, lines);
      const View x = view(g.x, m0, rows, d, depth, {}, block);
      product({x.at, x.ld, 1, panel, WIDE, depth, sums, WIDE, d > 0}, rows, ceil_div(columns, VL));
    }
    for (int64_t m = 0; m < rows; ++m) store_sums(g.y, g.bias, g.first + m0 + m, c0, columns, sums + m * WIDE);
  }
}

struct Widening {
  const Matrix& from;
  int64_t first, columns, ld;
  float* to;
};

// Rows of x that are no float32 are widened once for all tasks, as many at a time as scratch is kept for.
template <class Make>
static void panel_product(const Panels& whole, int64_t lines_size, const Make& make) {
  struct Context {
    Panels g;
    int64_t lines_size;
    const Make& make;
  } context = {whole, lines_size, make};
  const auto run = [&] {
    parallel_for(context.g.tasks(), context.g.M * whole.columns * whole.depth, [](int64_t begin, int64_t end, void* p) {
      const Context& c = *static_cast<const Context*>(p);
      panel_tasks(begin, end, c.g, c.lines_size, c.make);
    }, &context);
  };
  if (whole.x.dtype == DType::f32) return run();
  const int64_t ld = round_up(whole.depth, 16) + 16;  // an odd number of cache lines where the depth is of an even one
  const int64_t most = larger(SCRATCH_KEPT / ld / TASK_ROWS * TASK_ROWS, TASK_ROWS), at_once = smaller(most, whole.M);
  Scratch scratch(CALLER, at_once * ld);
  for (int64_t m = 0; m < whole.M; m += at_once) {
    context.g.first = m, context.g.M = smaller(at_once, whole.M - m);
    context.g.x = {scratch.at, ld, 1, DType::f32};
    Widening widening = {whole.x, m, whole.depth, ld, scratch.at};
    parallel_for(context.g.M, context.g.M * whole.depth, [](int64_t begin, int64_t end, void* p) {
      const Widening& w = *static_cast<const Widening*>(p);
      for (int64_t i = begin; i < end; ++i) load_row_any(w.from, w.first + i, 0, w.columns, w.to + i * w.ld);
    }, &widening);
    run();
  }
}

}  // namespace
}  // namespace lk::cpu
