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
    for (int64_t c = 0; c < p.columns; c += CHUNK) {
      const int64_t some = smaller(CHUNK, p.columns - c);
      decode_run(p.w, decoder, first + c, some, values);
      store_row_any(p.out, row, c, some, values, 1.0f);
    }
  }
}

// How many boundaries lie below each of VL values: the code.
LK_INLINE int code_for(float value) {
  int code = 0;
  for (int i = 0; i < 15; ++i) code += value > BOUNDARIES[i];
  return code;
}

#if defined(LK_ISA_AVX512)
LK_INLINE void codes_for(Vec value, int32_t* out) {
  __m512i code = _mm512_setzero_si512();
  for (int i = 0; i < 15; ++i)
    code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(value, broadcast(BOUNDARIES[i]), _CMP_GT_OQ), code, _mm512_set1_epi32(1));
  _mm512_storeu_si512(out, code);
}
LK_INLINE Vec larger_magnitude(Vec a, Vec b) { return _mm512_max_ps(a, _mm512_abs_ps(b)); }
#elif defined(LK_ISA_AVX2)
LK_INLINE void codes_for(Vec value, int32_t* out) {
  __m256i code = _mm256_setzero_si256();
  for (int i = 0; i < 15; ++i)  // a comparison that holds is -1
    code = _mm256_sub_epi32(code, _mm256_castps_si256(_mm256_cmp_ps(value, broadcast(BOUNDARIES[i]), _CMP_GT_OQ)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), code);
}
LK_INLINE Vec larger_magnitude(Vec a, Vec b) { return _mm256_max_ps(a, _mm256_andnot_ps(broadcast(-0.0f), b)); }
#else
LK_INLINE void codes_for(Vec value, int32_t* out) {
  for (int i = 0; i < VL; ++i) out[i] = code_for(value.lane[i]);
}
LK_INLINE Vec larger_magnitude(Vec a, Vec b) {
  for (int i = 0; i < VL; ++i) {
    const float m = b.lane[i] < 0 ? -b.lane[i] : b.lane[i];
    if (m > a.lane[i]) a.lane[i] = m;
  }
  return a;
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
    Vec most = zero();
    for (int64_t i = 0; i < padded; i += VL) most = larger_magnitude(most, load(values + i));
    float lanes[VL], absmax = 0.0f;
    store(lanes, most);
    for (int i = 0; i < VL; ++i) absmax = lanes[i] > absmax ? lanes[i] : absmax;
    p.absmax[block] = absmax;
    const Vec inverse = broadcast(1.0f / (absmax > NF4_TINY ? absmax : NF4_TINY));
    uint8_t* packed = p.packed + (first >> 1);
    for (int64_t i = 0; i < padded; i += VL) {
      int32_t code[VL];
      codes_for(mul(load(values + i), inverse), code);
      for (int j = 0; j < VL && i + j < count; j += 2)
        packed[(i + j) >> 1] = static_cast<uint8_t>(code[j] << 4 | (i + j + 1 < count ? code[j + 1] : 0));
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
  parallel_for(ceil_div(p.count, blocksize), p.count * 16, quantize_blocks, const_cast<QuantizeNF4*>(&p));
}

}  // namespace LK_ISA_NAME
}  // namespace lk::cpu
