#include "parallel.h"

namespace lk::cpu {

static ParallelFor torch_pool = nullptr;
static Threads torch_threads = nullptr;

void use_pool(ParallelFor pool, Threads threads) { torch_pool = pool, torch_threads = threads; }
bool has_pool() { return torch_pool != nullptr; }
int64_t threads() {
  uint32_t count = 1;
  if (torch_threads) torch_threads(&count);
  return count;
}

constexpr int64_t WORTH_SHARING = 200000;  // some 10 us of one thread; waking the pool took 5 to 10 where it was measured

void parallel_for(int64_t count, int64_t operations, Body body, void* context) {
  if (torch_pool && count > 1 && operations > WORTH_SHARING)
    torch_pool(0, count, 1, body, context);
  else if (count > 0)
    body(0, count, context);
}

}  // namespace lk::cpu
