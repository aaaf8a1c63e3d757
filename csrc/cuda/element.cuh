// A dtype as a type: how one element, and sixteen bytes of them, become float32 and come back.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../params.h"

namespace lk::cuda {

template <DType> struct Element;
template <> struct Element<DType::f32> {
  using type = float;
  static __device__ __forceinline__ float get(float a) { return a; }
  static __device__ __forceinline__ float put(float a) { return a; }
};
template <> struct Element<DType::bf16> {
  using type = __nv_bfloat16;
  static __device__ __forceinline__ float get(__nv_bfloat16 a) { return __bfloat162float(a); }
  static __device__ __forceinline__ __nv_bfloat16 put(float a) { return __float2bfloat16_rn(a); }
};
template <> struct Element<DType::f16> {
  using type = __half;
  static __device__ __forceinline__ float get(__half a) { return __half2float(a); }
  static __device__ __forceinline__ __half put(float a) { return __float2half_rn(a); }
};

// Eight elements that are loaded and stored as 16-byte accesses (one for half precision, two for float32).
template <class T> struct alignas(16) Pack8 { T at[8]; };

// Eight values, each rounded once, in 16-byte stores: by the intrinsic, since a store of a uint4 comes out as four here.
__device__ __forceinline__ void store8(float* to, const float (&v)[8]) {
  __stwb(reinterpret_cast<float4*>(to), make_float4(v[0], v[1], v[2], v[3]));
  __stwb(reinterpret_cast<float4*>(to) + 1, make_float4(v[4], v[5], v[6], v[7]));
}
__device__ __forceinline__ uint32_t pair_of(float low, float high, const __nv_bfloat16*) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t pair_of(float low, float high, const __half*) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <class T>
__device__ __forceinline__ uint32_t pair_of(T low, T high) {  // as they are
  return *reinterpret_cast<const uint16_t*>(&low) | static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&high)) << 16;
}
template <class T>
__device__ __forceinline__ uint32_t pair_as(float low, float high) {
  return pair_of(low, high, static_cast<const T*>(nullptr));
}
template <class T>
__device__ __forceinline__ void store8(T* to, const float (&v)[8]) {
  __stwb(reinterpret_cast<uint4*>(to), make_uint4(pair_of(v[0], v[1], to), pair_of(v[2], v[3], to), pair_of(v[4], v[5], to), pair_of(v[6], v[7], to)));
}

__device__ __forceinline__ float load_scalar(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[index];
  if (dtype == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
  return __half2float(static_cast<const __half*>(data)[index]);
}

}  // namespace lk::cuda
