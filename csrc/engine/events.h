// What generate() reports: one event per sequence and step while it runs, one result per sequence at the end.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace dllm {

struct StepEvent {
  int64_t sequence;                // index of the prompt
  int64_t step;                    // forward index of the sequence
  int64_t block;
  std::vector<int32_t> positions;  // committed by this step, absolute, ascending
  std::vector<int32_t> token_ids;
  // What the positions were ranked by, before transforms of the score: p(x0) without noise for low_confidence and for origin
  // (which ranks by nothing), the margin p(1) - p(2), the negative entropy, or the uniform number of remasking random.
  std::vector<float> confidences;
  int64_t rows;  // computed for this sequence
  std::vector<int32_t> computed;  // these rows' positions, ascending
  bool is_full;  // every layer computed every position: every cached value is fresh
};

// Returns false to stop the whole generate() call, which then throws Interrupted.
using StepCallback = std::function<bool(const StepEvent&)>;

// Counters of one step, for one sequence (both passes of guidance are counted).
struct StepStats {
  int64_t rows = 0;  // in the step's plan: pushed through the layers, or carried past some of them (dLLM-Cache)
  int64_t layer_rows = 0;  // rows that a layer computed, summed over layers: n_layers * rows but for dLLM-Cache
  int64_t verify_rows = 0;  // rows of which a layer computed V only, to compare it, summed over layers
  int64_t logit_rows = 0;  // pushed through the LM head
  int64_t attention_pairs = 0;  // query rows x keys, summed over layers
  int64_t weight_bytes = 0;  // packed weights read by the step, shared by all sequences that ran in it
  int64_t commits = 0;  // positions committed
  int64_t buffer_bytes = 0;  // taken for slabs and scratch since the step before, by the whole process
  double seconds = 0;  // wall time of the step, all sequences that ran in it
  double selection_seconds = 0;  // of this sequence, spent choosing rows: densities, rollout, similarities, sorting
};

struct Result {
  std::vector<int32_t> token_ids;  // gen_length ids; EOS after the first stop id where generation stopped there
  std::vector<int32_t> prompt_ids;  // the prompt, infills filled
  std::vector<int64_t> commit_steps;  // per generated position, the step that committed it; -1: filled with EOS
  int64_t nfe = 0;  // model evaluations, full or partial, each 1; guidance counts its second pass
  std::vector<StepStats> steps;
  double seconds_total = 0;  // from this sequence's first step to its last
  double seconds_first_block = 0;  // until its first block was committed
};

}  // namespace dllm
