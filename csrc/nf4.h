// The NF4 format: codebook, nibble order, block arithmetic. lorakernels/nf4.py holds the same for Python; a test compares them.
//
// W (N,K) is flattened row by row. Element i has the code in half a byte, the even element of a pair in the high half, and
// the scale of block i / blocksize; blocks run on over the ends of rows. Its value is code * scale, rounded once.
#pragma once
#include <stdint.h>

#include "params.h"

namespace lk {

// Dettmers et al., "QLoRA", 2023, appendix E; ascending.
#define LK_NF4_CODES                                                                                                      \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f, \
      -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, \
      0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f

// A value takes the code above boundary i where it is greater: (code i + code i + 1) / 2 in float32. A tie takes the lower.
// Written as float32 values: the sums' own decimals can lie exactly between two, where a literal rounds otherwise than a sum.
#define LK_NF4_BOUNDARIES                                                                                                \
  -0.8480963706970215f, -0.6106328964233398f, -0.4599952697753906f, -0.33967941999435425f, -0.23460739850997925f,        \
      -0.13791173696517944f, -0.045525018125772476f, 0.03979014977812767f, 0.120255246758461f, 0.2035212516784668f,      \
      0.2920137643814087f, 0.3893125355243683f, 0.5016634464263916f, 0.6427869200706482f, 0.8614784479141235f

// The smallest scale that a block is divided by: below it 1 / scale would be infinite.
constexpr float NF4_TINY = 1e-38f;

// A packed weight. Scales are float32, or, where nested has data, bytes that index a map: scale i = map[absmax[i]] *
// nested_absmax[i / nested_blocksize] + offset, the product rounded, then the sum.
struct NF4Weight {
  const uint8_t* packed;
  const uint8_t* absmax;  // one byte a block where nested, else the bytes of a float
  const uint8_t* nested;  // bytes of floats: offset, 256 of the map, nested_absmax; null where the scales are float32
  int64_t N, K;
  int32_t block_shift, nested_shift;  // log2 of the block sizes
};

// out (rows, columns) = W[n0:, k0:], each value rounded once to out's dtype
struct DequantizeNF4 {
  NF4Weight w;
  int64_t n0, k0, rows, columns;
  Matrix out;  // col_stride 1
};

// packed and float32 absmax of a weight of `count` elements; the absmax of a block that is not finite is infinite
struct QuantizeNF4 {
  const void* weight;  // contiguous
  DType dtype;
  int64_t count;
  int32_t block_shift;
  uint8_t* packed;
  float* absmax;
};

// y (M,N) = x W^T + bias + scaling * (u v^T + lowrank bias) for few rows: every code is looked up once for all of them.
struct NF4Linear {
  NF4Weight w;
  Matrix x;             // (M,K), any strides
  Matrix bias;          // data may be null; row_stride is unused
  AddLowrank lowrank;   // M, y, and the low-rank term: R is 0 where there is none
};

// The same for any number of rows; where turned, y (M,K) = x W of x (M,N).
struct NF4Product {
  NF4Linear linear;
  bool turned;
};

}  // namespace lk
