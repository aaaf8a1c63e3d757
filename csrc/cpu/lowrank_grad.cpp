// du = s dy B and dB = s dy^T u in one pass over dy, then dA = du^T drop(x) in one pass over x. Compiled once per
// instruction set (CMakeLists.txt), see vec.h.
//
// A task owns a stripe of columns for all rows, so dB and dA are each summed by one task, over the rows in their order.
// du is summed stripe by stripe; the stripes' parts are added in their order. How the work is cut depends on the shape
// alone, never on the number of threads.
#include "kernels.h"
#include "pairs.h"
#include "parallel.h"
#include "thin_tiles.h"

namespace lk::cpu {
namespace {

template <bool PAIRS>
constexpr int64_t ROWS = PAIRS ? 128 : 32;    // of a block: as float32 it is copied, which stays in the first cache; as pairs it is read where it lies
constexpr int64_t ROWS_MAX = 128;
constexpr int64_t STRIPES = 32;               // at most so many: they are the parallel work, and the parts of du
constexpr int64_t PART_FLOATS = 2 << 20;      // all parts of du of a slab of rows: 8 MiB

constexpr int64_t WHOLE = 32;                 // columns that a stripe has a multiple of, as tiles do

struct Split {
  int64_t width, count;
};

// A multiple of four stripes of about BLOCK columns, so that 2 or 4 threads have equal shares.
static Split split(int64_t columns) {
  const int64_t wanted = smaller(round_up(ceil_div(columns, BLOCK), 4), STRIPES);
  const int64_t width = round_up(ceil_div(columns, wanted), WHOLE);
  return {width, ceil_div(columns, width)};
}

struct Grad {
  const LowrankGrad* p;
  Split stripes;
  int64_t width;        // the rank, rounded up to whole vectors
  bool pairs;
  int64_t terms;        // that u and B, or du, go in as on tiles (thin_tiles.h); 0 where the products do not run on them
  float* parts;         // (stripes, slab, width) of du
  float* dB;            // of each block of columns: (columns, width), or turned where pairs
  int64_t dB_floats;    // of a block
  int64_t slab, m0, m1;  // rows in hand
  uint32_t* packed = nullptr;  // on tiles: u of these rows, or du, as left operands, ROWS_MAX of them behind each other; null where du is too long
};

// -- du and dB ---------------------------------------------------------------------------------------------------------

// Where sums are (R, columns) they are turned first.
static void store_dB(const Grad& g, int64_t n0, int64_t columns, const float* sums, bool turned, float* panel, float* turn) {
  const LowrankGrad& p = *g.p;
  if (turned) {
    pack_turned({const_cast<float*>(sums), BLOCK_LD, 1, DType::f32}, 0, p.R, 0, columns, g.width, g.width, panel, turn);
    sums = panel;
  }
  for (int64_t i = 0; i < columns; ++i) store_row_any(p.dB, n0 + i, 0, p.R, sums + i * g.width, p.scaling);
}

template <bool PAIRS>
static void up_stripe(const Grad& g, int64_t t, float* panel, float* block, float* lines, float* turn) {
  const LowrankGrad& p = *g.p;
  const int64_t begin = t * g.stripes.width, end = smaller(begin + g.stripes.width, p.N);
  for (int64_t n0 = begin; n0 < end; n0 += BLOCK) {
    const int64_t columns = smaller(BLOCK, end - n0);
    float* dB = g.dB + (t * ceil_div(g.stripes.width, BLOCK) + (n0 - begin) / BLOCK) * g.dB_floats;
    if (PAIRS && p.B.data)
      pack_words(p.B, n0, columns, 0, p.R, g.width, g.width, reinterpret_cast<uint64_t*>(panel), turn);
    else if (p.B.col_index)
      pack_turned({p.B.data, p.B.col_stride, p.B.row_stride, p.B.dtype, p.B.col_index}, 0, p.R, n0, columns, g.width, g.width, panel, turn);
    else if (p.B.data)
      pack_rows(p.B, n0, columns, 0, p.R, g.width, g.width, panel);
    for (int64_t m = g.m0; m < g.m1; m += ROWS<PAIRS>) {
      const int64_t rows = smaller(ROWS<PAIRS>, g.m1 - m);
      Ahead ahead(p.dy, m + ROWS<PAIRS>, smaller(ROWS<PAIRS>, g.m1 - m - ROWS<PAIRS>), n0, columns);
      float* du = g.parts + (t * g.slab + m - g.m0) * g.width;
      if (PAIRS) {
        const View dy = view_bf16(p.dy, m, rows, n0, columns, {}, block, BLOCK_LD);
        if (p.B.data) along({dy, reinterpret_cast<const uint64_t*>(panel), g.width, columns, du, g.width, n0 > begin}, rows, g.width, ahead);
        if (p.u.data) {
          pack_words(p.u, m, rows, 0, p.R, p.R, p.R, reinterpret_cast<uint32_t*>(lines), turn);
          across({reinterpret_cast<const uint32_t*>(lines), dy, rows, dB, BLOCK_LD, m > 0}, p.R, columns, ahead);
        }
        continue;
      }
      const View dy = p.u.data ? copy(p.dy, m, rows, n0, columns, {}, block) : view(p.dy, m, rows, n0, columns, {}, block);
      if (p.B.data)
        product({dy.at, dy.ld, 1, panel, g.width, columns, du, g.width, n0 > begin}, rows, g.width / VL, ahead);
      if (p.u.data) {
        View u = {static_cast<const float*>(p.u.data) + m * p.u.row_stride, p.u.row_stride};
        if (p.R != g.width) {
          pack_rows(p.u, m, rows, 0, p.R, g.width, g.width, lines);
          u = {lines, g.width};
        }
        product({dy.at, 1, dy.ld, u.at, u.ld, rows, dB, g.width, m > 0}, columns, g.width / VL, ahead);
      }
    }
    if (p.u.data && g.m1 == p.M) store_dB(g, n0, columns, dB, PAIRS, panel, turn);
  }
}

template <bool PAIRS>
static void up_tasks(int64_t begin, int64_t end, void* context) {
  const Grad& g = *static_cast<const Grad*>(context);
  const int64_t turn_floats = larger(TURN * BLOCK, 2 * g.width);
  Scratch scratch(WORKER, BLOCK * g.width + ROWS<PAIRS> * BLOCK_LD + ROWS<PAIRS> * g.width + turn_floats + 64);
  float *panel = scratch.next(BLOCK * g.width), *block = scratch.next(ROWS<PAIRS> * BLOCK_LD), *lines = scratch.next(ROWS<PAIRS> * g.width), *turn = scratch.next(turn_floats);
  for (int64_t t = begin; t < end; ++t) up_stripe<PAIRS>(g, t, panel, block, lines, turn);
}

#ifdef LK_ISA_AMX

LK_INLINE int64_t terms_of(const LowrankGrad& p, const Matrix& left, DType adapter) { return !tiled(p, left, adapter) ? 0 : whole_terms(adapter) ? 3 : 1; }
static int64_t packed_words(const Grad& g, int64_t rows) { return g.terms ? panel_words(g.terms, rows, g.p->R) : 0; }

// Every stripe meets all rows of u, or of du: they are packed once for all stripes.
struct Packing {
  const Grad& g;
  const Matrix& m;  // u or du
};
template <int TERMS>
static void pack_tasks(int64_t begin, int64_t end, void* context) {
  const auto& [g, m] = *static_cast<const Packing*>(context);
  for (int64_t i = begin * ROWS_MAX; i < smaller(end * ROWS_MAX, g.m1 - g.m0); i += ROWS_MAX)
    pack_panel<TERMS>(m, g.m0 + i, smaller(ROWS_MAX, g.m1 - g.m0 - i), 0, g.p->R, g.p->R, false, g.packed + rank_words(TERMS, i), rank_words(TERMS, g.m1 - g.m0));
}
static void pack(const Grad& g, const Matrix& m) {
  Packing packing = {g, m};
  if (g.packed && m.data) parallel_for(ceil_div(g.m1 - g.m0, ROWS_MAX), (g.m1 - g.m0) * g.p->R * g.terms, g.terms == 3 ? pack_tasks<3> : pack_tasks<1>, &packing);
}

// How many of the rows that are left come next: while they lie as tiles do, as many as stay in the second cache, else as many as are copied.
static int64_t rows_at_once(const Matrix& m, int64_t left, int64_t columns, const Mask& mask, int64_t R) {
  constexpr int64_t NEAR = 256;
  if (R > TILE_ROWS || left < TILE_DEPTH || !lie_whole(m, columns, mask)) return smaller(ROWS_MAX, left);
  return smaller(NEAR, left / TILE_DEPTH * TILE_DEPTH);
}

template <int TERMS>
static void tile_up_tasks(int64_t begin, int64_t end, void* context) {
  const Grad& g = *static_cast<const Grad*>(context);
  const LowrankGrad& p = *g.p;
  const int64_t turn_floats = larger(TURN * BLOCK, 2 * g.width), most = larger(panel_words(TERMS, BLOCK, p.R), BLOCK * g.width);
  Scratch scratch(WORKER, most + rows_floats(ROWS_MAX) + WIDE_WORDS + BLOCK * g.width + turn_floats + 96);
  float *panel = scratch.next(most), *block = scratch.next(rows_floats(ROWS_MAX)), *zipped = scratch.next(WIDE_WORDS), *sums = scratch.next(BLOCK * g.width), *turn = scratch.next(turn_floats);
  const auto words = [](float* at) { return reinterpret_cast<uint32_t*>(at); };
  const Tiles tiles;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * g.stripes.width, last = smaller(first + g.stripes.width, p.N);
    for (int64_t n0 = first; n0 < last; n0 += BLOCK) {
      const int64_t columns = smaller(BLOCK, last - n0), rank_step = rank_words(TERMS, columns);
      float* dB = g.dB + (t * ceil_div(g.stripes.width, BLOCK) + (n0 - first) / BLOCK) * g.dB_floats;
      if (p.B.data) pack_panel<TERMS>(p.B, n0, columns, 0, p.R, p.R, true, words(panel), rank_step);
      for (int64_t m = g.m0, rows; m < g.m1; m += rows) {
        rows = rows_at_once(p.dy, g.m1 - m, columns, {}, p.R);
        const Rows dy = rows_of(p.dy, m, rows, n0, columns, {}, reinterpret_cast<uint16_t*>(block));
        float* du = g.parts + (t * g.slab + m - g.m0) * g.width;
        // One pass where dy comes from memory; copies are near, and take 0.90 to 0.97 of the time four tiles of rows at a time (many adapters).
        const bool together = p.B.data && p.u.data && p.R <= TILE_ROWS && lie_whole(p.dy, columns, {});
        if (p.B.data && !together) along_tiles<TERMS>({dy, words(panel), rank_step, ceil_div(columns, TILE_DEPTH), du, g.width, n0 == first}, rows, g.width);
        const Besides<TERMS> besides = {words(panel), together ? du : nullptr, n0 == first};
        if (p.u.data) across_tiles<TERMS>({g.packed + rank_words(TERMS, m - g.m0), rank_words(TERMS, g.m1 - g.m0), dy, rows, m == g.m0}, p.R, columns, sums, words(zipped), besides);
      }
      if (p.u.data) store_sums(sums, p.R, columns, dB, BLOCK_LD, g.m0 > 0);
      if (p.u.data && g.m1 == p.M) store_dB(g, n0, columns, dB, true, panel, turn);
    }
  }
}
static Body tile_up(const Grad& g) { return g.terms == 3 ? tile_up_tasks<3> : g.terms == 1 ? tile_up_tasks<1> : nullptr; }
#else
static int64_t terms_of(const LowrankGrad&, const Matrix&, DType) { return 0; }
static int64_t packed_words(const Grad&, int64_t) { return 0; }
static void pack(const Grad&, const Matrix&) {}
static Body tile_up(const Grad&) { return nullptr; }
#endif

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
  const Matrix& adapter = p.B.data ? p.B : p.dB;
  Grad g = {&p, split(p.N), round_up(p.R, VL), paired(p.dy, adapter), terms_of(p, p.dy, adapter.dtype), nullptr, nullptr, 0, 0, 0, 0};
  g.dB_floats = BLOCK_LD * g.width;
  g.slab = smaller(round_up(p.M, VL), larger(ROWS_MAX, PART_FLOATS / (g.stripes.count * g.width) / ROWS_MAX * ROWS_MAX));
  const int64_t parts = p.B.data ? g.stripes.count * g.slab * g.width : 0, dB = p.u.data ? g.stripes.count * ceil_div(g.stripes.width, BLOCK) * g.dB_floats : 0;
  const int64_t packed = p.u.data ? packed_words(g, g.slab) : 0;
  Scratch scratch(CALLER, parts + dB + packed + 32);
  g.parts = scratch.next(parts), g.dB = scratch.next(dB);
  if (packed) g.packed = reinterpret_cast<uint32_t*>(scratch.next(packed));
  const Body tiles = tile_up(g);
  for (g.m0 = 0; g.m0 < p.M; g.m0 = g.m1) {
    g.m1 = smaller(g.m0 + g.slab, p.M);
    pack(g, p.u);
    parallel_for(g.stripes.count, (g.m1 - g.m0) * p.N * 2 * g.width, tiles ? tiles : g.pairs ? up_tasks<HAS_DOT> : up_tasks<false>, &g);
    if (p.B.data) parallel_for(ceil_div(g.m1 - g.m0, SUM_ROWS), (g.m1 - g.m0) * g.stripes.count * g.width, sum_parts, &g);
  }
}

