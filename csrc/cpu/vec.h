// A float32 vector as wide as the instruction set that this file is compiled for, with the loads and stores that a
// kernel needs. Everything has internal linkage and uses C headers only: a function that the linker could merge with
// another translation unit's would bring wide instructions to a processor that lacks them.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(LK_AVX512_EMULATION)
#include "../emulation/avx512_emulation.h"
#elif defined(LK_X86)
#include <immintrin.h>
#endif

#include "../params.h"

namespace lk::cpu {
namespace {

#define LK_INLINE static inline __attribute__((always_inline))

// -- scalars ---------------------------------------------------------------------------------------------------------

LK_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

LK_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

LK_INLINE float bf16_to_float(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

LK_INLINE uint16_t float_to_bf16(float value) {  // round to nearest even; a NaN stays a quiet NaN
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

LK_INLINE float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return bits_to_float(sign | float_to_bits(subnormal));
}

LK_INLINE uint16_t float_to_f16(float value) {  // round to nearest even
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves value / 2^-24, rounded, in the low bits
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

LK_INLINE float load_scalar(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[index];
  const uint16_t half = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
}

// -- vectors ---------------------------------------------------------------------------------------------------------

#if defined(LK_ISA_AMX)
#define LK_ISA_NAME amx
#define LK_ISA_AVX512BF16
#define LK_ISA_AVX512
#elif defined(LK_ISA_AVX512BF16)
#define LK_ISA_NAME avx512bf16
#define LK_ISA_AVX512
#elif defined(LK_ISA_AVX512)
#define LK_ISA_NAME avx512
#endif

#if defined(LK_ISA_AVX512)

using Vec = __m512;
constexpr int VL = 16;
LK_INLINE Vec zero() { return _mm512_setzero_ps(); }
LK_INLINE Vec broadcast(float a) { return _mm512_set1_ps(a); }
LK_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
LK_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
LK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
LK_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
LK_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
LK_INLINE Vec load_bf16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
#if defined(LK_ISA_AVX512BF16)
LK_INLINE __mmask16 subnormal(Vec a) { return _mm512_fpclass_ps_mask(a, 0x20); }  // lanes that the next instruction takes for zero
LK_INLINE void store_normal_bf16(uint16_t* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a)); }
#endif
LK_INLINE void store_bf16(uint16_t* p, Vec a) {
#if defined(LK_ISA_AVX512BF16)
  if (__builtin_expect(!subnormal(a), 1)) return store_normal_bf16(p, a);
#endif
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
}
LK_INLINE Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LK_INLINE void store_f16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(LK_ISA_AVX2)

#define LK_ISA_NAME avx2
using Vec = __m256;
constexpr int VL = 8;
LK_INLINE Vec zero() { return _mm256_setzero_ps(); }
LK_INLINE Vec broadcast(float a) { return _mm256_set1_ps(a); }
LK_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
LK_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
LK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
LK_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
LK_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
LK_INLINE Vec load_bf16(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
LK_INLINE void store_bf16(uint16_t* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
LK_INLINE Vec load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LK_INLINE void store_f16(uint16_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

#else

#define LK_ISA_NAME portable
constexpr int VL = 4;
struct Vec { float lane[VL]; };
LK_INLINE Vec broadcast(float a) { return {{a, a, a, a}}; }
LK_INLINE Vec zero() { return broadcast(0.0f); }
LK_INLINE Vec add(Vec a, Vec b) { for (int i = 0; i < VL; ++i) a.lane[i] += b.lane[i]; return a; }
LK_INLINE Vec mul(Vec a, Vec b) { for (int i = 0; i < VL; ++i) a.lane[i] *= b.lane[i]; return a; }
LK_INLINE Vec fma(Vec a, Vec b, Vec c) { for (int i = 0; i < VL; ++i) c.lane[i] += a.lane[i] * b.lane[i]; return c; }
LK_INLINE Vec load(const float* p) { Vec a; memcpy(&a, p, sizeof a); return a; }
LK_INLINE void store(float* p, Vec a) { memcpy(p, &a, sizeof a); }
LK_INLINE Vec load_bf16(const uint16_t* p) { Vec a; for (int i = 0; i < VL; ++i) a.lane[i] = bf16_to_float(p[i]); return a; }
LK_INLINE void store_bf16(uint16_t* p, Vec a) { for (int i = 0; i < VL; ++i) p[i] = float_to_bf16(a.lane[i]); }
LK_INLINE Vec load_f16(const uint16_t* p) { Vec a; for (int i = 0; i < VL; ++i) a.lane[i] = f16_to_float(p[i]); return a; }
LK_INLINE void store_f16(uint16_t* p, Vec a) { for (int i = 0; i < VL; ++i) p[i] = float_to_f16(a.lane[i]); }

#endif

// The sum of a vector's lanes: the upper half onto the lower, and again.
LK_INLINE float total(Vec sum) {
#if defined(LK_ISA_AVX512) || defined(LK_ISA_AVX2)
#ifdef LK_ISA_AVX512
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sum), 1)));
#else
  const __m256 eight = sum;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  return (sum.lane[0] + sum.lane[2]) + (sum.lane[1] + sum.lane[3]);
#endif
}

// c + a b, summed over the two bfloat16 of each 32-bit lane. Only where HAS_DOT.
#if defined(LK_ISA_AVX512BF16)
constexpr bool HAS_DOT = true;
LK_INLINE Vec dot(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b)); }
#else
constexpr bool HAS_DOT = false;
LK_INLINE Vec dot(Vec, Vec, Vec c) { return c; }  // never called
#endif

// -- a dtype as a type: Element<DType::bf16>::load(p) ------------------------------------------------------------------

template <DType> struct Element;
template <> struct Element<DType::f32> {
  using type = float;
  LK_INLINE float scalar(float a) { return a; }
  LK_INLINE Vec get(const float* p) { return load(p); }
  LK_INLINE void put(float* p, Vec a) { store(p, a); }
};
template <> struct Element<DType::bf16> {
  using type = uint16_t;
  LK_INLINE float scalar(uint16_t a) { return bf16_to_float(a); }
  LK_INLINE Vec get(const uint16_t* p) { return load_bf16(p); }
  LK_INLINE void put(uint16_t* p, Vec a) { store_bf16(p, a); }
};
template <> struct Element<DType::f16> {
  using type = uint16_t;
  LK_INLINE float scalar(uint16_t a) { return f16_to_float(a); }
  LK_INLINE Vec get(const uint16_t* p) { return load_f16(p); }
  LK_INLINE void put(uint16_t* p, Vec a) { store_f16(p, a); }
};

// p[0 ... n * VL - 1] = a, one vector after the other
template <DType dtype, int n>
LK_INLINE void put_all(typename Element<dtype>::type* p, const Vec (&a)[n]) {
#if defined(LK_ISA_AVX512BF16)
  if (dtype == DType::bf16) {
    __mmask16 special = 0;  // one question for all of them
    for (int i = 0; i < n; ++i) special |= subnormal(a[i]);
    if (__builtin_expect(!special, 1)) {
      for (int i = 0; i < n; ++i) store_normal_bf16(reinterpret_cast<uint16_t*>(p) + i * VL, a[i]);
      return;
    }
  }
#endif
  for (int i = 0; i < n; ++i) Element<dtype>::put(p + i * VL, a[i]);
}

}  // namespace
}  // namespace lk::cpu
