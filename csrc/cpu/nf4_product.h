// What the forms of an NF4 product (nf4_product.cpp, nf4_pairs.h, nf4_tiles.h) share.
#pragma once
#include "nf4_runs.h"
#include "panels.h"

namespace lk::cpu {
namespace {

struct Call {
  const NF4Linear* p;
  bool turned;
  int64_t columns, wide;  // of y; of a task
  uint32_t* x = nullptr;  // nf4_pairs.h and nf4_tiles.h: rows m0 ... m1 of x, laid out
  int64_t m0 = 0, m1 = 0, rows = 0;  // how many they are, rounded up
};

// Codes that are needed some rows of W later: rows lie too far apart for the processor to guess.
LK_INLINE void prefetch_codes(const NF4Weight& w, int64_t n, int64_t k) {
  constexpr int64_t ROWS = 16;
  if (n + ROWS < w.N) __builtin_prefetch(w.packed + ((n + ROWS) * w.K + k) / 2, 0, 2);
}

}  // namespace
}  // namespace lk::cpu
