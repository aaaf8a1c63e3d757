#include "parallel.h"

namespace lk::cpu {

static ParallelFor torch_pool = nullptr;

void use_pool(ParallelFor pool) { torch_pool = pool; }
bool has_pool() { return torch_pool != nullptr; }

void parallel_for(int64_t count, Body body, void* context) {
  if (torch_pool && count > 1)
    torch_pool(0, count, 1, body, context);
  else if (count > 0)
    body(0, count, context);
}

}  // namespace lk::cpu
