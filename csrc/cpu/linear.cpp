// y = x W^T + bias of half-precision operands, multiplied in float32 and rounded once: what F.linear computes, for the dtypes that torch hands
// to no library on this processor (backends/cpu.py). Compiled once per instruction set (CMakeLists.txt), see vec.h.
#include "kernels.h"
#include "panels.h"

namespace lk::cpu {
namespace {

// panel[d * WIDE + c] = W[n0 + c, k0 + d] of a W whose columns lie in order: those that are needed some columns later are brought in, for
// they lie too far apart for the processor to guess.
static void widen_columns(const Linear& p, int64_t n0, int64_t columns, int64_t k0, int64_t depth, float* panel) {
  constexpr int64_t AHEAD = 16, LINE = 32;
  const Matrix turned = {p.W.data, p.W.col_stride, p.W.row_stride, p.W.dtype};
  for (int64_t d = 0; d < depth; ++d, panel += WIDE) {
    const uint16_t* later = static_cast<const uint16_t*>(p.W.data) + (k0 + d + AHEAD) * p.W.col_stride + n0;
    for (int64_t c = 0; c < columns; c += LINE) __builtin_prefetch(later + c, 0, 2);
    load_row_any(turned, k0 + d, n0, columns, panel);
  }
}

// Few rows of x against W's rows as they lie: every value of W is read and widened once for a group of them.
constexpr int64_t FEW_ROWS = 8, GROUP = 4;
constexpr int64_t COLUMNS = 16;   // of a task
constexpr int64_t CHUNK = 1024;   // of the depth: a group's rows of x stay in the first cache

// out[r * COLUMNS + c] += the dot product of row r of x with row c of W
template <DType dtype, int ROWS, int COLS>
static void dots(const float* x, int64_t x_ld, const uint16_t* w, int64_t w_ld, int64_t depth, float* out) {
  using E = Element<dtype>;
  Vec sum[ROWS][COLS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLS; ++c) sum[r][c] = zero();
  int64_t k = 0;
  for (; k + VL <= depth; k += VL) {
    Vec b[COLS];
    for (int c = 0; c < COLS; ++c) b[c] = E::get(w + c * w_ld + k);
    for (int r = 0; r < ROWS; ++r) {
      const Vec a = load(x + r * x_ld + k);
      for (int c = 0; c < COLS; ++c) sum[r][c] = fma(a, b[c], sum[r][c]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLS; ++c) {
      float edge = 0.0f;
      for (int64_t i = k; i < depth; ++i) edge += x[r * x_ld + i] * E::scalar(w[c * w_ld + i]);
      out[r * COLUMNS + c] += total(sum[r][c]) + edge;
    }
}

template <DType dtype, int ROWS>
static void dot_columns(const float* x, int64_t x_ld, const uint16_t* w, int64_t w_ld, int64_t columns, int64_t depth, float* out) {
  constexpr int COLS = ROWS > 2 ? 2 : 4;
  int64_t c = 0;
  for (; c + COLS <= columns; c += COLS) dots<dtype, ROWS, COLS>(x, x_ld, w + c * w_ld, w_ld, depth, out + c);
  for (; c < columns; ++c) dots<dtype, ROWS, 1>(x, x_ld, w + c * w_ld, w_ld, depth, out + c);
}

struct Few {
  const Linear& p;
  const float* x;
  int64_t x_ld;
};

template <DType dtype>
static void few_tasks(int64_t begin, int64_t end, void* context) {
  const Few& g = *static_cast<const Few*>(context);
  const Linear& p = g.p;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n0 = t * COLUMNS, columns = smaller(COLUMNS, p.N - n0), ld = p.W.row_stride;
    float out[FEW_ROWS * COLUMNS] = {};
    for (int64_t k = 0; k < p.K; k += CHUNK) {
      const int64_t depth = smaller(CHUNK, p.K - k);
      const uint16_t* w = static_cast<const uint16_t*>(p.W.data) + n0 * ld + k;
      for (int64_t m = 0; m < p.M; m += GROUP) {
        const float* x = g.x + m * g.x_ld + k;
        float* to = out + m * COLUMNS;
        switch (smaller(GROUP, p.M - m)) {
          case 1: dot_columns<dtype, 1>(x, g.x_ld, w, ld, columns, depth, to); break;
          case 2: dot_columns<dtype, 2>(x, g.x_ld, w, ld, columns, depth, to); break;
          case 3: dot_columns<dtype, 3>(x, g.x_ld, w, ld, columns, depth, to); break;
          default: dot_columns<dtype, GROUP>(x, g.x_ld, w, ld, columns, depth, to);
        }
      }
    }
    for (int64_t m = 0; m < p.M; ++m) store_sums(p.y, p.bias, m, n0, columns, out + m * COLUMNS);
  }
}

static void few_rows(const Linear& p) {
  const int64_t ld = round_up(p.K, 16) + 16;
  Scratch scratch(CALLER, p.M * ld);
  for (int64_t m = 0; m < p.M; ++m) load_row_any(p.x, m, 0, p.K, scratch.at + m * ld);
  Few g = {p, scratch.at, ld};
  parallel_for(ceil_div(p.N, COLUMNS), p.M * p.N * p.K, p.W.dtype == DType::bf16 ? few_tasks<DType::bf16> : few_tasks<DType::f16>, &g);
}

}  // namespace

namespace LK_ISA_NAME {

void linear(const Linear& p) {
  if (p.M <= FEW_ROWS && p.W.col_stride == 1) return few_rows(p);
  panel_product({p.x, p.bias, p.y, p.M, p.K, p.N}, TURN * BLOCK, [&](int64_t k, int64_t depth, int64_t n, int64_t columns, float* panel, float* lines) {
    if (p.W.row_stride == 1)
      widen_columns(p, n, columns, k, depth, panel);
    else
      pack_turned(p.W, n, columns, k, depth, round_up(columns, VL), WIDE, panel, lines);
  });
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
