// The CUDA launchers. Each returns cudaGetLastError() as an int, 0 for success.
#pragma once
#include "../nf4.h"
#include "../params.h"

namespace lk::cuda {

int add_lowrank(const AddLowrank& p, void* stream);
int lowrank_down(const LowrankDown& p, void* stream);
int lowrank_grad(const LowrankGrad& p, void* stream);
int dequantize_nf4(const DequantizeNF4& p, void* stream);
int quantize_nf4(const QuantizeNF4& p, void* stream);
int nf4_linear(const NF4Linear& p, void* stream);  // half precision, M <= 16, no dropout

// The same of a half-precision base, which is where the ones above send it.
int add_lowrank_half(const AddLowrank& p, void* stream);
int lowrank_down_half(const LowrankDown& p, void* stream);

// How many floats LowrankGrad::workspace must have room for.
int64_t lowrank_grad_workspace(int64_t M, int64_t N, int64_t K, int64_t R, bool half, bool need_dA, bool need_dB);

}  // namespace lk::cuda
