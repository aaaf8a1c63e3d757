// y = x W^T + bias on packed NF4, for few rows of x. Compiled once per instruction set (CMakeLists.txt), see vec.h.
//
// A task owns columns of y: it streams their packed rows once. The sum over a block of W runs over the codes alone and
// meets the block's scale once: sum over blocks of scale * (sum over k of x code). The order depends on K alone, so bits
// don't depend on threads or on the rows beside a row.
#include "kernels.h"
#include "nf4.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

constexpr int64_t COLUMNS = 16;  // of a task
constexpr int GROUP = 4;         // rows of x that meet a code while it is in a register
constexpr int PARTS = 2;         // sums of a row, which hide the latency of the additions

struct Call {
  const NF4Linear* p;
  const float* x;  // (M, x_ld), float32
  int64_t x_ld;
};

LK_INLINE float total(Vec sum) {
  float lanes[VL];
  store(lanes, sum);
  for (int width = VL / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// out[r] = the dot product of row n of W with rows m..m+ROWS of x
template <int ROWS>
static void dot(const Call& call, const Decoder& decoder, int64_t n, int64_t m, float* out) {
  const NF4Weight& w = call.p->w;
  const float* x = call.x + m * call.x_ld;
  const int64_t first = n * w.K, blocksize = int64_t{1} << w.block_shift;
  Vec sum[ROWS];
  float edge[ROWS];
  for (int r = 0; r < ROWS; ++r) sum[r] = zero(), edge[r] = 0.0f;
  for (int64_t at = first, end = first + w.K; at < end;) {
    const int64_t block = at >> w.block_shift, stop = smaller(end, (block + 1) * blocksize);
    const float scale = scale_of(w, block);
    const auto single = [&] {
      const float value = code_of(w.packed, at) * scale;
      for (int r = 0; r < ROWS; ++r) edge[r] += value * x[r * call.x_ld + at - first];
      ++at;
    };
    if (at & 1) single();
    const uint8_t* packed = w.packed + (at >> 1);
    const float* here = x + (at - first);
    int64_t steps = (stop - at) / VL;
    at += steps * VL;
    Vec part[ROWS][PARTS];
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < PARTS; ++j) part[r][j] = zero();
    for (; steps >= PARTS; steps -= PARTS)
      for (int j = 0; j < PARTS; ++j, here += VL, packed += VL / 2) {
        const Vec codes = decode(decoder, packed);
        for (int r = 0; r < ROWS; ++r) part[r][j] = fma(codes, load(here + r * call.x_ld), part[r][j]);
      }
    for (; steps; --steps, here += VL, packed += VL / 2) {
      const Vec codes = decode(decoder, packed);
      for (int r = 0; r < ROWS; ++r) part[r][0] = fma(codes, load(here + r * call.x_ld), part[r][0]);
    }
    for (int r = 0; r < ROWS; ++r) sum[r] = fma(broadcast(scale), add(part[r][0], part[r][1]), sum[r]);
    while (at < stop) single();
  }
  for (int r = 0; r < ROWS; ++r) out[r] = total(sum[r]) + edge[r];
}

static void tasks(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  const NF4Linear& p = *call.p;
  const Decoder decoder;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n0 = t * COLUMNS, columns = smaller(COLUMNS, p.w.N - n0);
    for (int64_t m = 0; m < p.M; m += GROUP) {
      const int64_t rows = smaller(GROUP, p.M - m);
      float out[GROUP][COLUMNS];
      for (int64_t c = 0; c < columns; ++c) {
        float sums[GROUP];
        switch (rows) {
          case 1: dot<1>(call, decoder, n0 + c, m, sums); break;
          case 2: dot<2>(call, decoder, n0 + c, m, sums); break;
          case 3: dot<3>(call, decoder, n0 + c, m, sums); break;
          default: dot<GROUP>(call, decoder, n0 + c, m, sums);
        }
        const float bias = p.bias.data ? load_scalar(p.bias.data, p.bias.dtype, (n0 + c) * p.bias.col_stride) : 0.0f;
        for (int64_t r = 0; r < rows; ++r) out[r][c] = sums[r] + bias;
      }
      for (int64_t r = 0; r < rows; ++r) store_row_any(p.y, m + r, n0, columns, out[r], 1.0f);
    }
  }
}

}  // namespace

namespace LK_ISA_NAME {

void nf4_linear(const NF4Linear& p) {
  if (p.M == 0) return;
  Call call = {&p, static_cast<const float*>(p.x.data), p.x.row_stride};
  const bool as_it_is = p.x.dtype == DType::f32 && p.x.col_stride == 1;
  Scratch scratch(CALLER, as_it_is ? 1 : p.M * p.w.K);
  if (!as_it_is) {
    for (int64_t m = 0; m < p.M; ++m) load_row_any(p.x, m, 0, p.w.K, scratch.at + m * p.w.K);
    call.x = scratch.at, call.x_ld = p.w.K;
  }
  parallel_for(ceil_div(p.w.N, COLUMNS), p.M * p.w.N * p.w.K, tasks, &call);
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
