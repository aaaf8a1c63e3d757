// How the gradients' work is cut, and what of it a half-precision base has of its own.
#pragma once
#include "thin.cuh"

namespace lk::cuda {

struct Plan {
  int64_t programs;          // of the pass over dy, and parts of dB
  int64_t slabs, slab_rows;  // of the pass over x, and parts of dA
  int64_t dB_size, dA_size;
};

// Rows of dy that a program takes at a time; of x, columns and ranks of a program, and rows of it at least.
struct GradTiles {
  int64_t up_rows, columns, ranks, down_rows;
};
// Fewer rows to a program, which has a part of dB of its own, where else most processors had none; not measured.
constexpr GradTiles half_tiles(int64_t M) { return {M > 4096 ? 64 : 32, 64, 32, 128}; }

// lowrank_grad but for the last launch
int lowrank_grad_half(const LowrankGrad& p, const Plan& plan, float* dB_parts, float* dA_parts, cudaStream_t stream);

namespace {

constexpr int64_t UP_PROGRAMS = 256;    // at most, so parts of dB at most
constexpr int64_t DOWN_PROGRAMS = 264;  // about

inline Plan plan(int64_t M, int64_t N, int64_t K, int64_t R, bool need_dA, bool need_dB, const GradTiles& tiles) {
  Plan plan = {};
  if (M == 0) return plan;
  const int64_t groups = blocks_of(M, tiles.up_rows);
  plan.programs = groups < UP_PROGRAMS ? groups : UP_PROGRAMS;
  plan.dB_size = need_dB ? N * R : 0;
  if (!need_dA) return plan;
  const int64_t wanted = DOWN_PROGRAMS / (blocks_of(K, tiles.columns) * blocks_of(R, tiles.ranks)), most = blocks_of(M, tiles.down_rows);
  const int64_t slabs = wanted < 1 ? 1 : wanted < most ? wanted : most;
  plan.slab_rows = blocks_of(blocks_of(M, slabs), 32) * 32;
  plan.slabs = blocks_of(M, plan.slab_rows);
  plan.dA_size = R * K;
  return plan;
}

}  // namespace
}  // namespace lk::cuda
