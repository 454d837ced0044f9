// Which of a step's proposals are committed, on the CPU.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "decode/rules.h"

namespace dllm {

// Keeps the memory of its lists from step to step.
class TransferSelector {
 public:
  // Indices into `proposals` (ascending positions) to commit, ascending; valid until the next call. Ties in confidence go
  // to the lowest position. A call with no more proposals than one before takes no memory.
  std::span<const int32_t> select(const Rules& rules, const StepPosition& at, std::span<const Proposal> proposals);

 private:
  std::vector<double> key_;  // per proposal, what it is ordered by
  std::vector<int32_t> by_key_, by_compared_, chosen_;
};

// The statistics pass that the config asks for.
ops::RowStatsParams stats_params(const GenerationConfig& config, const ModelSpec& spec);

}  // namespace dllm
