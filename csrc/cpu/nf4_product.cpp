// y = x W^T + bias on packed NF4, or y = x W + bias where turned, without the low-rank term, for many rows of x: tiles of W are decoded
// on their way to the product, here to float32, in nf4_pairs.h and nf4_tiles.h to bfloat16. Compiled once per instruction set (CMakeLists.txt), see vec.h.
#include "nf4_product.h"

#include "kernels.h"
#include "nf4_pairs.h"
#include "nf4_tiles.h"

namespace lk::cpu {
namespace {

// panel[n * WIDE + k]: columns k0.. of rows n0.. of W
static void decode_rows(const NF4Weight& w, const Decoder& decoder, int64_t n0, int64_t depth, int64_t k0, int64_t columns, float* panel) {
  for (int64_t n = 0; n < depth; ++n, panel += WIDE) {
    prefetch_codes(w, n0 + n, k0);
    decode_run(w, decoder, (n0 + n) * w.K + k0, columns, panel);
  }
}

// panel[k * WIDE + n]: columns k0 ... k0 + depth of rows n0.. of W
static void decode_columns(const NF4Weight& w, const Decoder& decoder, int64_t n0, int64_t columns, int64_t k0, int64_t depth, float* panel, float* lines) {
  for (int64_t n = 0; n < round_up(columns, VL); n += TURN) {
    const int64_t some = larger(0, smaller(TURN, columns - n));
    for (int64_t i = 0; i < some; ++i) decode_run(w, decoder, (n0 + n + i) * w.K + k0, depth, lines + i * BLOCK);
    pack_turned({lines, BLOCK, 1, DType::f32}, 0, some, 0, depth, smaller(TURN, round_up(columns, VL) - n), WIDE, panel + n, lines + TURN * BLOCK);
  }
}

// The same where K is a multiple of SHARE, which is of one block: what is turned is words of eight codes, and a lane has one column's.
constexpr int64_t SHARE = 32, WORD = 8;
static void decode_words(const NF4Weight& w, const Decoder& decoder, int64_t n0, int64_t columns, int64_t k0, int64_t depth, float* panel, float* lines) {
  float *words = lines, scales[WIDE] = {};
  pack_turned({const_cast<uint8_t*>(w.packed), w.K / WORD, 1, DType::f32}, n0, columns, k0 / WORD, depth / WORD, round_up(columns, VL), WIDE, words, words + BLOCK / WORD * WIDE);
  for (int64_t k = 0; k < depth; k += WORD) {
    if (k % SHARE == 0)
      for (int64_t n = 0; n < columns; ++n) scales[n] = scale_of(w, ((n0 + n) * w.K + k0 + k) >> w.block_shift);
    for (int64_t n = 0; n < columns; n += VL) {
      const Vec word = load(words + k / WORD * WIDE + n), scale = load(scales + n);
#pragma GCC unroll 8
      for (int j = 0; j < WORD; ++j) store(panel + (k + (j ^ 1)) * WIDE + n, mul(decode_place(decoder, word, j), scale));
    }
  }
}

constexpr int64_t LINES = BLOCK / WORD * (WIDE + TURN) + 2 * TURN * BLOCK;  // floats of scratch that either takes

}  // namespace

namespace LK_ISA_NAME {

void nf4_product(const NF4Product& product) {
  const NF4Linear& p = product.linear;
  const int64_t columns = product.turned ? p.w.K : p.w.N;
  const Panels panels = {p.x, p.bias, p.lowrank.y, p.lowrank.M, product.turned ? p.w.N : p.w.K, columns};
#if defined(LK_ISA_AMX)
  if (p.x.dtype == DType::bf16) return product_in_tiles({&p, product.turned, columns, panels.wide()});
#elif defined(LK_ISA_AVX512BF16)
  if (p.x.dtype == DType::bf16 && (product.turned || p.w.K % RUN == 0)) return product_in_pairs({&p, product.turned, columns, panels.wide()});
#endif
  const NF4Weight& w = p.w;
  const Decoder decoder;
  const auto decode_turned = w.K % SHARE == 0 ? decode_words : decode_columns;
  panel_product(panels, LINES, [&](int64_t d, int64_t depth, int64_t c0, int64_t count, float* panel, float* lines) {
    if (product.turned)
      decode_rows(w, decoder, d, depth, c0, count, panel);
    else
      decode_turned(w, decoder, c0, count, d, depth, panel, lines);
  });
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