// -- dA ----------------------------------------------------------------------------------------------------------------

template <bool PAIRS>
static void down_tasks(int64_t begin, int64_t end, void* context) {
  const Grad& g = *static_cast<const Grad*>(context);
  const LowrankGrad& p = *g.p;
  const bool dropout = p.dropout.threshold;
  const Mask mask = {dropout ? p.dropout.seed : nullptr, p.dropout.threshold};
  const int64_t turn_floats = larger(BLOCK, p.R);
  Scratch scratch(WORKER, ROWS<PAIRS> * BLOCK_LD + p.R * BLOCK_LD + ROWS<PAIRS> * p.R + turn_floats + 64);
  float *block = scratch.next(ROWS<PAIRS> * BLOCK_LD), *sums = scratch.next(p.R * BLOCK_LD), *lines = scratch.next(ROWS<PAIRS> * p.R), *turn = scratch.next(turn_floats);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t end_k = smaller((t + 1) * g.stripes.width, p.K);
    for (int64_t k0 = t * g.stripes.width; k0 < end_k; k0 += BLOCK) {
      const int64_t columns = smaller(BLOCK, end_k - k0);
      for (int64_t m = 0; m < p.M; m += ROWS<PAIRS>) {
        const int64_t rows = smaller(ROWS<PAIRS>, p.M - m);
        Ahead ahead(p.x, m + ROWS<PAIRS>, smaller(ROWS<PAIRS>, p.M - m - ROWS<PAIRS>), k0, columns);
        if (PAIRS) {
          const View x = view_bf16(p.x, m, rows, k0, columns, mask, block, BLOCK_LD);
          pack_words(p.du, m, rows, 0, p.R, p.R, p.R, reinterpret_cast<uint32_t*>(lines), turn);
          across({reinterpret_cast<const uint32_t*>(lines), x, rows, sums, BLOCK_LD, m > 0}, p.R, columns, ahead);
        } else {
          const View x = copy(p.x, m, rows, k0, columns, mask, block);
          const float* du = static_cast<const float*>(p.du.data) + m * p.du.row_stride;
          product({du, 1, p.du.row_stride, x.at, x.ld, rows, sums, BLOCK_LD, m > 0}, p.R, ceil_div(columns, VL), ahead);
        }
      }
      for (int64_t r = 0; r < p.R; ++r) store_row_any(p.dA, r, k0, columns, sums + r * BLOCK_LD, dropout ? p.dropout.scale : 1.0f);
    }
  }
}

