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
  double confidence;   // by `remasking`: what threshold and factor look at
  double score;        // what positions are ordered by: the confidence, unless a score transform is in force
  double entropy = 0;  // of the position's distribution, in nats (gamma)
  bool stable = true;  // KLASS lets threshold and factor choose it
};

// Where in its block a sequence is.
struct StepPosition {
  uint32_t step = 0;            // forward index of the sequence, over the whole generation: keys the noise
  int64_t step_in_block = 0;    // from 0
  int64_t masked_at_start = 0;  // positions that were masked when the block began
  int64_t eligible = 0;         // positions that may still be committed in this block, computed by this step or not
};

// What a score transform knows of a position.
struct ScoreContext {
  double density = 1;  // certainty density, 1 where no prior is in force
  int32_t from_block_start = 0;
};

// The confidence as a number that orders positions and may be multiplied: exp(-H) for negative entropies (as they are, with
// reference_quirks).
double certainty(const GenerationConfig& config, double confidence);

// x0, its confidence and its score from a row's statistics.
Proposal propose(const GenerationConfig& config, const ModelSpec& spec, int32_t position, uint32_t step,
                 const ops::RowStats& stats, const ScoreContext& context);

// Chooses what to commit; keeps the memory of its lists from step to step.
class TransferSelector {
 public:
  // Indices into `proposals` (ascending positions) to commit, ascending; valid until the next call. Never empty where a
  // rule promises progress; may be empty under the Dream schedule, whose counts are truncated. Ties in confidence go to
  // the lowest position. A call with no more proposals than one before takes no memory.
  std::span<const int32_t> select(const GenerationConfig& config, const StepPosition& at,
                                  std::span<const Proposal> proposals);

 private:
  std::vector<double> key_;  // per proposal, what it is ordered by
  std::vector<int32_t> order_, chosen_;
};

// The statistics pass that the config asks for.
ops::RowStatsParams stats_params(const GenerationConfig& config, const ModelSpec& spec);

}  // namespace dllm
