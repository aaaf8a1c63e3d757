#include "scratch.h"

#include <cstdio>
#include <cstdlib>

namespace lk::cpu {
namespace {

struct Slot {
  float* data = nullptr;
  int64_t size = 0;
  ~Slot() { std::free(data); }
};
thread_local Slot slots[2];

}  // namespace

float* scratch_take(int slot, int64_t floats) {
  Slot& s = slots[slot];
  if (s.size < floats) {
    std::free(s.data);
    s.size = (floats + 15) / 16 * 16;
    s.data = static_cast<float*>(std::aligned_alloc(64, s.size * sizeof(float)));
    if (!s.data) {  // the kernels are compiled without exceptions
      std::fprintf(stderr, "lorakernels: out of memory for %lld bytes of scratch\n", static_cast<long long>(s.size * 4));
      std::abort();
    }
  }
  return s.data;
}

void scratch_give(int slot) {
  Slot& s = slots[slot];
  if (s.size <= SCRATCH_KEPT) return;
  std::free(s.data);
  s = Slot();
}

}  // namespace lk::cpu
