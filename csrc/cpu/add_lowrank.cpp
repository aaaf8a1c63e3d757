// y += scaling * drop'(u v^T) + bias. Compiled once per instruction set (CMakeLists.txt), see vec.h.
//
// A task is a block of rows by a block of columns. It packs its columns of v once, as float32, column-major within the
// block, so that any stride and dtype of v meets the same inner loop, then walks its rows in groups of four: twelve
// accumulators stay in registers while y is read and written once. A sum runs over r = 0..R-1 in that order whatever
// the blocking, so the bits do not depend on the number of threads or on a row's place.
#include "../philox.h"
#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace lk::cpu {
namespace {

constexpr int ROWS = 4, VECS = 3;              // register tile: 4 rows x 3 vectors
constexpr int64_t TILE = VECS * VL;            // columns of a register tile
constexpr int64_t PANEL_FLOATS = 24 * 1024;    // packed v of a task: 96 KiB, within the second-level cache
constexpr int64_t BLOCK_COLS_MAX = 10 * 48;    // a multiple of every TILE (12, 24, 48)
constexpr int64_t BLOCK_ROWS = 128;            // enough rows to pay for the packing

LK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
LK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// panel[r * cols + c] = v[n0 + c, r], zero beyond column `valid`
template <DType dtype>
static void pack(const AddLowrank& p, int64_t n0, int64_t valid, int64_t cols, float* panel) {
  using T = typename Element<dtype>::type;
  const T* v = static_cast<const T*>(p.v.data) + n0 * p.v.row_stride;
  if (p.v.row_stride == 1) {  // A transposed: neighbouring columns are neighbours in memory
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t c = 0; c < valid; ++c) panel[r * cols + c] = Element<dtype>::scalar(v[r * p.v.col_stride + c]);
  } else {
    for (int64_t c = 0; c < valid; ++c)
      for (int64_t r = 0; r < p.R; ++r)
        panel[r * cols + c] = Element<dtype>::scalar(v[c * p.v.row_stride + r * p.v.col_stride]);
  }
  for (int64_t r = 0; r < p.R; ++r)
    for (int64_t c = valid; c < cols; ++c) panel[r * cols + c] = 0.0f;
}

static void pack_any(const AddLowrank& p, int64_t n0, int64_t valid, int64_t cols, float* panel, float* bias) {
  for (int64_t c = 0; c < cols; ++c)
    bias[c] = c < valid && p.bias.data ? load_scalar(p.bias.data, p.bias.dtype, (n0 + c) * p.bias.col_stride) : 0.0f;
  switch (p.v.dtype) {
    case DType::f32: return pack<DType::f32>(p, n0, valid, cols, panel);
    case DType::bf16: return pack<DType::bf16>(p, n0, valid, cols, panel);
    case DType::f16: return pack<DType::f16>(p, n0, valid, cols, panel);
  }
}

// keep[c] = scale where column n0 + c of row m is kept, else 0
static void dropout_row(const Dropout& d, int64_t m, int64_t n0, int64_t cols, float* keep) {
  const uint64_t seed = static_cast<uint64_t>(*d.seed);
  for (int64_t c = -(n0 & 7); c < cols; c += 8) {
    const Philox8 draw = philox8(seed, static_cast<uint64_t>(m), static_cast<uint32_t>((n0 + c) >> 3));
    for (int j = 0; j < 8; ++j)
      if (c + j >= 0 && c + j < cols) keep[c + j] = draw.lane(j) >= d.threshold ? d.scale : 0.0f;
  }
}

