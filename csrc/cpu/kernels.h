// The CPU kernels' entry points. Each exists once per instruction set; dispatch.cpp picks at load.
#pragma once
#include "../params.h"

namespace lk::cpu {

struct Kernels {
  const char* isa;
  void (*add_lowrank)(const AddLowrank&);
};

extern const Kernels portable;
#ifdef LK_X86
extern const Kernels avx2;
extern const Kernels avx512;
#endif

// The set in use: the widest that the processor has, or the one that LORAKERNELS_CPU_ISA names.
const Kernels& kernels();
const char* const* compiled_isas();  // null-terminated, narrowest first
bool usable(const char* isa);        // compiled, and the processor has it

}  // namespace lk::cpu
