// The CUDA launchers. Each returns cudaGetLastError() as an int, 0 for success.
#pragma once
#include "../params.h"

namespace lk::cuda {

int add_lowrank(const AddLowrank& p, void* stream);

}  // namespace lk::cuda
