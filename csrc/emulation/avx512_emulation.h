// AVX-512 on a processor that lacks it, for tests: SIMDe's functions under the intrinsics' names, and those that it has not.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <math.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <string.h>

#define __m512 simde__m512
#define __m512i simde__m512i
#define __m512bh simde__m512i

namespace lk::emulation {

template <class To, class From, class Function>
static inline To each(From from, int count, Function function) {
  To to = {};
  function(reinterpret_cast<const char*>(&from), reinterpret_cast<char*>(&to), count);
  return to;
}

template <class To, class From, class ToVector, class FromVector>
static inline ToVector converted(FromVector from, int count) {
  return each<ToVector>(from, count, [](const char* in, char* out, int n) {
    for (int i = 0; i < n; ++i) {
      From a;
      memcpy(&a, in + i * sizeof a, sizeof a);
      const To b = static_cast<To>(a);
      memcpy(out + i * sizeof b, &b, sizeof b);
    }
  });
}

static inline simde__m512 cvtph_ps(simde__m256i halves) {
  simde__m256 both[2] = {simde_mm256_cvtph_ps(simde_mm256_extractf128_si256(halves, 0)), simde_mm256_cvtph_ps(simde_mm256_extractf128_si256(halves, 1))};
  simde__m512 out;
  memcpy(&out, both, sizeof out);
  return out;
}

static inline simde__m256i cvtps_ph(simde__m512 a) {
  simde__m256 in[2];
  memcpy(in, &a, sizeof in);
  simde__m128i both[2] = {simde_mm256_cvtps_ph(in[0], SIMDE_MM_FROUND_TO_NEAREST_INT), simde_mm256_cvtps_ph(in[1], SIMDE_MM_FROUND_TO_NEAREST_INT)};
  simde__m256i out;
  memcpy(&out, both, sizeof out);
  return out;
}

// Pairs of bfloat16 products, the even one first; what the instruction flushes to zero is not flushed here.
static inline simde__m512 dpbf16_ps(simde__m512 sum, simde__m512i a, simde__m512i b) {
  uint16_t x[32], y[32];
  float out[16];
  memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y), memcpy(out, &sum, sizeof out);
  const auto wide = [](uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  for (int i = 0; i < 16; ++i) {
    out[i] += wide(x[2 * i + 1]) * wide(y[2 * i + 1]);
    out[i] += wide(x[2 * i]) * wide(y[2 * i]);
  }
  memcpy(&sum, out, sizeof sum);
  return sum;
}

// Two vectors to bfloat16, to nearest even, `low` below; what is subnormal is zero.
static inline simde__m512i cvtne2ps_pbh(simde__m512 high, simde__m512 low) {
  uint32_t in[32];
  uint16_t out[32];
  memcpy(in, &low, 64), memcpy(in + 16, &high, 64);
  for (int i = 0; i < 32; ++i) {
    const uint32_t magnitude = in[i] & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
      out[i] = static_cast<uint16_t>((in[i] >> 16) | 0x40u);
    else if (magnitude < 0x00800000u)
      out[i] = static_cast<uint16_t>((in[i] >> 16) & 0x8000u);
    else
      out[i] = static_cast<uint16_t>((in[i] + 0x7fffu + ((in[i] >> 16) & 1u)) >> 16);
  }
  simde__m512i both;
  memcpy(&both, out, sizeof both);
  return both;
}

static inline simde__m512i mulhi_epu16(simde__m512i a, simde__m512i b) {
  uint16_t x[32], y[32];
  memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y);
  for (int i = 0; i < 32; ++i) x[i] = static_cast<uint16_t>(static_cast<uint32_t>(x[i]) * y[i] >> 16);
  memcpy(&a, x, sizeof x);
  return a;
}

static inline int32_t reduce_max_epi32(simde__m512i a) {
  int32_t x[16];
  memcpy(x, &a, sizeof x);
  for (int i = 1; i < 16; ++i) x[0] = x[i] > x[0] ? x[i] : x[0];
  return x[0];
}

static inline simde__m512i maskz_loadu_epi16(simde__mmask32 mask, const void* from) {
  uint16_t out[32] = {};
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) memcpy(out + i, static_cast<const uint16_t*>(from) + i, sizeof *out);
  simde__m512i all;
  memcpy(&all, out, sizeof all);
  return all;
}

// Which lanes are subnormal.
static inline simde__m512 maskz_loadu_ps(simde__mmask16 mask, const void* from) {
  float out[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) memcpy(out + i, static_cast<const float*>(from) + i, sizeof(float));
  return simde_mm512_loadu_ps(out);
}

static inline simde__mmask16 subnormal(simde__m512 a) {
  uint32_t in[16];
  memcpy(in, &a, sizeof in);
  simde__mmask16 found = 0;
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = in[i] & 0x7fffffffu;
    if (magnitude != 0 && magnitude < 0x00800000u) found |= static_cast<simde__mmask16>(1u << i);
  }
  return found;
}

}  // namespace lk::emulation

#undef _mm512_cvtepi16_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#undef _mm512_fpclass_ps_mask
#undef _mm512_maskz_loadu_epi16
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepi64_epi8
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_dpbf16_ps
#undef _mm512_mulhi_epu16
#undef _mm512_reduce_max_epi32
#define _mm512_cvtepu8_epi32(a) lk::emulation::converted<int32_t, uint8_t, simde__m512i>(a, 16)
#define _mm512_cvtne2ps_pbh(high, low) lk::emulation::cvtne2ps_pbh(high, low)
#define _mm512_cvtneps_pbh(a) simde_mm512_extracti64x4_epi64(lk::emulation::cvtne2ps_pbh(a, a), 0)
#define _mm512_fpclass_ps_mask(a, kinds) lk::emulation::subnormal(a)  // the one kind that is asked for
#define _mm512_maskz_loadu_epi16(mask, from) lk::emulation::maskz_loadu_epi16(mask, from)
#define _mm512_maskz_loadu_ps(mask, from) lk::emulation::maskz_loadu_ps(mask, from)
#define _mm512_cvtepi16_epi32(a) lk::emulation::converted<int32_t, int16_t, simde__m512i>(a, 16)
#define _mm512_cvtepu16_epi32(a) lk::emulation::converted<int32_t, uint16_t, simde__m512i>(a, 16)
#define _mm512_cvtepi32_epi16(a) lk::emulation::converted<int16_t, int32_t, simde__m256i>(a, 16)
#define _mm512_cvtepi64_epi8(a) lk::emulation::converted<int8_t, int64_t, simde__m128i>(a, 8)
#define _mm512_cvtph_ps(a) lk::emulation::cvtph_ps(a)
#define _mm512_cvtps_ph(a, rounding) lk::emulation::cvtps_ph(a)
#define _mm512_dpbf16_ps(sum, a, b) lk::emulation::dpbf16_ps(sum, a, b)
#define _mm512_mulhi_epu16(a, b) lk::emulation::mulhi_epu16(a, b)
#define _mm512_reduce_max_epi32(a) lk::emulation::reduce_max_epi32(a)
