// How a kernel is launched: by CUDA, or, for tests, by the emulation on the CPU.
#pragma once

#ifdef LK_CUDA_EMULATION
#include "../emulation/cuda_emulation.h"
#define LK_LAUNCH(kernel, grid, threads, stream, ...) \
  lk::emulation::launch(grid, threads, [=] { kernel(__VA_ARGS__); })
#else
#include <cuda_runtime.h>
#define LK_LAUNCH(kernel, grid, threads, stream, ...) \
  ((kernel)<<<grid, threads, 0, stream>>>(__VA_ARGS__), static_cast<int>(cudaGetLastError()))
#endif
