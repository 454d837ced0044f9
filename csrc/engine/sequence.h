// One sequence on its way from prompt to result: canvas, block, cache and counters. The loop (engine.cpp) packs the rows
// of all running sequences into one step; nothing here knows of the others, which is why a batch changes no result (but for CachePolicy::plan_together).
#pragma once

#include <chrono>
#include <memory>
#include <optional>

#include "cache/feature_cache.h"
#include "cache/kv_cache.h"
#include "cache/policy.h"
#include "decode/density.h"
#include "decode/kl_history.h"
#include "decode/transfer.h"
#include "engine/canvas.h"
#include "engine/events.h"
#include "model/model.h"

namespace dllm {

class Sequence {
 public:
  // infill: prompt positions that hold the mask id are editable.
  // All memory that its steps need is taken here or by the first of them.
  Sequence(int64_t index, const std::vector<int32_t>& prompt, bool infill, const GenerationConfig& config,
           const ModelSpec& spec, const Model& model);
  StepSize largest_step() const;

  // Moves on to the next block with something to decide; false when the sequence is finished.
  bool advance();
  int64_t index() const { return index_; }
  int64_t block() const { return block_; }
  int64_t step() const { return at_.step; }
  int64_t step_in_block() const { return at_.step_in_block; }
  int64_t eligible() const { return at_.eligible; }  // positions that the next step may commit
  const Canvas& canvas() const { return canvas_; }
  std::span<const ops::KvSlab> slabs() const { return streams_[0].kv.slabs(); }
  std::span<const LayerFeatures> feature_slabs() const { return streams_[0].features.slabs(); }

  // Plans the step: rows of every stream (with guidance two, the second without the prompt). The first one's plan may be
  // changed before append_rows (CachePolicy::plan_together).
  StepPlan& plan_step();
  CachePolicy& policy() { return *policy_; }
  // Appends the planned rows, decides which logits the step reads, and appends reads()'s rows to out_rows, once per
  // evaluated stream.
  void append_rows(StepInput& in);

  // Positions whose logits the step reads; `blanks` are read without having been computed (reference_quirks).
  std::span<const int32_t> reads() const { return reads_; }
  std::span<const int32_t> blanks() const { return blanks_; }
  int64_t evaluated_streams() const { return evaluated_; }
  NoiseKey key(int32_t position) const { return {config_.seed, at_.step, uint32_t(position)}; }

  // Guidance of one read row (decode/filters.h), from this step's second stream or from the kept difference.
  void guide(int32_t position, float* cond, const float* uncond);
  // KLASS: the row's distribution, after guidance and filters. Different positions may be noted at the same time.
  void note_distribution(int32_t position, const float* logits, double log_sum_exp);

  // Commits by the statistics of reads() and blanks(), which the caller has checked to be finite, and says what it did.
  const StepEvent& commit(const ops::RowStats* reads, const ops::RowStats* blanks, std::span<const float> importance,
                          StepStats counters);

  // Takes over what a step has committed, wherever it was chosen. `rows` it computed, all of them where is_full; `computed`
  // lists them, or is empty where nobody listens.
  struct Committed {
    int32_t position, token;
    float confidence;
  };
  const StepEvent& apply(std::span<const Committed> committed, int64_t rows, std::span<const int32_t> computed,
                         bool is_full, StepStats counters);

  Result take_result();

 private:
  struct Stream {  // one evaluation of the model, with its own cached values
    KvCache kv;
    FeatureCache features;
    StepPlan plan;
  };

  void reserve();
  bool reads_every_mask() const;
  void begin_block();
  void find_eligible();
  void note_stop(int32_t position, int32_t token);
  SequenceView view_of(const StepPosition& at) const;
  bool is_computed(int32_t position) const;
  bool computes_everything() const;
  void propose_all(std::span<const int32_t> positions, const ops::RowStats* stats);

  int64_t index_;
  const GenerationConfig& config_;
  const Rules rules_;
  const ModelSpec& spec_;
  Canvas canvas_;
  std::vector<Stream> streams_;  // one, or two with guidance
  int64_t evaluated_ = 1;  // of them, in this step
  std::unique_ptr<CachePolicy> policy_;
  std::optional<KlHistory> history_;  // KLASS
  std::vector<std::vector<float>> guidance_;  // per position: the kept difference [vocab]; empty unless it is reused

  int64_t block_ = -1;
  std::vector<int32_t> block_positions_;  // ascending
  int32_t block_begin_ = 0;  // first generated position
  StepPosition at_{};
  std::optional<CertaintyDensity> prior_;
  std::span<const double> density_;  // per position, where a certainty prior is in force
  std::vector<int32_t> eligible_;  // masked positions that this step may commit, ascending
  std::vector<int32_t> reads_, blanks_;  // ascending
  std::vector<Proposal> proposals_;
  std::vector<StepOutcome::Score> scores_;
  TransferSelector selector_;
  std::vector<Committed> committed_;
  StepEvent event_{};  // of the last step
  int32_t first_stop_;  // lowest generated position with a committed stop id, or the canvas length

  double selection_seconds_ = 0;  // of this step, outside the model
  std::vector<int64_t> commit_step_;  // per position
  Result result_;
  std::chrono::steady_clock::time_point started_;
};

}  // namespace dllm
