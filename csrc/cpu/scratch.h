// Memory that a thread keeps between calls: a fresh large buffer costs more in page faults than a kernel's work in it.
// Each thread keeps at most SCRATCH_KEPT floats a slot; what was larger is freed when it is given back.
#pragma once
#include <stdint.h>

namespace lk::cpu {

constexpr int64_t SCRATCH_KEPT = 2 << 20;  // 8 MiB
enum { CALLER = 0, WORKER = 1 };           // the calling thread works on tasks too, so it has both

float* scratch_take(int slot, int64_t floats);  // 64-byte aligned, not cleared; ends the process where memory has run out
void scratch_give(int slot);

}  // namespace lk::cpu
