// The CPU kernels' entry points. Each exists once per instruction set; dispatch.cpp picks at load.
#pragma once
#include "../nf4.h"
#include "../params.h"

namespace lk::cpu {

struct Kernels {
  const char* isa;
  void (*add_lowrank)(const AddLowrank&);
  void (*lowrank_down)(const LowrankDown&);
  void (*lowrank_grad)(const LowrankGrad&);
  void (*linear)(const Linear&);
  void (*dequantize_nf4)(const DequantizeNF4&);
  void (*quantize_nf4)(const QuantizeNF4&);
  void (*nf4_linear)(const NF4Linear&);
  void (*nf4_product)(const NF4Product&);
};

#define LK_DECLARE_KERNELS(isa)               \
  namespace isa {                             \
  void add_lowrank(const AddLowrank&);        \
  void lowrank_down(const LowrankDown&);      \
  void lowrank_grad(const LowrankGrad&);      \
  void linear(const Linear&);                 \
  void dequantize_nf4(const DequantizeNF4&);  \
  void quantize_nf4(const QuantizeNF4&);      \
  void nf4_linear(const NF4Linear&);          \
  void nf4_product(const NF4Product&);        \
  }
LK_DECLARE_KERNELS(portable)
#ifdef LK_X86
LK_DECLARE_KERNELS(avx2)
LK_DECLARE_KERNELS(avx512)
LK_DECLARE_KERNELS(avx512bf16)
LK_DECLARE_KERNELS(amx)
#endif

// The set in use: the widest that the processor has, or the one that LORAKERNELS_CPU_ISA names.
const Kernels& kernels();
const Kernels* compiled(int* count);    // narrowest first
bool processor_has(const char* isa);

}  // namespace lk::cpu
