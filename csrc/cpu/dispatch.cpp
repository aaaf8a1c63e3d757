#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#if !defined(LK_X86) && !defined(LK_NO_AMX)
#define LK_NO_AMX
#endif
#ifndef LK_NO_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lk::cpu {
namespace {

#define LK_KERNELS(isa) \
  {#isa, isa::add_lowrank, isa::lowrank_down, isa::lowrank_grad, isa::linear, isa::dequantize_nf4, isa::quantize_nf4, isa::nf4_linear, isa::nf4_product}
#ifdef LK_EMULATED_ISA  // for tests: what is emulated alone
#define LK_EMULATED(isa) LK_KERNELS(isa)
const Kernels every[] = {LK_EMULATED(LK_EMULATED_ISA)};
#elif defined(LK_X86)
const Kernels every[] = {LK_KERNELS(portable), LK_KERNELS(avx2), LK_KERNELS(avx512),
#ifndef LK_NO_AVX512BF16
                         LK_KERNELS(avx512bf16),
#endif
#ifndef LK_NO_AMX
                         LK_KERNELS(amx),
#endif
};
#else
const Kernels every[] = {LK_KERNELS(portable)};
#endif

#ifndef LK_NO_AMX
// A process asks Linux for the tiles' state, once; older kernels, and some sandboxes, do not give it.
bool may_use_tiles() {
#ifdef LK_TILE_EMULATION  // for tests
  return true;
#else
  unsigned a, b, c, d;
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILE)) != (BF16 | TILE)) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool given = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return given;
#endif
}
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
#ifndef LK_NO_AMX
  if (!std::strcmp(isa, "amx")) return processor_has("avx512bf16") && may_use_tiles();
#endif
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
