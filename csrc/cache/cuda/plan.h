// The cache policies on the device: which rows a step computes, written into the step's plan (model/cuda/step_memory.h).
// The twins of fast_dllm.cpp, dllm_policy.cpp and d2_policy.cpp, for the algorithms as intended.
#pragma once

#include <cstdint>

#include "decode/config.h"
#include "decode/cuda/sequence_state.h"
#include "model/cuda/step_memory.h"

namespace dllm::cuda {

// What does not change while a batch runs.
struct PlanArgs {
  SequenceState* states;  // [sequences]
  int32_t sequences;
  CacheKind cache;
  int32_t shift;  // ModelSpec::logit_shift
  uint64_t seed;
  // dLLM-Cache
  int64_t kp, kr;
  double rou;
  const uint8_t* always_refresh;  // [layers], on the device
  int32_t layers;
  // d2Cache
  double rollout_p;
  int64_t current_k, inflate_w;

  // Scratch: a sequence's lists before they are packed, [sequences][max_length] each, and sort_slots(max_length) sort keys.
  int32_t max_length;
  int32_t* rows;
  int32_t* reads;
  uint8_t* chosen;  // [sequences][2 max_length]
  uint64_t* sort_keys;
  // [sequences] each: lengths of the lists, rows that a layer which chooses would compute, and the pattern of the step.
  int32_t *row_count, *read_count;
  int32_t *live_count, *verified_count;  // dLLM-Cache: of a layer that chooses
  ops::cuda::LayerPlan* layer_plans;  // likewise
};

// Moves every sequence on to the next block with something to decide, and lists the rows and reads of its next step.
void plan_step(void* stream, const PlanArgs& args);

// Packs the lists into the plan if they fit. If not, the plan is empty, and so is the step; the records say what it needs.
struct PackArgs {
  PlanArgs plan;
  StepMemory step;
  int32_t max_sequences;  // of the memory: strides of plans
  StepNeeds limits;
  StepRecord* records;  // [sequences]
};
void pack_step(void* stream, const PackArgs& args);

// Elements of sort_keys per sequence.
DLLM_HD inline int32_t sort_slots(int32_t max_length) {
  int32_t n = 32;
  while (n < max_length) n *= 2;
  return n;
}

}  // namespace dllm::cuda
