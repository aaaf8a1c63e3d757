// The NF4 format on the device: the codebook in shared memory, and a block's scale.
#pragma once
#include "../nf4.h"

namespace lk::cuda {
namespace {

// By one thread, unrolled: an array that is indexed at run time would lie in local memory.
__device__ __forceinline__ void store_codes(float (&codes)[16]) {
  const float values[16] = {LK_NF4_CODES};
#pragma unroll
  for (int i = 0; i < 16; ++i) codes[i] = values[i];
}

__device__ __forceinline__ float load_float(const uint8_t* bytes, int64_t index) {
  return reinterpret_cast<const float*>(bytes)[index];
}

__device__ __forceinline__ float scale_of(const NF4Weight& w, int64_t block) {
  if (!w.nested) return load_float(w.absmax, block);
  const float product = __fmul_rn(load_float(w.nested, 1 + w.absmax[block]), load_float(w.nested, 257 + (block >> w.nested_shift)));
  return __fadd_rn(product, load_float(w.nested, 0));  // each rounded: the format says so
}

}  // namespace
}  // namespace lk::cuda
