// Row statistics (ops/row_stats.h) on the device, one vocabulary tile after the other: a tile's logits come from a GEMM
// into scratch memory, this kernel folds them into the rows' statistics. No [rows, vocab] tensor exists.
#pragma once

#include "ops/cuda/step.h"
#include "ops/row_stats.h"

namespace dllm::ops::cuda {

// Running sums of a row between tiles: `stats` is final after the last tile.
struct RowStatsState {
  float max;  // over all ids so far that are not banned
  double sum, weighted_sum;  // of exp(x - max), and of exp(x - max) (x - max)
  double best_noisy;  // logit + noise_scale * gumbel of stats.sampled_id
  RowStats stats;
};

struct RowStatsArgs {
  const float* logits;  // [capacity, ld], ids [first_id, first_id + n)
  int64_t ld;
  int32_t first_id, n;
  bool first, last;  // tile
  const int32_t* n_rows;
  int32_t capacity;
  RowStatsParams params;
  const NoiseKey* keys;  // [n_rows], read only if params.noise_scale > 0
  RowStatsState* state;  // [capacity]
};
// Ties go to the lowest id. The same statistics as the CPU's: exponentials fp32, their sums fp64, noise bit for bit
// that of ops/philox.h. One launch.
void row_stats_tile(Stream stream, const RowStatsArgs& args);

}  // namespace dllm::ops::cuda
