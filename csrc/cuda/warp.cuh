// What the lanes of a warp do together: the tensor cores' product. The emulation has a twin of it, as of CUDA's shuffles.
#pragma once
#include <stdint.h>

#include <type_traits>

#include "element.cuh"

namespace lk::cuda {
namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;

// d (16,8) += a (16,16) b (16,8) with float32 sums; a register is two neighbours along the summed dimension. Lane 4 g + t holds
//   a[0], a[1]: rows g and g + 8, columns 2t and 2t + 1; a[2], a[3]: the same rows, columns 2t + 8 and 2t + 9
//   b[0], b[1]: rows 2t and 2t + 1, and 2t + 8 and 2t + 9, of column g
//   d[0], d[1]: columns 2t and 2t + 1 of row g; d[2], d[3]: of row g + 8
#ifdef LK_CUDA_EMULATION
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma<T>(d, a, b);
}
#else
#define LK_MMA(types)                                                                                                          \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." types ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) LK_MMA("bf16.bf16");
  else LK_MMA("f16.f16");
}
#undef LK_MMA
#endif

}  // namespace
}  // namespace lk::cuda
