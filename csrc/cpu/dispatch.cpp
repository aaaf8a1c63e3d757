#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace lk::cpu {
namespace {

#define LK_KERNELS(isa) \
  {#isa, isa::add_lowrank, isa::lowrank_down, isa::lowrank_grad, isa::dequantize_nf4, isa::quantize_nf4, isa::nf4_linear, isa::nf4_product}
#ifdef LK_X86
const Kernels every[] = {LK_KERNELS(portable), LK_KERNELS(avx2), LK_KERNELS(avx512),
#ifndef LK_NO_AVX512BF16
                         LK_KERNELS(avx512bf16)
#endif
};
#else
const Kernels every[] = {LK_KERNELS(portable)};
#endif

}  // namespace

const Kernels* compiled(int* count) {
  *count = sizeof every / sizeof *every;
  return every;
}

bool processor_has(const char* isa) {
#ifdef LK_AVX512_EMULATION  // for tests
  return true;
#endif
#ifdef LK_X86
#ifndef LK_NO_AVX512BF16
  if (!std::strcmp(isa, "avx512bf16")) return processor_has("avx512") && __builtin_cpu_supports("avx512bf16");
#endif
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return !std::strcmp(isa, "portable");
}

static const Kernels& choose() {
  const Kernels* best = nullptr;
  std::string usable;
  const char* wanted = std::getenv("LORAKERNELS_CPU_ISA");
  for (const Kernels& k : every) {
    if (!processor_has(k.isa)) continue;
    usable += std::string(" ") + k.isa;
    if (!wanted || !*wanted || !std::strcmp(wanted, k.isa)) best = &k;
  }
  if (!best)
    throw std::runtime_error(std::string("LORAKERNELS_CPU_ISA=") + wanted + ": expected one of" + usable +
                             " (what was compiled and this processor has)");
  return *best;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace lk::cpu
