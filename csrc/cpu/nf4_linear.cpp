// y = x W^T + bias on packed NF4, without the low-rank term, for few rows of x. Compiled once per instruction set (CMakeLists.txt), see vec.h.
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
  const uint16_t* pairs = nullptr;  // where x is bfloat16 and stays so: (M, pairs_ld), in the order of Pairs
  int64_t pairs_ld = 0;
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

#ifdef LK_ISA_AVX512BF16
// The same with x and the codes in bfloat16, two products an instruction. Of 128 codes, 64 bytes, the ones that lie in the same
// place of their 16 bits are looked up at once, by an index of which only the low bits count: the shifted words themselves. So
// x is laid out once in the order that the codes come in: vector j has elements 4 w + (j ^ 1), w = 0..31, of each 128.
struct Pairs {
  static constexpr int64_t STEP = 128, VECTORS = 4, WORDS = 32;
  __m512i codes;
  Pairs() {
    alignas(64) uint16_t half[WORDS];
    for (int64_t i = 0; i < WORDS; ++i) half[i] = float_to_bf16(CODES[i % 16]);
    codes = _mm512_loadu_si512(half);
  }
};

static void lay_out(const Matrix& x, int64_t m, int64_t K, uint16_t* out) {
  const uint16_t* row = static_cast<const uint16_t*>(x.data) + m * x.row_stride;
  for (int64_t k0 = 0; k0 < K; k0 += Pairs::STEP)
    for (int64_t j = 0; j < Pairs::VECTORS; ++j)
      for (int64_t w = 0; w < Pairs::WORDS; ++w, ++out) {
        const int64_t k = k0 + 4 * w + (j ^ 1);
        *out = k < K ? row[k * x.col_stride] : uint16_t{0};
      }
}

// K is a multiple of 8: eight neighbours, a float32 lane's share, are of one block.
template <int ROWS>
static void dot_pairs(const Call& call, const Pairs& pairs, int64_t n, int64_t m, float* out) {
  const NF4Weight& w = call.p->w;
  const int64_t first = n * w.K, end = first + w.K;
  Vec sum[ROWS];
  for (int r = 0; r < ROWS; ++r) sum[r] = zero();
  const uint16_t* x = call.pairs + m * call.pairs_ld;
  for (int64_t at = first; at < end; at += Pairs::STEP, x += Pairs::STEP) {
    const int64_t left = smaller(Pairs::STEP, end - at);
    uint8_t bytes[64];
    const uint8_t* packed = w.packed + (at >> 1);
    if (left < Pairs::STEP) {  // what lies behind the row meets zeros of x, but may be behind the weight too
      memset(bytes, 0, sizeof bytes);
      memcpy(bytes, packed, left / 2);
      packed = bytes;
    }
    float scales[VL];
    for (int64_t i = 0; i < VL;) {
      const int64_t from = smaller(at + 8 * i, end - 8), block = from >> w.block_shift;
      const float scale = scale_of(w, block);
      const int64_t stop = i + larger(1, (((block + 1) << w.block_shift) - at) / 8 - i);
      for (; i < smaller(stop, VL); ++i) scales[i] = scale;
    }
    const __m512i words = _mm512_loadu_si512(packed);
    Vec part[ROWS];
    for (int r = 0; r < ROWS; ++r) part[r] = zero();
    const auto meet = [&](__m512i index, int64_t j) {
      const __m512i codes = _mm512_permutexvar_epi16(index, pairs.codes);
      for (int r = 0; r < ROWS; ++r)
        part[r] = _mm512_dpbf16_ps(part[r], (__m512bh)codes, (__m512bh)_mm512_loadu_si512(x + r * call.pairs_ld + j * Pairs::WORDS));
    };
    meet(words, 0);
    meet(_mm512_srli_epi16(words, 4), 1);
    meet(_mm512_srli_epi16(words, 8), 2);
    meet(_mm512_srli_epi16(words, 12), 3);
    for (int r = 0; r < ROWS; ++r) sum[r] = fma(load(scales), part[r], sum[r]);
  }
  for (int r = 0; r < ROWS; ++r) out[r] = total(sum[r]);
}
#endif

struct Lookup {
  Decoder decoder;
#ifdef LK_ISA_AVX512BF16
  Pairs pairs;
#endif
};

template <int ROWS>
static void dot_any(const Call& call, const Lookup& lookup, int64_t n, int64_t m, float* out) {
#ifdef LK_ISA_AVX512BF16
  if (call.pairs) return dot_pairs<ROWS>(call, lookup.pairs, n, m, out);
#endif
  dot<ROWS>(call, lookup.decoder, n, m, out);
}

static void tasks(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  const NF4Linear& p = *call.p;
  const int64_t M = p.lowrank.M;
  const Lookup lookup;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n0 = t * COLUMNS, columns = smaller(COLUMNS, p.w.N - n0);
    for (int64_t m = 0; m < M; m += GROUP) {
      const int64_t rows = smaller(GROUP, M - m);
      float out[GROUP][COLUMNS];
      for (int64_t c = 0; c < columns; ++c) {
        float sums[GROUP];
        switch (rows) {
          case 1: dot_any<1>(call, lookup, n0 + c, m, sums); break;
          case 2: dot_any<2>(call, lookup, n0 + c, m, sums); break;
          case 3: dot_any<3>(call, lookup, n0 + c, m, sums); break;
          default: dot_any<GROUP>(call, lookup, n0 + c, m, sums);
        }
        const float bias = p.bias.data ? load_scalar(p.bias.data, p.bias.dtype, (n0 + c) * p.bias.col_stride) : 0.0f;
        for (int64_t r = 0; r < rows; ++r) out[r][c] = sums[r] + bias;
      }
      for (int64_t r = 0; r < rows; ++r) store_row_any(p.lowrank.y, m + r, n0, columns, out[r], 1.0f);
    }
  }
}

}  // namespace

namespace LK_ISA_NAME {

void nf4_linear(const NF4Linear& p) {
  const int64_t M = p.lowrank.M;
  if (M == 0) return;
  Call call = {&p, static_cast<const float*>(p.x.data), p.x.row_stride};
#ifdef LK_ISA_AVX512BF16
  if (p.x.dtype == DType::bf16 && p.w.K % 8 == 0) {
    call.pairs_ld = round_up(p.w.K, Pairs::STEP);
    Scratch scratch(CALLER, ceil_div(M * call.pairs_ld, 2));
    uint16_t* pairs = reinterpret_cast<uint16_t*>(scratch.at);
    for (int64_t m = 0; m < M; ++m) lay_out(p.x, m, p.w.K, pairs + m * call.pairs_ld);
    call.pairs = pairs;
    return parallel_for(ceil_div(p.w.N, COLUMNS), M * p.w.N * p.w.K, tasks, &call);
  }
#endif
  const bool as_it_is = p.x.dtype == DType::f32 && p.x.col_stride == 1;
  Scratch scratch(CALLER, as_it_is ? 1 : M * p.w.K);
  if (!as_it_is) {
    for (int64_t m = 0; m < M; ++m) load_row_any(p.x, m, 0, p.w.K, scratch.at + m * p.w.K);
    call.x = scratch.at, call.x_ld = p.w.K;
  }
  parallel_for(ceil_div(p.w.N, COLUMNS), M * p.w.N * p.w.K, tasks, &call);
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
