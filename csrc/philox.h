// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the one place in C++.
// One counter yields eight 16-bit lanes for eight consecutive columns: column 8c+j of row m belongs to counter
// (c, low half of m, high half of m, 0), lane j is the (j odd ? high : low) half of word j/2.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LK_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace lk {

constexpr uint32_t PHILOX_MULTIPLIER0 = 0xD2511F53, PHILOX_MULTIPLIER1 = 0xCD9E8D57;
constexpr uint32_t PHILOX_STEP0 = 0x9E3779B9, PHILOX_STEP1 = 0xBB67AE85;  // what a key grows by each round
constexpr int PHILOX_ROUNDS = 7;

struct Philox8 {
  uint32_t word[4];
  LK_HOST_DEVICE uint32_t lane(int j) const { return (word[j >> 1] >> ((j & 1) * 16)) & 0xffffu; }
};

static LK_HOST_DEVICE Philox8 philox8(uint64_t seed, uint64_t row, uint32_t column8) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = column8, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(PHILOX_MULTIPLIER0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(PHILOX_MULTIPLIER1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(p0);
    key0 += PHILOX_STEP0;
    key1 += PHILOX_STEP1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace lk
