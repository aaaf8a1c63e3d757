// Many adapters in one batch: each one's rows meet the kernels of one adapter, which find them through an index. What is summed
// for a row does not depend on the rows beside it. Compiled once: the kernels are those of the instruction set in use.
#include "multi.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

constexpr int64_t MANY_ROWS = 256;  // of an adapter on average: enough for the kernels to share them out themselves

Matrix moved(Matrix m, int64_t elements) {
  if (m.data) m.data = static_cast<char*>(m.data) + elements * (m.dtype == DType::f32 ? 4 : 2);
  return m;
}

// A (R,K) of an adapter, or of one of its parts: the ranks are rows.
Matrix ranks_down(const Stack& stack, const Segments& s, int64_t e, int64_t part) {
  if (!s.pages) return moved(stack.first, e * stack.stride);
  Matrix m = moved(stack.first, part * stack.first.row_stride);
  m.row_stride = stack.stride, m.index = s.pages + e * s.pages_stride;
  return m;
}

// B (N,R), and what has its form: the ranks are columns.
Matrix ranks_across(const Stack& stack, const Segments& s, int64_t e) {
  if (!s.pages) return moved(stack.first, e * stack.stride);
  Matrix m = stack.first;
  m.col_stride = stack.stride, m.col_index = s.pages + e * s.pages_stride;
  return m;
}

// A matrix of x, dy or y: its rows through the order. One of u or du: its rows as they lie.
Matrix through(Matrix m, const Segments& s, int64_t begin) {
  m.index = s.order + begin;
  return m;
}
Matrix from(const Matrix& m, int64_t begin) { return moved(m, begin * m.row_stride); }

Dropout dropout(const Segments& s, int64_t e) {
  const uint32_t threshold = s.seed ? static_cast<uint32_t>(s.thresholds[e]) : 0;
  return {threshold ? s.seed : nullptr, threshold, threshold < 65536 ? 65536.0f / (65536 - threshold) : 0.0f};
}

int64_t rank_of(const Segments& s, int64_t e, int64_t part = 0) { return s.ranks ? s.ranks[part * s.E + e] : s.R; }

int64_t among(const Segments& s) { return std::max<int64_t>(s.M / std::max<int64_t>(s.E, 1), 1); }

template <class Params>
struct Call {
  const Params* p;
  void (*run)(const Params& p, int64_t e, int64_t begin, int64_t rows);
};

template <class Params>
void segments(int64_t first, int64_t last, void* context) {
  const Call<Params>& call = *static_cast<const Call<Params>*>(context);
  const Segments& s = call.p->segments;
  for (int64_t e = first; e < last; ++e) {
    const int64_t begin = s.starts[e], rows = s.starts[e + 1] - begin;
    if (rows > 0) call.run(*call.p, e, begin, rows);
  }
}

template <class Params>
void each(const Params& p, int64_t columns, void (*run)(const Params&, int64_t, int64_t, int64_t)) {
  const Segments& s = p.segments;
  Call<Params> call = {&p, run};
  const int64_t rows = s.starts[s.E] - s.starts[0];
  if (rows >= MANY_ROWS * s.E)
    segments<Params>(0, s.E, &call);
  else
    parallel_for(s.E, rows * columns * s.R, segments<Params>, &call);
}

// The rows sorted by adapter, by counting: starts[e] first counts, then says where the next row of adapter e goes. Place 0 is of
// rows without adapter, place E + 1 of those whose id is none.
template <class Id>
void route(const Route& p) {
  const Id* ids = static_cast<const Id*>(p.ids);
  const auto place = [&](int64_t row) {
    const int64_t id = ids[row * p.stride];
    return id < -1 || id >= p.E ? p.E + 1 : id + 1;
  };
  int64_t* next = p.starts;  // of places 1 to E + 1
  int64_t without = 0;
  std::fill(next, next + p.E + 1, 0);
  for (int64_t row = 0; row < p.M; ++row) {
    const int64_t at = place(row);
    ++(at ? next[at - 1] : without);
  }
  int64_t before = without;
  for (int64_t e = 0; e <= p.E; ++e) before += std::exchange(next[e], before);
  int64_t first = 0;
  for (int64_t row = 0; row < p.M; ++row) {
    const int64_t at = place(row);
    p.order[at ? next[at - 1]++ : first++] = row;
  }
  std::copy_backward(next, next + p.E, next + p.E + 1);  // where an adapter's rows end, the next one's begin
  next[0] = without;
}

// What has an id that is none gets no answer.
void refuse_rows(const MultiAdd& p) {
  const Segments& s = p.segments;
  const uint16_t nan16 = p.y.dtype == DType::bf16 ? 0x7fc0 : 0x7e00;
  for (int64_t place = s.starts[s.E]; place < s.M; ++place) {
    const int64_t row = s.order[place] * p.y.row_stride;
    for (int64_t n = 0; n < p.N; ++n) {
      if (p.y.dtype == DType::f32)
        static_cast<float*>(p.y.data)[row + n] = NAN;
      else
        static_cast<uint16_t*>(p.y.data)[row + n] = nan16;
    }
  }
}

}  // namespace

void multi_route(const Route& p) { p.wide ? route<int64_t>(p) : route<int32_t>(p); }

void multi_lowrank_down(const MultiDown& p) {
  each<MultiDown>(p, p.K * p.parts, [](const MultiDown& p, int64_t e, int64_t begin, int64_t rows) {
    const Segments& s = p.segments;
    LowrankDown one = {rows, p.K, through(p.x, s, begin), from(p.u, begin), 0, {}, dropout(s, e), s.pages ? 0 : p.A.stride, among(s)};
    for (int64_t i = 0; i < p.parts; ++i)
      if (const int64_t rank = rank_of(s, e, i)) one.part[one.parts++] = {ranks_down(p.A, s, e, i), rank, i * s.R};
    if (one.parts) kernels().lowrank_down(one);
  });
}

void multi_add_lowrank(const MultiAdd& p) {
  each<MultiAdd>(p, p.N, [](const MultiAdd& p, int64_t e, int64_t begin, int64_t rows) {
    const Segments& s = p.segments;
    const float scaling = s.scaling ? s.scaling[e] : 1.0f;
    if (const int64_t rank = rank_of(s, e))
      kernels().add_lowrank({rows, p.N, rank, through(p.y, s, begin), from(p.u, begin), ranks_across(p.B, s, e), {}, scaling, dropout(s, e), among(s)});
  });
  refuse_rows(p);
}

void multi_lowrank_grad(const MultiGrad& p) {
  each<MultiGrad>(p, p.N + p.K, [](const MultiGrad& p, int64_t e, int64_t begin, int64_t rows) {
    const Segments& s = p.segments;
    Matrix x = p.x;
    if (x.data) x = through(x, s, begin);
    const auto of = [e](const Stack& stack) { return moved(stack.first, e * stack.stride); };
    if (const int64_t rank = rank_of(s, e))
      kernels().lowrank_grad({rows, p.N, p.K, rank, through(p.dy, s, begin), x, from(p.u, begin), ranks_across(p.B, s, e), from(p.du, begin), of(p.dA), of(p.dB),
                              s.scaling ? s.scaling[e] : 1.0f, dropout(s, e), nullptr, among(s)});
  });
}

}  // namespace lk::cpu
