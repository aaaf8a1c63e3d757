// Work is shared out over torch's own thread pool, whose C entry points Python hands over once at import: no second
// OpenMP runtime in the process, and torch.set_num_threads is obeyed. Without them the work runs on the calling thread.
#pragma once
#include <cstdint>

namespace lk::cpu {

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body, void* context);
using Threads = int32_t (*)(uint32_t* count);

void use_pool(ParallelFor pool, Threads threads);
bool has_pool();
int64_t threads();  // of the pool

// body over [0, count). operations: about how many multiply-adds in all; what takes less time than waking the pool stays
// on the calling thread. How the work is cut into `count` must not depend on the threads, so bits don't either.
void parallel_for(int64_t count, int64_t operations, Body body, void* context);

}  // namespace lk::cpu
