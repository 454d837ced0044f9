// Attention rollout (ops/rollout.h) on the device: one launch per layer, last layer first.
//   out[j] = c[j] (half of it where j is one of the step's positions) + 1/2 sum_r c[position_r] mean[r, j]
#pragma once

#include "ops/cuda/step.h"

namespace dllm::ops::cuda {

struct RolloutArgs {
  const float* mean;  // [max_rows, ld_mean] of this layer: rows packed as in `sequences`
  int64_t ld_mean;
  const SequenceRows* sequences;  // device, [n_sequences]
  const int32_t* positions;  // [rows]
  int32_t n_sequences, max_keys;
  const float* c;  // [n_sequences, ld]; null: all ones (the last layer)
  float* out;  // [n_sequences, ld]
  int64_t ld;
};
// Every column adds its rows in ascending order.
void rollout(Stream stream, const RolloutArgs& args);

}  // namespace dllm::ops::cuda
