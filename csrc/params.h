// What a kernel is told: plain pointers, sizes and strides (in elements). No torch, no Python.
// M rows of x (tokens), K in_features, N out_features, R rank.
#pragma once
#include <cstdint>

namespace lk {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct Matrix {
  void* data;
  int64_t row_stride, col_stride;
  DType dtype;
};

// The dropout mask that philox.h derives from the seed; threshold 0 means no dropout.
struct Dropout {
  const int64_t* seed;  // on the kernel's own device, read there: no host synchronisation
  uint32_t threshold;   // round(p * 65536): a lane below it is dropped
  float scale;          // 1 / (1 - threshold / 65536)
};

// y (M,N) += scaling * drop'(u (M,R) v (N,R)^T) + bias (N), in place, sums in float32, one rounding at the store.
struct AddLowrank {
  int64_t M, N, R;
  Matrix y;     // col_stride 1
  Matrix u;     // float32, col_stride 1
  Matrix v;     // any strides: the layer's B, or A transposed for dx
  Matrix bias;  // data may be null; row_stride is unused
  float scaling;
  Dropout dropout;
};

}  // namespace lk
