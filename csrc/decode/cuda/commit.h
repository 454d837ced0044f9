// Choosing and committing on the device: the twin of Sequence::commit and TransferSelector, by the rules of decode/rules.h.
#pragma once

#include "decode/cuda/sequence_state.h"
#include "ops/cuda/row_stats.h"
#include "ops/cuda/step.h"

namespace dllm::cuda {

struct CommitArgs {
  SequenceState* states;  // [sequences]
  int32_t sequences;
  const Rules* rules;  // on the device
  const ops::cuda::RowStatsState* stats;  // of the step's reads, sequence by sequence
  const int32_t* reads;  // [sequences][max_length]: positions (PlanArgs::reads)
  const int32_t* read_count;  // [sequences]
  const float* importance;  // [sequences][importance_ld], where the cache is d2Cache; or null
  int64_t importance_ld;
  int32_t max_length, max_reads;

  // Scratch, [sequences][max_reads] each.
  Proposal* proposals;
  double* keys;
  int32_t *by_key, *by_compared, *chosen;

  StepRecord* records;  // [sequences]; `ran` says whether there is anything to do
  CommittedToken* committed;  // [sequences][max_reads]
};
void commit_step(void* stream, const CommitArgs& args);

}  // namespace dllm::cuda
