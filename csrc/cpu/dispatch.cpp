#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace lk::cpu {
namespace {

bool processor_has(const Kernels& k) {
#ifdef LK_X86
  if (&k == &avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (&k == &avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return &k == &portable;
}

#ifdef LK_X86
const Kernels* const compiled[] = {&portable, &avx2, &avx512};
const char* const names[] = {"portable", "avx2", "avx512", nullptr};
#else
const Kernels* const compiled[] = {&portable};
const char* const names[] = {"portable", nullptr};
#endif

const Kernels& choose() {
  const Kernels* best = &portable;
  const char* wanted = std::getenv("LORAKERNELS_CPU_ISA");
  if (wanted && *wanted) {
    if (!usable(wanted)) {
      std::string message = std::string("LORAKERNELS_CPU_ISA=") + wanted + ": expected one of";
      for (const Kernels* k : compiled)
        if (processor_has(*k)) message += std::string(" ") + k->isa;
      throw std::runtime_error(message + " (what was compiled and this processor has)");
    }
    for (const Kernels* k : compiled)
      if (!std::strcmp(wanted, k->isa)) return *k;
  }
  for (const Kernels* k : compiled)
    if (processor_has(*k)) best = k;
  return *best;
}

}  // namespace

const char* const* compiled_isas() { return names; }

bool usable(const char* isa) {
  for (const Kernels* k : compiled)
    if (!std::strcmp(isa, k->isa)) return processor_has(*k);
  return false;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace lk::cpu
