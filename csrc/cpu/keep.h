// The dropout mask of a stretch of columns, drawn by as many Philox counters at a time as a vector has lanes (philox.h has
// the rule). Each counter's eight 16-bit lanes stand in memory in the order of their columns.
#pragma once
#include "../philox.h"
#include "vec.h"

namespace lk::cpu {
namespace {

constexpr int64_t DRAW = 8 * VL;  // columns of one draw

#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX2)

// A 32-bit word of a counter lives in the low half of a 64-bit lane: the product of two is then whole in its lane, and
// what is left in the high half of a word is never read.
#if defined(LK_ISA_AVX512)
using Words = __m512i;
LK_INLINE Words words(uint64_t a) { return _mm512_set1_epi64(static_cast<int64_t>(a)); }
LK_INLINE Words count_from(uint32_t a) { return _mm512_add_epi64(words(a), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)); }
LK_INLINE Words times(Words a, Words b) { return _mm512_mul_epu32(a, b); }
LK_INLINE Words exclusive(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
LK_INLINE Words high(Words a) { return _mm512_srli_epi64(a, 32); }
LK_INLINE Words join(Words low, Words high) { return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32)); }
LK_INLINE void put(Words lanes, uint32_t least, int16_t* keep) {  // counters 0, 2, 4, 6 or 1, 3, 5, 7
  const __m512i kept = _mm512_movm_epi16(_mm512_cmpge_epu16_mask(lanes, _mm512_set1_epi16(static_cast<int16_t>(least))));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(keep), _mm512_extracti32x4_epi32(kept, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(keep + 16), _mm512_extracti32x4_epi32(kept, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(keep + 32), _mm512_extracti32x4_epi32(kept, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(keep + 48), _mm512_extracti32x4_epi32(kept, 3));
}
LK_INLINE void put_counters(Words low, Words high, uint32_t least, int16_t* keep) {
  put(_mm512_unpacklo_epi64(low, high), least, keep);
  put(_mm512_unpackhi_epi64(low, high), least, keep + 8);
}
LK_INLINE Vec masked(Vec a, const int16_t* keep) {
  const __m512i mask = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keep)));
  return _mm512_and_ps(a, _mm512_castsi512_ps(mask));
}
#else
using Words = __m256i;
LK_INLINE Words words(uint64_t a) { return _mm256_set1_epi64x(static_cast<int64_t>(a)); }
LK_INLINE Words count_from(uint32_t a) { return _mm256_add_epi64(words(a), _mm256_setr_epi64x(0, 1, 2, 3)); }
LK_INLINE Words times(Words a, Words b) { return _mm256_mul_epu32(a, b); }
LK_INLINE Words exclusive(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
LK_INLINE Words high(Words a) { return _mm256_srli_epi64(a, 32); }
LK_INLINE Words join(Words low, Words high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }
LK_INLINE void put(Words lanes, uint32_t least, int16_t* keep) {  // counters 0, 2 or 1, 3
  const __m256i kept = _mm256_cmpeq_epi16(_mm256_max_epu16(lanes, _mm256_set1_epi16(static_cast<int16_t>(least))), lanes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(keep), _mm256_castsi256_si128(kept));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(keep + 16), _mm256_extracti128_si256(kept, 1));
}
LK_INLINE void put_counters(Words low, Words high, uint32_t least, int16_t* keep) {
  put(_mm256_unpacklo_epi64(low, high), least, keep);
  put(_mm256_unpackhi_epi64(low, high), least, keep + 8);
}
LK_INLINE Vec masked(Vec a, const int16_t* keep) {
  const __m256i mask = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keep)));
  return _mm256_and_ps(a, _mm256_castsi256_ps(mask));
}
#endif

constexpr int SETS = 2;  // independent chains of rounds in flight

LK_INLINE void draw(uint64_t seed, uint64_t row, uint32_t column8, uint32_t threshold, int16_t* keep) {
  constexpr int COUNTERS = VL / SETS;
  const Words factor0 = words(PHILOX_MULTIPLIER0), factor1 = words(PHILOX_MULTIPLIER1);
  Words key0 = words(static_cast<uint32_t>(seed)), key1 = words(seed >> 32);
  Words c0[SETS], c1[SETS], c2[SETS], c3[SETS];
  for (int s = 0; s < SETS; ++s) {
    c0[s] = count_from(column8 + s * COUNTERS);
    c1[s] = words(row), c2[s] = words(row >> 32), c3[s] = words(0);
  }
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    for (int s = 0; s < SETS; ++s) {
      const Words product0 = times(c0[s], factor0), product1 = times(c2[s], factor1);
      c0[s] = exclusive(high(product1), c1[s], key0);
      c1[s] = product1;
      c2[s] = exclusive(high(product0), c3[s], key1);
      c3[s] = product0;
    }
    key0 = key0 + words(PHILOX_STEP0);  // carries into the high half, which is never read
    key1 = key1 + words(PHILOX_STEP1);
  }
  for (int s = 0; s < SETS; ++s) put_counters(join(c0[s], c1[s]), join(c2[s], c3[s]), threshold, keep + s * 8 * COUNTERS);
}

#else

LK_INLINE void draw(uint64_t seed, uint64_t row, uint32_t column8, uint32_t threshold, int16_t* keep) {
  for (int c = 0; c < VL; ++c) {
    const Philox8 lanes = philox8(seed, row, column8 + c);
    for (int j = 0; j < 8; ++j) keep[8 * c + j] = lanes.lane(j) >= threshold ? -1 : 0;
  }
}

LK_INLINE Vec masked(Vec a, const int16_t* keep) {
  for (int i = 0; i < VL; ++i) a.lane[i] = keep[i] ? a.lane[i] : 0.0f;
  return a;
}

#endif

// keep[c] = -1 where column n0 + c of row m is kept, else 0; n0 is a multiple of 8. Writes up to DRAW - 1 values beyond.
LK_INLINE void keep_row(uint64_t seed, uint32_t threshold, int64_t m, int64_t n0, int64_t columns, int16_t* keep) {
  for (int64_t c = 0; c < columns; c += DRAW) {
    if (threshold < 65536)
      draw(seed, static_cast<uint64_t>(m), static_cast<uint32_t>((n0 + c) >> 3), threshold, keep + c);
    else
      memset(keep + c, 0, DRAW * sizeof *keep);
  }
}

}  // namespace
}  // namespace lk::cpu