template <DType dtype, int rows, bool dropout>
LK_INLINE void tile(const AddLowrank& p, int64_t m, int64_t n0, int64_t c0, int64_t cols, int64_t valid,
                    const float* panel, const float* bias, const float* keep) {
  using E = Element<dtype>;
  const float* u[rows];
  for (int i = 0; i < rows; ++i) u[i] = static_cast<const float*>(p.u.data) + (m + i) * p.u.row_stride;
  Vec sum[rows][VECS];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < VECS; ++j) sum[i][j] = zero();
  for (int64_t r = 0; r < p.R; ++r) {
    Vec b[VECS];
    for (int j = 0; j < VECS; ++j) b[j] = load(panel + r * cols + c0 + j * VL);
    for (int i = 0; i < rows; ++i) {
      const Vec a = broadcast(u[i][r]);
      for (int j = 0; j < VECS; ++j) sum[i][j] = fma(a, b[j], sum[i][j]);
    }
  }
  const Vec scaling = broadcast(p.scaling);
  for (int i = 0; i < rows; ++i) {
    typename E::type* y = static_cast<typename E::type*>(p.y.data) + (m + i) * p.y.row_stride + n0 + c0;
    typename E::type edge[TILE];
    const bool whole = c0 + TILE <= valid;
    if (!whole) {
      memset(edge, 0, sizeof edge);
      memcpy(edge, y, (valid - c0) * sizeof *y);
    }
    typename E::type* at = whole ? y : edge;
    for (int j = 0; j < VECS; ++j) {
      Vec delta = mul(scaling, sum[i][j]);
      if (dropout) delta = mul(load(keep + i * cols + c0 + j * VL), delta);
      E::put(at + j * VL, add(E::get(at + j * VL), add(delta, load(bias + c0 + j * VL))));
    }
    if (!whole) memcpy(y, edge, (valid - c0) * sizeof *y);
  }
}

template <DType dtype, bool dropout>
static void task(const AddLowrank& p, int64_t m0, int64_t m1, int64_t n0, int64_t valid, int64_t cols, float* scratch) {
  float *panel = scratch, *bias = panel + p.R * cols, *keep = bias + cols;
  pack_any(p, n0, valid, cols, panel, bias);
  int64_t m = m0;
  for (; m + ROWS <= m1; m += ROWS) {
    if (dropout)
      for (int i = 0; i < ROWS; ++i) dropout_row(p.dropout, m + i, n0, cols, keep + i * cols);
    for (int64_t c = 0; c < valid; c += TILE) tile<dtype, ROWS, dropout>(p, m, n0, c, cols, valid, panel, bias, keep);
  }
  for (; m < m1; ++m) {
    if (dropout) dropout_row(p.dropout, m, n0, cols, keep);
    for (int64_t c = 0; c < valid; c += TILE) tile<dtype, 1, dropout>(p, m, n0, c, cols, valid, panel, bias, keep);
  }
}

struct Grid {
  const AddLowrank* p;
  int64_t block_cols, column_blocks;
};

template <DType dtype, bool dropout>
static void tasks(int64_t begin, int64_t end, void* context) {
  const Grid& grid = *static_cast<const Grid*>(context);
  const AddLowrank& p = *grid.p;
  float* scratch = static_cast<float*>(
      __builtin_malloc((p.R + 1 + (dropout ? ROWS : 0)) * grid.block_cols * sizeof(float)));
  if (!scratch) __builtin_trap();  // no exceptions in a file compiled for a wide instruction set
  for (int64_t t = begin; t < end; ++t) {
    const int64_t m0 = t / grid.column_blocks * BLOCK_ROWS, n0 = t % grid.column_blocks * grid.block_cols;
    const int64_t valid = smaller(grid.block_cols, p.N - n0);
    task<dtype, dropout>(p, m0, smaller(m0 + BLOCK_ROWS, p.M), n0, valid, ceil_div(valid, TILE) * TILE, scratch);
  }
  __builtin_free(scratch);
}

template <DType dtype>
static void run(Grid grid, int64_t count) {
  parallel_for(count, grid.p->dropout.threshold ? tasks<dtype, true> : tasks<dtype, false>, &grid);
}

static void add_lowrank(const AddLowrank& p) {
  if (p.M == 0 || p.N == 0) return;
  const int64_t fits = larger(48, PANEL_FLOATS / larger(p.R, 1) / 48 * 48);
  const int64_t block_cols = smaller(smaller(fits, BLOCK_COLS_MAX), ceil_div(p.N, 48) * 48);
  const Grid grid = {&p, block_cols, ceil_div(p.N, block_cols)};
  const int64_t count = ceil_div(p.M, BLOCK_ROWS) * grid.column_blocks;
  switch (p.y.dtype) {
    case DType::f32: return run<DType::f32>(grid, count);
    case DType::bf16: return run<DType::bf16>(grid, count);
    case DType::f16: return run<DType::f16>(grid, count);
  }
}

}  // namespace

extern const Kernels LK_ISA_NAME;
#define LK_STRING_(x) #x
#define LK_STRING(x) LK_STRING_(x)
const Kernels LK_ISA_NAME = {LK_STRING(LK_ISA_NAME), add_lowrank};

}  // namespace lk::cpu
