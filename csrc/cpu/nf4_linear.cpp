// y = x W^T + bias on packed NF4, without the low-rank term, for few rows of x. Compiled once per instruction set (CMakeLists.txt), see vec.h.
//
// A task owns columns of y: it streams their packed rows once. The sum over a block of W runs over the codes alone and
// meets the block's scale once: sum over blocks of scale * (sum over k of x code). The order depends on K alone, so bits
// don't depend on threads or on the rows beside a row.
#include "kernels.h"
#include "nf4_runs.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

// x as it is, float32: any K, and any place of the blocks.
struct Plain {
  using Value = float;
  Decoder decoder;
};

// out[r] = the dot product of row n of W with row r of x
template <int ROWS>
static void dot_plain(const NF4Weight& w, const Decoder& decoder, int64_t n, const float* x, int64_t x_ld, float* out) {
  constexpr int PARTS = 2;  // sums of a row, which hide the latency of the additions
  const int64_t first = n * w.K, blocksize = int64_t{1} << w.block_shift;
  Vec sum[ROWS];
  float edge[ROWS];
  for (int r = 0; r < ROWS; ++r) sum[r] = zero(), edge[r] = 0.0f;
  for (int64_t at = first, end = first + w.K; at < end;) {
    const int64_t block = at >> w.block_shift, stop = smaller(end, (block + 1) * blocksize);
    const float scale = scale_of(w, block);
    const auto single = [&] {
      const float value = code_of(w.packed, at) * scale;
      for (int r = 0; r < ROWS; ++r) edge[r] += value * x[r * x_ld + at - first];
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
        for (int r = 0; r < ROWS; ++r) part[r][j] = fma(codes, load(here + r * x_ld), part[r][j]);
      }
    for (; steps; --steps, here += VL, packed += VL / 2) {
      const Vec codes = decode(decoder, packed);
      for (int r = 0; r < ROWS; ++r) part[r][0] = fma(codes, load(here + r * x_ld), part[r][0]);
    }
    for (int r = 0; r < ROWS; ++r) sum[r] = fma(broadcast(scale), add(part[r][0], part[r][1]), sum[r]);
    while (at < stop) single();
  }
  for (int r = 0; r < ROWS; ++r) out[r] = total(sum[r]) + edge[r];
}

template <int ROWS>
static void dot_group(Scales& scales, const Plain& form, int64_t n, int64_t columns, const float* x, int64_t x_ld, bool, float* out, int64_t out_ld) {
  for (int64_t c = 0; c < columns; ++c) {
    float sums[ROWS];
    dot_plain<ROWS>(scales.w, form.decoder, n + c, x, x_ld, sums);
    for (int r = 0; r < ROWS; ++r) out[r * out_ld + c] = sums[r];
  }
}

template <class Form>
struct Call {
  const NF4Linear* p;
  const typename Form::Value* x;
  int64_t x_ld;
};

// rows <= ROWS of a group, whose number the compiler is to know
template <int ROWS, class Form>
static void dot_rows(int64_t rows, Scales& scales, const Form& form, int64_t n, int64_t columns, const typename Form::Value* x, int64_t x_ld, bool ahead, float* out) {
  if (rows == ROWS) return dot_group<ROWS>(scales, form, n, columns, x, x_ld, ahead, out, COLUMNS);
  if constexpr (ROWS > 1) dot_rows<ROWS - 1>(rows, scales, form, n, columns, x, x_ld, ahead, out);
}

template <class Form>
static void tasks(int64_t begin, int64_t end, void* context) {
  const Call<Form>& call = *static_cast<const Call<Form>*>(context);
  const NF4Linear& p = *call.p;
  const int64_t M = p.lowrank.M;
  const Form form;
  Scratch scratch(WORKER, Scales::floats(p.w, COLUMNS));
  Scales scales(p.w, COLUMNS, scratch.at);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n0 = t * COLUMNS, columns = smaller(COLUMNS, p.w.N - n0);
    for (int64_t m = 0; m < M; m += GROUP) {
      const int64_t rows = smaller(GROUP, M - m);
      float out[GROUP][COLUMNS];
      dot_rows<GROUP>(rows, scales, form, n0, columns, call.x + m * call.x_ld, call.x_ld, m == 0, out[0]);
      for (int64_t r = 0; r < rows; ++r) store_sums(p.lowrank.y, p.bias, m + r, n0, columns, out[r]);
    }
  }
}

template <class Form>
static void run(const NF4Linear& p, const typename Form::Value* x, int64_t x_ld) {
  Call<Form> call = {&p, x, x_ld};
  parallel_for(ceil_div(p.w.N, COLUMNS), p.lowrank.M * p.w.N * p.w.K, tasks<Form>, &call);
}

template <class Form>
static void run_laid_out(const NF4Linear& p) {
  const int64_t M = p.lowrank.M, K = p.w.K, ld = round_up(K, Form::STEP);
  Scratch scratch(CALLER, M * ld + round_up(K, 16));
  float* line = scratch.next(K);
  auto* x = reinterpret_cast<typename Form::Value*>(scratch.next(M * ld));
  for (int64_t m = 0; m < M; m += GROUP) lay_out<Form>(p.x, m, smaller(GROUP, M - m), K, x + m * ld, line);
  run<Form>(p, x, ld);
}

}  // namespace

namespace LK_ISA_NAME {

void nf4_linear(const NF4Linear& p) {
  const int64_t M = p.lowrank.M, K = p.w.K;
  if (M == 0) return;
#if defined(LK_ISA_AVX512BF16) && !defined(LK_ISA_AMX)
  if (p.x.dtype == DType::bf16 && K % 8 == 0) return run_laid_out<Pairs>(p);
#endif
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX2)
  if (K % 8 == 0) return run_laid_out<Singles>(p);
#endif
  if (p.x.dtype == DType::f32 && p.x.col_stride == 1) return run<Plain>(p, static_cast<const float*>(p.x.data), p.x.row_stride);
  Scratch scratch(CALLER, M * K);
  for (int64_t m = 0; m < M; ++m) load_row_any(p.x, m, 0, K, scratch.at + m * K);
  run<Plain>(p, scratch.at, K);
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
