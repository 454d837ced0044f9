// One sequence on its way from prompt to result: canvas, block, cache and counters. The loop (engine.cpp) packs the rows
// of all running sequences into one step; nothing here knows of the others, which is why a batch changes no result.
#pragma once

#include <chrono>
#include <memory>

#include "cache/kv_cache.h"
#include "cache/policy.h"
#include "decode/transfer.h"
#include "engine/canvas.h"
#include "engine/events.h"
#include "model/transformer.h"

namespace dllm {

class Sequence {
 public:
  // infill: prompt positions that hold the mask id are editable.
  Sequence(int64_t index, const std::vector<int32_t>& prompt, bool infill, const GenerationConfig& config,
           const ModelSpec& spec, DType dtype);

  // Moves on to the next block with something to decide; false when the sequence is finished.
  bool advance();

  // Plans the step and appends its rows (with guidance: twice, the second time without the prompt).
  void append_rows(StepInput& in);

  // Noise keys of the logit rows, in the order of append_rows.
  void append_keys(std::vector<NoiseKey>& keys) const;
  int64_t logit_rows() const { return int64_t(eligible_.size()); }
  int64_t streams() const { return int64_t(kv_.size()); }  // model evaluations per step: 2 with guidance
  int64_t step() const { return at_.step; }

  // Commits by the statistics of logit_rows() rows and fills `event`. The caller has checked that the statistics are
  // finite.
  void commit(const ops::RowStats* stats, StepStats counters, StepEvent& event);

  Result take_result();

 private:
  void begin_block();
  void find_eligible();
  void note_stop(int32_t position, int32_t token);

  int64_t index_;
  const GenerationConfig& config_;
  const ModelSpec& spec_;
  Canvas canvas_;
  std::vector<KvCache> kv_;  // one, or two with guidance
  std::unique_ptr<CachePolicy> policy_;

  int64_t block_ = -1;
  std::vector<int32_t> block_positions_;  // ascending
  int32_t block_begin_ = 0;  // first generated position
  StepPosition at_{};
  StepPlan plan_;
  std::vector<int32_t> eligible_;  // masked positions that this step may commit, ascending
  int32_t first_stop_;  // lowest generated position with a committed stop id, or the canvas length

  std::vector<int64_t> commit_step_;  // per position
  Result result_;
  std::chrono::steady_clock::time_point started_;
};

}  // namespace dllm
