// NF4 into a dense matrix, and back. Dequantising is bound by the bytes that it writes: a thread turns eight codes (four
// bytes) into one 16-byte store (two for float32), with both levels of scales in the same pass. The 16 codes lie in 16
// different banks of shared memory, so lanes that look up different codes never collide.
#include "launch.h"

#include "element.cuh"
#include "kernels.h"
#include "nf4.cuh"

namespace lk::cuda {
namespace {

constexpr int THREADS = 128, RUN = 8;

template <DType dtype, bool wide>
__global__ void __launch_bounds__(THREADS) dequantize_kernel(const DequantizeNF4 p) {
  using E = Element<dtype>;
  using T = typename E::type;
  __shared__ float codes[16];
  const int thread = threadIdx.x;
  if (thread == 0) store_codes(codes);
  __syncthreads();
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * THREADS + thread) * RUN;
  if (column >= p.columns) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const int64_t element = (p.n0 + row) * p.w.K + p.k0 + column;
    T* out = static_cast<T*>(p.out.data) + row * p.out.row_stride + column;
    if (wide) {  // eight codes in whole bytes of one block
      const uint32_t four = *reinterpret_cast<const uint32_t*>(p.w.packed + (element >> 1));
      const float scale = scale_of(p.w, element >> p.w.block_shift);
      float values[RUN];
#pragma unroll
      for (int j = 0; j < RUN; ++j) values[j] = __fmul_rn(codes[four >> (j / 2 * 8 + (j % 2 ? 0 : 4)) & 15], scale);
      store8(out, values);
    } else {
      for (int j = 0; j < RUN && column + j < p.columns; ++j) {
        const int64_t e = element + j;
        const uint8_t pair = p.w.packed[e >> 1];
        out[j] = E::put(__fmul_rn(codes[e & 1 ? pair & 15 : pair >> 4], scale_of(p.w, e >> p.w.block_shift)));
      }
    }
  }
}

// A team of threads owns a block of the weight; a thread owns pairs of elements, so that it writes whole bytes.
template <DType dtype>
__global__ void __launch_bounds__(256) quantize_kernel(const QuantizeNF4 p, int team) {
  using E = Element<dtype>;
  using T = typename E::type;
  __shared__ float most[256];
  const float boundaries[15] = {LK_NF4_BOUNDARIES};
  const int64_t blocksize = int64_t{1} << p.block_shift, blocks = (p.count + blocksize - 1) >> p.block_shift;
  const int thread = threadIdx.x, member = thread % team, teams = 256 / team;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * teams + thread / team;
  const int64_t first = block * blocksize;
  const int64_t end = first + blocksize < p.count ? first + blocksize : p.count;
  const T* weight = static_cast<const T*>(p.weight);
  float absmax = 0.0f;
  const auto meet = [&](float value) {  // what is not finite, NaN too, makes absmax infinite
    const float size = fabsf(value);
    absmax = fmaxf(absmax, size <= 3.402823466e+38f ? size : __int_as_float(0x7f800000));
  };
  if (block < blocks)
    for (int64_t i = first + 2 * member; i < end; i += 2 * team) {
      meet(E::get(weight[i]));
      if (i + 1 < end) meet(E::get(weight[i + 1]));
    }
  most[thread] = absmax;
  for (int half = team / 2; half; half /= 2) {
    __syncthreads();
    if (member < half) most[thread] = fmaxf(most[thread], most[thread + half]);
  }
  __syncthreads();
  if (block >= blocks) return;
  absmax = most[thread - member];
  const float inverse = __frcp_rn(fmaxf(absmax, NF4_TINY));
  if (member == 0) p.absmax[block] = absmax;
  for (int64_t i = first + 2 * member; i < end; i += 2 * team) {
    const float even = __fmul_rn(E::get(weight[i]), inverse), odd = i + 1 < end ? __fmul_rn(E::get(weight[i + 1]), inverse) : -1.0f;
    int high = 0, low = 0;
#pragma unroll
    for (int b = 0; b < 15; ++b) high += even > boundaries[b], low += odd > boundaries[b];
    p.packed[i >> 1] = static_cast<uint8_t>(high << 4 | low);
  }
}

template <DType dtype>
int dequantize(const DequantizeNF4& p, cudaStream_t stream) {
  using T = typename Element<dtype>::type;
  const int64_t across = (p.columns + THREADS * RUN - 1) / (THREADS * RUN);
  if (across > 0x7fffffff) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(p.rows < 65535 ? p.rows : 65535));
  const bool wide = (p.w.K | p.k0 | p.columns) % RUN == 0 && reinterpret_cast<uintptr_t>(p.w.packed) % 4 == 0 &&
                    reinterpret_cast<uintptr_t>(p.out.data) % 16 == 0 && p.out.row_stride * sizeof(T) % 16 == 0;
  if (wide) {
    const auto kernel = dequantize_kernel<dtype, true>;
    return LK_LAUNCH(kernel, grid, THREADS, stream, p);
  }
  const auto kernel = dequantize_kernel<dtype, false>;
  return LK_LAUNCH(kernel, grid, THREADS, stream, p);
}

template <DType dtype>
int quantize(const QuantizeNF4& p, cudaStream_t stream) {
  const int64_t blocksize = int64_t{1} << p.block_shift, blocks = (p.count + blocksize - 1) >> p.block_shift;
  const int team = static_cast<int>(blocksize / 2 < 256 ? blocksize / 2 : 256);
  const int64_t grid = (blocks * team + 255) / 256;
  if (grid > 0x7fffffff) return cudaErrorInvalidValue;
  const auto kernel = quantize_kernel<dtype>;
  return LK_LAUNCH(kernel, dim3(static_cast<unsigned>(grid)), 256, stream, p, team);
}

}  // namespace

int dequantize_nf4(const DequantizeNF4& p, void* stream) {
  if (p.rows == 0 || p.columns == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.out.dtype) {
    case DType::f32: return dequantize<DType::f32>(p, s);
    case DType::bf16: return dequantize<DType::bf16>(p, s);
    case DType::f16: return dequantize<DType::f16>(p, s);
  }
  return cudaErrorInvalidValue;
}

int quantize_nf4(const QuantizeNF4& p, void* stream) {
  if (p.count == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32: return quantize<DType::f32>(p, s);
    case DType::bf16: return quantize<DType::bf16>(p, s);
    case DType::f16: return quantize<DType::f16>(p, s);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lk::cuda
