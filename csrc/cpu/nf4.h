// NF4 codes into float32 vectors, for the instruction set that this file is compiled for. See vec.h on linkage.
#pragma once
#include "../nf4.h"
#include "tile.h"

namespace lk::cpu {
namespace {

alignas(64) constexpr float CODES[16] = {LK_NF4_CODES};
constexpr float BOUNDARIES[15] = {LK_NF4_BOUNDARIES};

LK_INLINE float load_float(const uint8_t* bytes, int64_t index) {  // a checkpoint's bytes may lie anywhere
  float value;
  memcpy(&value, bytes + index * 4, 4);
  return value;
}

LK_INLINE float scale_of(const NF4Weight& w, int64_t block) {
  if (!w.nested) return load_float(w.absmax, block);
  const float product = load_float(w.nested, 1 + w.absmax[block]) * load_float(w.nested, 257 + (block >> w.nested_shift));
  return product + load_float(w.nested, 0);
}

LK_INLINE float code_of(const uint8_t* packed, int64_t element) {
  const uint8_t pair = packed[element >> 1];
  return CODES[element & 1 ? pair & 15 : pair >> 4];
}

// The codes of VL elements from VL / 2 bytes. What a lookup needs stays in registers.
#if defined(LK_ISA_AVX512)
struct Decoder {
  __m512 codes = _mm512_load_ps(CODES);
  __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  LK_INLINE Vec lookup(const Decoder& d, const uint8_t* bytes) {
    const __m512i pair = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_permutexvar_epi32(d.spread, pair), d.shifts), d.codes);
  }
};
#elif defined(LK_ISA_AVX2)
struct Decoder {
  __m256 low = _mm256_load_ps(CODES), high = _mm256_load_ps(CODES + 8);
  __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  LK_INLINE Vec lookup(const Decoder& d, const uint8_t* bytes) {
    const __m256i four = _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(bytes)));
    const __m256i index = _mm256_srlv_epi32(four, d.shifts);                     // the permutes read its low three bits
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));      // bit 3 as the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(d.low, index), _mm256_permutevar8x32_ps(d.high, index), upper);
  }
};
#else
struct Decoder {
  LK_INLINE Vec lookup(const Decoder&, const uint8_t* bytes) {
    return {{CODES[bytes[0] >> 4], CODES[bytes[0] & 15], CODES[bytes[1] >> 4], CODES[bytes[1] & 15]}};
  }
};
#endif
LK_INLINE Vec decode(const Decoder& d, const uint8_t* bytes) { return Decoder::lookup(d, bytes); }

// out[i] = value of element first + i, for i < count, as float32
static void decode_run(const NF4Weight& w, const Decoder& d, int64_t first, int64_t count, float* out) {
  const int64_t blocksize = int64_t{1} << w.block_shift;
  for (int64_t at = first, end = first + count; at < end;) {
    const int64_t block = at >> w.block_shift, stop = smaller(end, (block + 1) * blocksize);
    const float scale = scale_of(w, block);
    if (at & 1) *out++ = code_of(w.packed, at++) * scale;
    const Vec scales = broadcast(scale);
    for (; at + VL <= stop; at += VL, out += VL) store(out, mul(decode(d, w.packed + (at >> 1)), scales));
    for (; at < stop; ++at) *out++ = code_of(w.packed, at) * scale;
  }
}

}  // namespace
}  // namespace lk::cpu
