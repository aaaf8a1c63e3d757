// Many adapters in one batch: each one's rows meet the kernels of one adapter, which find them through an index. What is summed
// for a row does not depend on the rows beside it. Compiled once: the kernels are those of the instruction set in use.
#include "multi.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

// multiply-adds of an adapter: enough for the kernels to share them out themselves. Two threads, a step of 512 x 2048^2 with 8 float32 adapters,
// three quarters of the rows on one: 8.1 to 7.6 ms, all on one: 7.6 to 6.9 (the base alone 5.0).
constexpr int64_t WORTH_OWN = 4000000;

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

// What a caller's table says beyond R would be read, and written, behind an adapter's own.
int64_t rank_of(const Segments& s, int64_t e, int64_t part = 0) { return s.ranks ? std::clamp<int64_t>(s.ranks[part * s.E + e], 0, s.R) : s.R; }

int64_t among(const Segments& s) { return std::max<int64_t>(s.M / std::max<int64_t>(s.E, 1), 1); }

// What the adapters that rows name cost, in rows: one's own matrices come from memory too, and are packed.
constexpr int64_t COST_OF_ONE = 8;

struct Segment {
  int64_t e, begin, rows, before;  // cost of those before it
};

template <class Params>
struct Call {
  const Params* p;
  void (*run)(const Params& p, int64_t e, int64_t begin, int64_t rows);
  std::vector<Segment> segments;
  int64_t cost;
};

constexpr int64_t SHARES = 256;  // of all that they cost: a thread has neighbours among them

// The segments that begin in these shares
template <class Params>
void shares(int64_t begin, int64_t end, void* context) {
  const Call<Params>& call = *static_cast<const Call<Params>*>(context);
  const auto before = [](const Segment& s, int64_t cost) { return s.before < cost; };
  const auto from = [&](int64_t share) { return std::lower_bound(call.segments.begin(), call.segments.end(), call.cost * share / SHARES, before); };
  for (auto s = from(begin), last = from(end); s != last; ++s) call.run(*call.p, s->e, s->begin, s->rows);
}

// run for every adapter that rows name. One with more than half of a thread's part of the rows, and work enough to be shared out, comes
// first, by itself, and the kernels share it out; the others are shared out whole, as equally as they let. Bits are the same either way.
template <class Params>
void each(const Params& p, int64_t columns, void (*run)(const Params&, int64_t, int64_t, int64_t)) {
  const Segments& s = p.segments;
  const int64_t rows = s.starts[s.E] - s.starts[0], of_a_row = columns * s.R, fair = rows / (2 * threads());
  Call<Params> call = {&p, run, {}, 0};
  int64_t shared = 0;
  for (int64_t e = 0; e < s.E; ++e) {
    const int64_t begin = s.starts[e], some = s.starts[e + 1] - begin;
    if (some == 0) continue;
    if (some > fair && some * of_a_row > WORTH_OWN) {
      run(p, e, begin, some);
    } else {
      call.segments.push_back({e, begin, some, call.cost});
      call.cost += some + COST_OF_ONE, shared += some;
    }
  }
  if (call.segments.size() == 1)
    run(p, call.segments[0].e, call.segments[0].begin, call.segments[0].rows);
  else
    parallel_for(SHARES, shared * of_a_row, shares<Params>, &call);
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
