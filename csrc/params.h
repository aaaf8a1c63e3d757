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
  const int64_t* index = nullptr;      // where it has data, row i is the one at index[i] (CPU kernels: of x, dy, y and A)
  const int64_t* col_index = nullptr;  // column j is the one at col_index[j] (CPU kernels: of B)
};

// The dropout mask that philox.h derives from the seed; threshold 0 means no dropout.
struct Dropout {
  const int64_t* seed;  // on the kernel's own device, read there: no host synchronisation
  uint32_t threshold;   // round(p * 65536): a lane below it is dropped
  float scale;          // 1 / (1 - threshold / 65536)
};

// Of these three `among`, where it is not 0, stands for M where M chooses among forms (CPU kernels): in a call of many adapters, where a row's
// bits must not depend on how many rows have its adapter.

// u (M,R) = drop(x) A^T for several A that share x, side by side: part i has R_i columns of u and a mask of its own, from
// seed[i]. Sums in float32.
constexpr int MAX_PARTS = 8;
struct LowrankDown {
  struct Part {
    Matrix A;  // (R,K), any strides
    int64_t R;
    int64_t column;  // of u, its first
  };
  int64_t M, K;
  Matrix x;  // any strides
  Matrix u;  // float32, col_stride 1
  int32_t parts;
  Part part[MAX_PARTS];
  Dropout dropout;
  int64_t next = 0;  // elements behind these A's lie those of the next call, which may be brought in; 0 where none do
  int64_t among = 0;
};

// du (M,R) = scaling * dy B     dB (N,R) = scaling * dy^T u     dA (R,K) = du^T drop(x)
// What has no data is not asked for: without B no du and no dA, without u no dB, without x no dA.
struct LowrankGrad {
  int64_t M, N, K, R;
  Matrix dy;  // (M,N), any strides
  Matrix x;   // (M,K), any strides
  Matrix u;   // float32, col_stride 1
  Matrix B;   // (N,R), any strides
  Matrix du;  // float32, contiguous
  Matrix dA;  // contiguous
  Matrix dB;  // contiguous
  float scaling;
  Dropout dropout;
  float* workspace;  // CUDA: partial sums
  int64_t among = 0;
};

// y (M,N) += scaling * (drop'(u (M,R) v (N,R)^T) + bias (N)), in place, sums in float32, one rounding at the store.
struct AddLowrank {
  int64_t M, N, R;
  Matrix y;     // col_stride 1
  Matrix u;     // float32, col_stride 1
  Matrix v;     // any strides: the layer's B, or A transposed for dx
  Matrix bias;  // data may be null; row_stride is unused
  float scaling;
  Dropout dropout;
  int64_t among = 0;
};

// y (M,N) = x (M,K) W (N,K)^T + bias (N), sums in float32, one rounding at the store.
struct Linear {
  int64_t M, N, K;
  Matrix x, W;  // any strides
  Matrix y;     // col_stride 1
  Matrix bias;  // data may be null; row_stride is unused
};

// Adapter ids, 32 or 64 bits wide -> order (M) and starts (E + 1), as below
struct Route {
  const void* ids;
  bool wide;
  int64_t M, stride, E;
  int64_t *order, *starts;
};
// Many adapters: rows order[starts[e]] to order[starts[e + 1]] of x, dy and y are adapter e's; other rows have none. u and du
// have their rows in that order; what lies behind the last adapter's has an id that is none. A and B are stacks of E, a stride
// apart, or, with pages, rank rows that stand anywhere: rank r of adapter e is row pages[e * pages_stride + r] of A, and the
// like column of B. Adapter e uses its first ranks[e] ranks.
struct Segments {
  int64_t M, E, R;
  const int64_t *order, *starts, *ranks;  // ranks may be null: R each
  const int64_t* pages;                   // may be null
  int64_t pages_stride;
  const int64_t* seed;                    // null for no dropout
  const int32_t* thresholds;              // of each adapter: Dropout::threshold
  const float* scaling;                   // of each adapter; null for 1
};
struct Stack {
  Matrix first;
  int64_t stride;
};
struct MultiDown {  // with pages, A's rows hold `parts` rows each, A.first.row_stride apart; part i has ranks[i * E + e], and columns i * R of u
  Segments segments;
  int64_t K, parts;
  Matrix x, u;
  Stack A;
};
struct MultiAdd {  // rows whose id is none become NaN
  Segments segments;
  int64_t N;
  Matrix y, u;
  Stack B;
};
struct MultiGrad {  // as LowrankGrad; dA (E,R,K) and dB (E,N,R) hold zeros where no row is an adapter's
  Segments segments;
  int64_t N, K;
  Matrix dy, x, u, du;
  Stack B, dA, dB;
};

}  // namespace lk
