// The processor's tile registers (AMX): eight of them, each 16 rows of 64 bytes, and products of bfloat16 with float32 sums.
//
// dot<C, A, B>: C[i][j] += sum over p < 16 of A[i][2 p] B[p][2 j] + A[i][2 p + 1] B[p][2 j + 1], where C is 16 x 16 float32, A 16 x 32
// bfloat16, 32 of the depth to a row, and B 16 x 32, pairs of the depth beside each other. What is subnormal counts as zero.
#pragma once
#ifdef LK_ISA_AMX
#include "tile.h"

namespace lk::cpu {
namespace {

constexpr int64_t TILE_ROWS = 16;                     // rows of a tile, and float32 of one
constexpr int64_t TILE_DEPTH = 32;                     // bfloat16 of a row: of the depth, where it is A
constexpr int64_t TILE_FLOATS = TILE_ROWS * TILE_ROWS;     // of a tile in memory, its rows behind each other
constexpr int64_t TILE_WORDS = TILE_FLOATS;       // pairs of bfloat16 of one

#if !defined(LK_AVX512_EMULATION) && !defined(LK_TILE_EMULATION)

// For as long as it lives this thread's tiles are whole; they hold nothing when it begins.
struct Tiles {
  Tiles() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~Tiles() { asm volatile("tilerelease"); }
};

// ld: of a row, in bytes. The compiler's own functions do not say that they read memory.
template <int TILE>
LK_INLINE void load_tile(const void* from, int64_t ld = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(ld), "i"(TILE) : "memory");
}
template <int TILE>
LK_INLINE void store_tile(void* to, int64_t ld = 64) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(ld), "i"(TILE) : "memory");
}
template <int TILE>
LK_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int C, int A, int B>
LK_INLINE void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

thread_local char emulated[8][TILE_ROWS][64];
struct Tiles {};
template <int TILE>
static void load_tile(const void* from, int64_t ld = 64) {
  for (int64_t i = 0; i < TILE_ROWS; ++i) memcpy(emulated[TILE][i], static_cast<const char*>(from) + i * ld, 64);
}
template <int TILE>
static void store_tile(void* to, int64_t ld = 64) {
  for (int64_t i = 0; i < TILE_ROWS; ++i) memcpy(static_cast<char*>(to) + i * ld, emulated[TILE][i], 64);
}
template <int TILE>
static void zero_tile() {
  memset(emulated[TILE], 0, sizeof emulated[TILE]);
}
template <int C, int A, int B>
static void dot() {
  uint16_t a[TILE_ROWS][TILE_DEPTH], b[TILE_ROWS][TILE_DEPTH];
  float c[TILE_ROWS][TILE_ROWS];
  memcpy(a, emulated[A], sizeof a), memcpy(b, emulated[B], sizeof b), memcpy(c, emulated[C], sizeof c);
  for (int64_t i = 0; i < TILE_ROWS; ++i)
    for (int64_t k = 0; k < TILE_DEPTH; ++k)
      for (int64_t j = 0; j < TILE_ROWS; ++j) c[i][j] = __builtin_fmaf(bf16_to_float(a[i][k]), bf16_to_float(b[k / 2][2 * j + k % 2]), c[i][j]);
  memcpy(emulated[C], c, sizeof c);
}

#endif

// Rows of 16 lanes become columns, in place.
LK_INLINE void turn_tile(__m512i (&v)[TILE_ROWS]) {
  __m512i a[TILE_ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // v[4 g + i] has, of rows 4 g ... 4 g + 3, the columns i, 4 + i, 8 + i and 12 + i
    const __m512i low = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88), high = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88), high2 = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    a[i] = _mm512_shuffle_i32x4(low, low2, 0x88), a[8 + i] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    a[4 + i] = _mm512_shuffle_i32x4(high, high2, 0x88), a[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = a[i];
}

}  // namespace
}  // namespace lk::cpu
#endif
