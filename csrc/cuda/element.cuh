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
template <class T> struct alignas(2 * sizeof(T)) Pack2 { T at[2]; };

__device__ __forceinline__ float load_scalar(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[index];
  if (dtype == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
  return __half2float(static_cast<const __half*>(data)[index]);
}

}  // namespace lk::cuda
