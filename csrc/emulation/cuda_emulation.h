// Runs the .cu kernels on the CPU, for tests: the same bodies compiled as host C++. A CUDA thread is a fiber; the fibers
// of one block take turns on one OS thread. A warp runs until all its lanes wait or end, and the warps take turns in an
// order drawn from a seed, so that a missing barrier shows. Shared memory starts each block as NaN.
//
// Shuffles and the tensor cores' product have twins that wait for all lanes of a warp.
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
#define __syncwarp() lk::emulation::warp_barrier()

// rounding of their own, never fused (-ffp-contract=off)
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return word;
}
template <class T> void __stwb(T* to, T value) { *to = value; }
template <class T> T __ldcs(const T* from) { return *from; }

#define __shfl_sync(mask, value, from) lk::emulation::shuffle(value, from)
#define __shfl_xor_sync(mask, value, lanes) lk::emulation::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ (lanes))

extern char __start_lk_shared[] __attribute__((weak)), __stop_lk_shared[] __attribute__((weak));

namespace lk::emulation {

struct State {
  uint3 thread, block;
  dim3 grid;
  ucontext_t scheduler;
  std::mt19937 order{0};
  ucontext_t* running = nullptr;
  enum { RUNS, AT_BARRIER, AT_WARP } stop = RUNS;  // why the running fiber gave up its turn
  uint32_t lanes[32][8];                             // what each lane of the running warp shows the others
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
  s.stop = State::AT_BARRIER;
  swapcontext(s.running, &s.scheduler);
}

// Goes on once every lane of the warp is here.
inline void warp_barrier() {
  State& s = state();
  s.stop = State::AT_WARP;
  swapcontext(s.running, &s.scheduler);
}

// All lanes show some words and look at all of them.
template <class See>
void exchange(const uint32_t* words, int count, See see) {
  State& s = state();
  std::memcpy(s.lanes[s.thread.x % 32], words, 4 * count);
  warp_barrier();
  see(s.lanes);
  warp_barrier();  // before a lane shows its next ones
}

template <class T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) == 4, "one register");
  uint32_t word;
  std::memcpy(&word, &value, 4);
  exchange(&word, 1, [&](const uint32_t (&lanes)[32][8]) { std::memcpy(&value, lanes[from], 4); });
  return value;
}

// The twin of cuda/warp.cuh's mma.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const int lane = state().thread.x % 32, g = lane / 4, t = lane % 4;
  exchange(words, 6, [&](const uint32_t (&lanes)[32][8]) {
    const auto half = [](uint32_t word, int which) {
      T value;
      const uint16_t bits = static_cast<uint16_t>(word >> 16 * which);
      std::memcpy(&value, &bits, 2);
      return static_cast<float>(value);
    };
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        for (int k = 0; k < 16; ++k)
          d[2 * i + j] += half(lanes[4 * g + k % 8 / 2][i + 2 * (k / 8)], k % 2) * half(lanes[4 * (2 * t + j) + k % 8 / 2][4 + k / 8], k % 2);
  });
}

inline void fiber() {
  (*state().body)();  // returning ends the fiber: uc_link leads back to the scheduler
}

struct Fiber {
  static constexpr size_t STACK = 64 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false;
};

// The lanes of a warp, one after the other, until each waits at a barrier of the block or has ended.
inline void run_warp(std::vector<Fiber>& fibers, int begin, int end) {
  State& s = state();
  for (;;) {
    int lanes = 0, at_warp = 0;
    for (int t = begin; t < end; ++t) {
      Fiber& f = fibers[t];
      if (f.done) continue;
      s.thread = {static_cast<unsigned>(t), 0, 0};
      s.running = &f.context;
      s.stop = State::RUNS;
      swapcontext(&s.scheduler, &f.context);
      f.done = s.stop == State::RUNS;
      ++lanes;
      at_warp += s.stop == State::AT_WARP;
    }
    if (!at_warp) return;
    if (at_warp != end - begin || lanes != end - begin) throw std::runtime_error("some lanes of a warp are not where the others wait for them");
  }
}

inline void run_block(std::vector<Fiber>& fibers) {
  State& s = state();
  const int warps = (static_cast<int>(fibers.size()) + 31) / 32;
  if (&__start_lk_shared[0]) std::memset(__start_lk_shared, 0xff, __stop_lk_shared - __start_lk_shared);
  for (Fiber& f : fibers) {
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, Fiber::STACK};
    f.context.uc_link = &s.scheduler;
    f.done = false;
    makecontext(&f.context, fiber, 0);
  }
  std::vector<int> order(warps);
  for (int i = 0; i < warps; ++i) order[i] = i;
  for (;;) {
    std::shuffle(order.begin(), order.end(), s.order);
    for (int warp : order) run_warp(fibers, warp * 32, std::min<int>(warp * 32 + 32, fibers.size()));
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