#ifdef LK_ISA_AMX
template <int TERMS>
static void tile_down_tasks(int64_t begin, int64_t end, void* context) {
  const Grad& g = *static_cast<const Grad*>(context);
  const LowrankGrad& p = *g.p;
  const bool dropout = p.dropout.threshold;
  const Mask mask = {dropout ? p.dropout.seed : nullptr, p.dropout.threshold};
  const int64_t own = g.packed ? 0 : panel_words(TERMS, ROWS_MAX, p.R);
  Scratch scratch(WORKER, p.R * BLOCK_LD + own + rows_floats(ROWS_MAX) + WIDE_WORDS + round_up(p.R, TILE_ROWS) * BLOCK + 96);
  float *dA = scratch.next(p.R * BLOCK_LD), *lines = scratch.next(own), *block = scratch.next(rows_floats(ROWS_MAX)), *zipped = scratch.next(WIDE_WORDS), *sums = scratch.next(round_up(p.R, TILE_ROWS) * BLOCK);
  const Tiles tiles;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t last = smaller((t + 1) * g.stripes.width, p.K);
    for (int64_t k0 = t * g.stripes.width; k0 < last; k0 += BLOCK) {
      const int64_t columns = smaller(BLOCK, last - k0);
      for (int64_t m = 0, rows; m < p.M; m += rows) {
        rows = g.packed ? rows_at_once(p.x, p.M - m, columns, mask, p.R) : smaller(ROWS_MAX, p.M - m);
        const Rows x = rows_of(p.x, m, rows, k0, columns, mask, reinterpret_cast<uint16_t*>(block));
        uint32_t* du = g.packed ? g.packed + rank_words(TERMS, m) : reinterpret_cast<uint32_t*>(lines);
        if (!g.packed) pack_panel<TERMS>(p.du, m, rows, 0, p.R, p.R, false, du, rank_words(TERMS, rows));
        across_tiles<TERMS>({du, rank_words(TERMS, g.packed ? p.M : rows), x, rows, m == 0}, p.R, columns, sums, reinterpret_cast<uint32_t*>(zipped));
      }
      store_sums(sums, p.R, columns, dA, BLOCK_LD, false);
      for (int64_t r = 0; r < p.R; ++r) store_row_any(p.dA, r, k0, columns, dA + r * BLOCK_LD, dropout ? p.dropout.scale : 1.0f);
    }
  }
}
static Body tile_down(const Grad& g) { return g.terms == 3 ? tile_down_tasks<3> : g.terms == 1 ? tile_down_tasks<1> : nullptr; }
#else
static Body tile_down(const Grad&) { return nullptr; }
#endif

static void down(const LowrankGrad& p) {
  Grad g = {&p, split(p.K), 0, paired(p.x, p.B), terms_of(p, p.x, p.B.dtype), nullptr, nullptr, 0, 0, 0, p.M};
  const int64_t packed = packed_words(g, p.M), fits = packed <= SCRATCH_KEPT ? packed : 0;
  Scratch scratch(CALLER, fits);
  if (fits) g.packed = reinterpret_cast<uint32_t*>(scratch.at);
  pack(g, p.du);
  const Body tiles = tile_down(g);
  parallel_for(g.stripes.count, p.M * p.K * p.R, tiles ? tiles : g.pairs ? down_tasks<HAS_DOT> : down_tasks<false>, &g);
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
