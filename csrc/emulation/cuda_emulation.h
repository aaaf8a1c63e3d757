// Runs the .cu kernels on the CPU, for tests: the same bodies compiled as host C++. A CUDA thread is a fiber; the fibers
// of one block take turns on one OS thread. A warp runs until all its lanes wait or end, and the warps take turns in an
// order drawn from a seed, so that a missing barrier shows. Shared memory starts each block as NaN.
//
// Not covered: races within a warp, bank conflicts, limits of registers and shared memory, the memory model.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#undef __shared__
#define __shared__ static __attribute__((section("lk_shared")))
#undef __global__
#define __global__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (lk::emulation::state().thread)
#define blockIdx (lk::emulation::state().block)
#define gridDim (lk::emulation::state().grid)
#define __syncthreads() lk::emulation::barrier()

// rounding of their own, never fused (-ffp-contract=off)
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T> void __stwb(T* to, T value) { *to = value; }

extern char __start_lk_shared[] __attribute__((weak)), __stop_lk_shared[] __attribute__((weak));

namespace lk::emulation {

struct State {
  uint3 thread, block;
  dim3 grid;
  ucontext_t scheduler;
  std::mt19937 order{0};
  ucontext_t* running = nullptr;
  bool at_barrier = false;
  const std::function<void()>* body = nullptr;
  long launches = 0;
};

inline State& state() {
  static State s;
  return s;
}

__attribute__((weak)) void reseed(unsigned seed) { state().order.seed(seed); }
__attribute__((weak)) long launches() { return state().launches; }

inline void barrier() {
  State& s = state();
  s.at_barrier = true;
  swapcontext(s.running, &s.scheduler);
}

inline void fiber() {
  (*state().body)();  // returning ends the fiber: uc_link leads back to the scheduler
}

struct Fiber {
  static constexpr size_t STACK = 64 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false, waiting = false;
};

inline void run_block(std::vector<Fiber>& fibers) {
  State& s = state();
  const int warps = (static_cast<int>(fibers.size()) + 31) / 32;
  if (&__start_lk_shared[0]) std::memset(__start_lk_shared, 0xff, __stop_lk_shared - __start_lk_shared);
  for (Fiber& f : fibers) {
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, Fiber::STACK};
    f.context.uc_link = &s.scheduler;
    f.done = f.waiting = false;
    makecontext(&f.context, fiber, 0);
  }
  std::vector<int> order(warps);
  for (int i = 0; i < warps; ++i) order[i] = i;
  for (;;) {
    std::shuffle(order.begin(), order.end(), s.order);
    for (int warp : order)
      for (int t = warp * 32; t < std::min<int>(warp * 32 + 32, fibers.size()); ++t) {
        Fiber& f = fibers[t];
        if (f.done) continue;
        s.thread = {static_cast<unsigned>(t), 0, 0};
        s.running = &f.context;
        s.at_barrier = false;
        swapcontext(&s.scheduler, &f.context);
        f.waiting = s.at_barrier;
        f.done = !s.at_barrier;
      }
    const auto done = std::count_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; });
    if (done == static_cast<long>(fibers.size())) return;
    if (done) throw std::runtime_error("some threads ended while others wait at __syncthreads");
  }
}

inline int launch(dim3 grid, unsigned threads, std::function<void()> body) {
  State& s = state();
  ++s.launches;
  std::vector<Fiber> fibers(threads);
  s.grid = grid;
  s.body = &body;
  std::vector<uint3> blocks;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, 0});
  std::shuffle(blocks.begin(), blocks.end(), s.order);
  for (uint3 block : blocks) {
    s.block = block;
    run_block(fibers);
  }
  return 0;
}

}  // namespace lk::emulation
