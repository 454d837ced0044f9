// Which of a step's proposals are committed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "decode/config.h"
#include "model/spec.h"
#include "ops/row_stats.h"

namespace dllm {

// What the model proposes for one masked position.
struct Proposal {
  int32_t position;
  int32_t token;
  double confidence;  // by `remasking`; larger commits earlier
};

// Where in its block a sequence is.
struct StepPosition {
  uint32_t step;           // forward index of the sequence, over the whole generation: keys the noise
  int64_t step_in_block;   // from 0
  int64_t masked_at_start;  // positions that were masked when the block began
};

// x0 and its confidence from a row's statistics.
Proposal propose(const GenerationConfig& config, const ModelSpec& spec, int32_t position, uint32_t step,
                 const ops::RowStats& stats);

// Indices into `proposals` (ascending positions) to commit, ascending. Never empty where a rule promises progress; may be
// empty under the Dream schedule, whose counts are truncated. Ties in confidence go to the lowest position.
std::vector<int32_t> select_transfers(const GenerationConfig& config, const StepPosition& at,
                                      std::span<const Proposal> proposals);

// The statistics pass that the config asks for.
ops::RowStatsParams stats_params(const GenerationConfig& config, const ModelSpec& spec);

}  // namespace dllm
