// Many adapters in one batch: each one's rows meet the kernels of one adapter, which find them through an index. What is summed
// for a row does not depend on the rows beside it. Compiled once: the kernels are those of the instruction set in use.
#include "multi.h"

#include "kernels.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

constexpr int64_t MANY_ROWS = 256;  // of an adapter on average: enough for the kernels to share them out themselves

Matrix of(const Stack& stack, int64_t e) {
  Matrix m = stack.first;
  const int64_t size = m.dtype == DType::f32 ? 4 : 2;
  if (m.data) m.data = static_cast<char*>(m.data) + e * stack.stride * size;
  return m;
}

// A matrix of x, dy or y: its rows through the order. One of u or du: its rows as they lie.
Matrix through(Matrix m, const Segments& s, int64_t begin) {
  m.index = s.order + begin;
  return m;
}
Matrix from(Matrix m, int64_t begin) {
  if (m.data) m.data = static_cast<float*>(m.data) + begin * m.row_stride;
  return m;
}

Dropout dropout(const Segments& s, int64_t e) {
  const uint32_t threshold = s.seed ? static_cast<uint32_t>(s.thresholds[e]) : 0;
  return {threshold ? s.seed : nullptr, threshold, threshold < 65536 ? 65536.0f / (65536 - threshold) : 0.0f};
}

template <class Params>
struct Call {
  const Params* p;
  void (*run)(const Params& p, int64_t e, int64_t begin, int64_t rows, int64_t rank);
};

template <class Params>
void segments(int64_t first, int64_t last, void* context) {
  const Call<Params>& call = *static_cast<const Call<Params>*>(context);
  const Segments& s = call.p->segments;
  for (int64_t e = first; e < last; ++e) {
    const int64_t begin = s.starts[e], rows = s.starts[e + 1] - begin, rank = s.ranks ? s.ranks[e] : s.R;
    if (rows > 0 && rank > 0) call.run(*call.p, e, begin, rows, rank);
  }
}

template <class Params>
void each(const Params& p, int64_t columns, void (*run)(const Params&, int64_t, int64_t, int64_t, int64_t)) {
  const Segments& s = p.segments;
  Call<Params> call = {&p, run};
  const int64_t rows = s.starts[s.E] - s.starts[0];
  if (rows >= MANY_ROWS * s.E)
    segments<Params>(0, s.E, &call);
  else
    parallel_for(s.E, rows * columns * s.R, segments<Params>, &call);
}

}  // namespace

void multi_lowrank_down(const MultiDown& p) {
  each<MultiDown>(p, p.K, [](const MultiDown& p, int64_t e, int64_t begin, int64_t rows, int64_t rank) {
    LowrankDown one = {rows, p.K, through(p.x, p.segments, begin), from(p.u, begin), 1, {}, dropout(p.segments, e)};
    one.part[0] = {of(p.A, e), rank};
    kernels().lowrank_down(one);
  });
}

void multi_add_lowrank(const MultiAdd& p) {
  each<MultiAdd>(p, p.N, [](const MultiAdd& p, int64_t e, int64_t begin, int64_t rows, int64_t rank) {
    const float scaling = p.segments.scaling ? p.segments.scaling[e] : 1.0f;
    kernels().add_lowrank({rows, p.N, rank, through(p.y, p.segments, begin), from(p.u, begin), of(p.B, e), {}, scaling, dropout(p.segments, e)});
  });
}

void multi_lowrank_grad(const MultiGrad& p) {
  each<MultiGrad>(p, p.N + p.K, [](const MultiGrad& p, int64_t e, int64_t begin, int64_t rows, int64_t rank) {
    const Segments& s = p.segments;
    Matrix x = p.x;
    if (x.data) x = through(x, s, begin);
    kernels().lowrank_grad({rows, p.N, p.K, rank, through(p.dy, s, begin), x, from(p.u, begin), of(p.B, e), from(p.du, begin), of(p.dA, e), of(p.dB, e),
                            s.scaling ? s.scaling[e] : 1.0f, dropout(s, e), nullptr});
  });
}

}  // namespace lk::cpu
