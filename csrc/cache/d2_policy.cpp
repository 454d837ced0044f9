// d2Cache (Jiang et al. 2025, arXiv 2509.23094, github.com/Kamichanw/d2Cache): one set of rows for all layers. Step 0 computes
// everything; from then on a step computes the masked positions most likely to be decoded next, those decoded by the step
// before (their K and V still encode the mask), and the positions that attention rollout finds most important.
//
// This is the algorithm as intended; what the released code does instead is d2_released.cpp. Rows are chosen when a step is
// planned, so for the block that the step decodes, and certainties are updated whenever a position is computed.

#include <algorithm>
#include <optional>
#include <utility>

#include "cache/d2_rows.h"
#include "cache/policy.h"
#include "decode/density.h"
#include "runtime/order.h"

namespace dllm {

namespace {

class D2CachePolicy final : public CachePolicy {
 public:
  D2CachePolicy(const D2CacheConfig& config, const ModelSpec& spec) : config_(config), shift_(spec.logit_shift) {}

  void plan(const SequenceView& view, int, StepPlan& out) override {
    out.importance = true;
    if (view.step == 0) return plan_everything(view.length(), out);
    rows_.clear(view.length());
    for (int32_t p : next_to_decode(view)) rows_.set(p - shift_);
    committed_.for_each([&](int64_t p) { rows_.set(p); });
    add_nucleus(importance_, config_.rollout_p, rows_, scratch_);
    inflate(config_.inflate_w, rows_);
    rows_.list(out.rows);
  }

  void observe(const SequenceView& view, const StepOutcome& outcome) override {
    if (view.step == 0) begin(view);
    for (const StepOutcome::Score& s : outcome.scores) certainty_[size_t(s.position)] = s.certainty;
    committed_.clear(view.length());
    for (int32_t p : outcome.committed) committed_.set(p);
    importance_.assign(outcome.importance.begin(), outcome.importance.end());
  }

  bool wants_all_scores() const override { return true; }

 private:
  // The current_k best masked positions, in no order: the current block's first, then by certainty x density, then by
  // position. The search ends with the block in which the current_k-th masked position lies.
  std::span<const int32_t> next_to_decode(const SequenceView& view) {
    std::vector<int32_t>& candidates = scratch_;
    view.masked.list(candidates);
    std::erase_if(candidates, [&](int32_t p) { return p >= view.first_stop; });
    const size_t k = size_t(config_.current_k);
    if (candidates.size() < k) return candidates;
    const int32_t end = end_of_block(view, candidates[k - 1]);
    std::erase_if(candidates, [&](int32_t p) { return p >= end; });
    const std::span<const double> density = density_->of(view.masked);
    const auto in_block = [&](int32_t p) {
      return std::binary_search(view.block.positions.begin(), view.block.positions.end(), p);
    };
    std::nth_element(
        candidates.begin(), candidates.begin() + int64_t(k - 1), candidates.end(),
        by_falling([&](int32_t p) { return std::pair(in_block(p), certainty_[size_t(p)] * density[size_t(p)]); }));
    candidates.resize(k);
    return candidates;
  }

  // One past the block of position p; filled positions of the prompt belong to the first block.
  int32_t end_of_block(const SequenceView& view, int32_t p) const {
    const int64_t offset = std::max<int64_t>(p - view.prompt_length, 0), length = view.block_length;
    return int32_t(std::min<int64_t>(view.prompt_length + (offset / length + 1) * length, view.length()));
  }

  // Step 0 is over: memory for all that follows.
  void begin(const SequenceView& view) {
    density_.emplace(view.editable, config_.sigma);
    certainty_.assign(size_t(view.length()), 0.0);
    rows_.clear(view.length());
    scratch_.reserve(size_t(view.length()));
  }

  D2CacheConfig config_;
  int shift_;
  std::optional<CertaintyDensity> density_;
  std::vector<double> certainty_;  // per position, when last computed
  std::vector<float> importance_;  // per position, of the last step
  Bitmap committed_;  // by the last step
  Bitmap rows_;  // of the step being planned
  std::vector<int32_t> scratch_;
};

}  // namespace

std::unique_ptr<CachePolicy> make_d2_cache(const GenerationConfig& config, const ModelSpec& spec) {
  return std::make_unique<D2CachePolicy>(config.d2, spec);
}

}  // namespace dllm
