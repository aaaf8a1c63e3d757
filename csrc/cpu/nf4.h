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
  LK_INLINE Vec lookup(const Decoder& d, Vec words, int j) { return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_castps_si512(words), 4 * j), d.codes); }
};
#elif defined(LK_ISA_AVX2)
struct Decoder {
  __m256 low = _mm256_load_ps(CODES), high = _mm256_load_ps(CODES + 8);
  __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  LK_INLINE Vec lookup(const Decoder& d, const uint8_t* bytes) {
    const __m256i four = _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(bytes)));
    return lookup(d, _mm256_srlv_epi32(four, d.shifts));
  }
  LK_INLINE Vec lookup(const Decoder& d, Vec words, int j) { return lookup(d, _mm256_srli_epi32(_mm256_castps_si256(words), 4 * j)); }
  LK_INLINE Vec lookup(const Decoder& d, __m256i index) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 as the sign; the permutes read the three below
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(d.low, index), _mm256_permutevar8x32_ps(d.high, index), upper);
  }
};
#else
struct Decoder {
  LK_INLINE Vec lookup(const Decoder&, const uint8_t* bytes) {
    return {{CODES[bytes[0] >> 4], CODES[bytes[0] & 15], CODES[bytes[1] >> 4], CODES[bytes[1] & 15]}};
  }
  LK_INLINE Vec lookup(const Decoder&, Vec words, int j) {
    for (float& lane : words.lane) lane = CODES[float_to_bits(lane) >> 4 * j & 15];
    return words;
  }
};
#endif
LK_INLINE Vec decode(const Decoder& d, const uint8_t* bytes) { return Decoder::lookup(d, bytes); }

// The codes in bits 4 j ... 4 j + 3 of each lane, which are of element j ^ 1 of the eight that its four bytes hold.
LK_INLINE Vec decode_place(const Decoder& d, Vec words, int j) { return Decoder::lookup(d, words, j); }

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

#ifdef LK_ISA_AVX512BF16
// decode_run to bfloat16. The even elements of 32 and the odd ones are looked up apart, rounded by one instruction, and put between each
// other. That takes what is subnormal for zero, so small scales go another way.
static void decode_run_bf16(const NF4Weight& w, const Decoder& d, int64_t first, int64_t count, uint16_t* out) {
  constexpr float SMALL = 0x1p-120f;
  constexpr int64_t STEP = 2 * VL;
  alignas(64) uint16_t places[STEP];
  for (int64_t i = 0; i < STEP; ++i) places[i] = static_cast<uint16_t>(i / 2 + (i & 1) * VL);
  const __m512i between = _mm512_loadu_si512(places);
  const int64_t blocksize = int64_t{1} << w.block_shift;
  for (int64_t at = first, end = first + count; at < end;) {
    const int64_t block = at >> w.block_shift, stop = smaller(end, (block + 1) * blocksize);
    const float scale = scale_of(w, block);
    if (at & 1) *out++ = float_to_bf16(code_of(w.packed, at++) * scale);
    const Vec scales = broadcast(scale);
    if (scale >= SMALL || -scale >= SMALL)
      for (; at + STEP <= stop; at += STEP, out += STEP) {
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.packed + (at >> 1))));
        const Vec even = mul(_mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), d.codes), scales), odd = mul(_mm512_permutexvar_ps(pairs, d.codes), scales);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(between, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
      }
    for (; at + VL <= stop; at += VL, out += VL) store_bf16(out, mul(decode(d, w.packed + (at >> 1)), scales));
    for (; at < stop; ++at) *out++ = float_to_bf16(code_of(w.packed, at) * scale);
  }
}
#endif

}  // namespace
}  // namespace lk::cpu
