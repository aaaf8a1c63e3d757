// NF4 into a dense matrix, and back. Compiled once per instruction set (CMakeLists.txt), see vec.h.
#include "nf4.h"

#include "kernels.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

constexpr int64_t CHUNK = 2048;  // elements that are decoded at a time: within the first cache

static void dequantize_rows(int64_t begin, int64_t end, void* context) {
  const DequantizeNF4& p = *static_cast<const DequantizeNF4*>(context);
  const Decoder decoder;
  float values[CHUNK];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = (p.n0 + row) * p.w.K + p.k0;
    if (p.out.dtype == DType::f32) {
      decode_run(p.w, decoder, first, p.columns, static_cast<float*>(p.out.data) + row * p.out.row_stride);
      continue;
    }
#ifdef LK_ISA_AVX512BF16
    if (p.out.dtype == DType::bf16) {
      decode_run_bf16(p.w, decoder, first, p.columns, static_cast<uint16_t*>(p.out.data) + row * p.out.row_stride);
      continue;
    }
#endif
    for (int64_t c = 0; c < p.columns; c += CHUNK) {
      const int64_t some = smaller(CHUNK, p.columns - c);
      decode_run(p.w, decoder, first + c, some, values);
      store_row_any(p.out, row, c, some, values, 1.0f);
    }
  }
}

// The code of a value is how many boundaries lie below it, found by halving: at each of four steps a code's leading bits name
// the boundary that decides the next.
alignas(64) constexpr float HALVES[4][16] = {
    {BOUNDARIES[7]},
    {BOUNDARIES[3], BOUNDARIES[11]},
    {BOUNDARIES[1], BOUNDARIES[5], BOUNDARIES[9], BOUNDARIES[13]},
    {BOUNDARIES[0], BOUNDARIES[2], BOUNDARIES[4], BOUNDARIES[6], BOUNDARIES[8], BOUNDARIES[10], BOUNDARIES[12], BOUNDARIES[14]}};

// VL values -> VL / 2 bytes; the even element of a pair in the high half
#if defined(LK_ISA_AVX512)
LK_INLINE void encode(Vec value, uint8_t* out) {
  const __m512i one = _mm512_set1_epi32(1);
  const __mmask16 upper = _mm512_cmp_ps_mask(value, broadcast(HALVES[0][0]), _CMP_GT_OQ);
  __m512i code = _mm512_maskz_mov_epi32(upper, one);
  Vec boundary = _mm512_mask_blend_ps(upper, broadcast(HALVES[1][0]), broadcast(HALVES[1][1]));
  for (int step = 1;; ++step) {  // the first step and the second one's boundaries need no lookup
    const __mmask16 above = _mm512_cmp_ps_mask(value, boundary, _CMP_GT_OQ);
    code = _mm512_add_epi32(code, code);
    code = _mm512_mask_add_epi32(code, above, code, one);
    if (step == 3) break;
    boundary = _mm512_permutexvar_ps(code, _mm512_load_ps(HALVES[step + 1]));
  }
  const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm512_cvtepi64_epi8(pairs));
}
// The bits of the largest magnitude of whole vectors; of what is not finite they are larger than those of any number.
LK_INLINE uint32_t largest_magnitude(const float* values, int64_t count) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += VL) most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(load(values + i))));
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(most));
}
#elif defined(LK_ISA_AVX2)
LK_INLINE void encode(Vec value, uint8_t* out) {
  __m256i code = _mm256_setzero_si256();
  for (int step = 0; step < 4; ++step) {
    const __m256 boundary = _mm256_permutevar8x32_ps(_mm256_load_ps(HALVES[step]), code);
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(value, boundary, _CMP_GT_OQ));  // -1 where it is
    code = _mm256_sub_epi32(_mm256_add_epi32(code, code), above);
  }
  const __m256i pairs = _mm256_or_si256(_mm256_slli_epi64(code, 4), _mm256_srli_epi64(code, 32));
  const __m256i spread = _mm256_shuffle_epi8(pairs, _mm256_set1_epi32(0x80800800));  // bytes 0 and 8 of each half
  const uint32_t four = static_cast<uint32_t>(_mm256_extract_epi16(spread, 0)) | static_cast<uint32_t>(_mm256_extract_epi16(spread, 8)) << 16;
  memcpy(out, &four, 4);
}
LK_INLINE uint32_t largest_magnitude(const float* values, int64_t count) {
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += VL) most = _mm256_max_epi32(most, _mm256_castps_si256(_mm256_andnot_ps(broadcast(-0.0f), load(values + i))));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
}
#else
LK_INLINE void encode(Vec value, uint8_t* out) {
  int code[VL];
  for (int i = 0; i < VL; ++i) {
    code[i] = 0;
    for (int step = 0; step < 4; ++step) code[i] = 2 * code[i] + (value.lane[i] > HALVES[step][code[i]]);
  }
  for (int i = 0; i < VL; i += 2) out[i / 2] = static_cast<uint8_t>(code[i] << 4 | code[i + 1]);
}
LK_INLINE uint32_t largest_magnitude(const float* values, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = float_to_bits(values[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}
#endif

static void quantize_blocks(int64_t begin, int64_t end, void* context) {
  const QuantizeNF4& p = *static_cast<const QuantizeNF4*>(context);
  const int64_t blocksize = int64_t{1} << p.block_shift;
  const Matrix weight = {const_cast<void*>(p.weight), 0, 1, p.dtype};
  float values[4096];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * blocksize, count = smaller(blocksize, p.count - first), padded = round_up(count, VL);
    load_row_any(weight, 0, first, count, values);
    for (int64_t i = count; i < padded; ++i) values[i] = 0.0f;
    constexpr uint32_t INFINITE = 0x7f800000u;
    const uint32_t most = largest_magnitude(values, padded);
    const float absmax = bits_to_float(most < INFINITE ? most : INFINITE);
    p.absmax[block] = absmax;
    const Vec inverse = broadcast(1.0f / (absmax > NF4_TINY ? absmax : NF4_TINY));
    uint8_t* packed = p.packed + (first >> 1);
    uint8_t last[VL / 2];
    for (int64_t i = 0; i < padded; i += VL) {
      const bool whole = i + VL <= count;
      encode(mul(load(values + i), inverse), whole ? packed + (i >> 1) : last);
      if (whole) continue;
      memcpy(packed + (i >> 1), last, (count - i + 1) / 2);
      if (count & 1) packed[count >> 1] &= 0xf0;  // the half byte behind the last element
    }
  }
}

}  // namespace

namespace LK_ISA_NAME {

void dequantize_nf4(const DequantizeNF4& p) {
  parallel_for(p.rows, p.rows * p.columns, dequantize_rows, const_cast<DequantizeNF4*>(&p));
}

void quantize_nf4(const QuantizeNF4& p) {
  const int64_t blocksize = int64_t{1} << p.block_shift;
  parallel_for(ceil_div(p.count, blocksize), p.count * 8, quantize_blocks, const_cast<QuantizeNF4*>(&p));
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
