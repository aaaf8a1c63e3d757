// What the thin products share: how a block is made up, elements of the large matrix (x or dy), the dropout mask.
#pragma once
#include "../philox.h"
#include "element.cuh"

namespace lk::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

// Eight elements of row m from column c on, zero outside of (rows, cols); `wide`: they lie side by side, 16-byte aligned.
template <class T, bool wide>
__device__ __forceinline__ Pack8<T> load8(const Matrix& x, int64_t m, int64_t c, int64_t rows, int64_t cols) {
  Pack8<T> pack;
  const T* at = static_cast<const T*>(x.data) + m * x.row_stride + c * x.col_stride;
  if (wide && m < rows && c + 8 <= cols) return *reinterpret_cast<const Pack8<T>*>(at);
#pragma unroll
  for (int j = 0; j < 8; ++j) pack.at[j] = m < rows && c + j < cols ? at[j * x.col_stride] : T(0.0f);
  return pack;
}

// Zero where the mask drops: row m, columns c to c + 7, c a multiple of 8.
template <class T>
__device__ __forceinline__ void drop8(Pack8<T>& pack, int64_t seed, uint32_t threshold, int64_t m, int64_t c) {
  const Philox8 draw = philox8(static_cast<uint64_t>(seed), static_cast<uint64_t>(m), static_cast<uint32_t>(c >> 3));
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (draw.lane(j) < threshold) pack.at[j] = T(0.0f);
}

// Which of several A's that share x a block of `size` ranks has, and its first rank.
struct Part {
  int index;
  int64_t r0;
};
__device__ __forceinline__ Part part_of(const LowrankDown& p, int block, int size) {
  int part = 0;
  while (block * size >= p.part[part].R) {
    block -= static_cast<int>((p.part[part].R + size - 1) / size);
    ++part;
  }
  return {part, static_cast<int64_t>(block) * size};
}

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class T>
bool is_wide(const Matrix& x) {
  return x.col_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride * sizeof(T) % 16 == 0;
}

}  // namespace
}  // namespace lk::cuda
