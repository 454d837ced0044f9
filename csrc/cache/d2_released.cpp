// d2Cache as released (github.com/Kamichanw/d2Cache, 72feb60), for reference_quirks. It differs from d2_policy.cpp where the
// code does not do what it says it does:
// - the update of certainties never takes effect, so those of step 0 are used throughout;
// - rows are chosen for the block of the step before, which its caller has reduced to what that step could commit: the block's
//   length shrinks, and with it the grid that the search range is rounded to;
// - stop ids do not bound the candidates;
// - Dream: row P - 1 is set, not added: exactly if position P is chosen;
// - batches: every sequence computes as many rows as the largest.

#include <algorithm>
#include <limits>
#include <optional>

#include "cache/d2_rows.h"
#include "cache/policy.h"
#include "decode/density.h"
#include "runtime/order.h"

namespace dllm {

namespace {

class ReleasedD2Cache final : public CachePolicy {
 public:
  ReleasedD2Cache(const D2CacheConfig& config, const ModelSpec& spec) : config_(config), shift_(spec.logit_shift) {}

  void plan(const SequenceView& view, int, StepPlan& out) override {
    out.importance = true;
    if (view.step == 0) return plan_everything(view.length(), out);
    rows_.clear(view.length());
    bool first_is_chosen = false;
    for (int32_t p : next_to_decode(view)) {
      first_is_chosen |= p == begin_;
      if (p - shift_ >= begin_) rows_.set(p - shift_);
    }
    committed_.for_each([&](int64_t p) { rows_.set(p); });
    add_nucleus(importance_, config_.rollout_p, rows_, scratch_);
    if (shift_) first_is_chosen ? rows_.set(begin_ - 1) : rows_.reset(begin_ - 1);
    inflate(config_.inflate_w, rows_);
    rows_.list(out.rows);
  }

  void observe(const SequenceView& view, const StepOutcome& outcome) override {
    if (view.step == 0) begin(view, outcome);
    const std::span<const double> density = density_->of(view.masked);
    for (size_t p = 0; p < prior_.size(); ++p) prior_[p] = certainty_[p] * density[p];
    importance_.assign(outcome.importance.begin(), outcome.importance.end());
    block_.assign(outcome.eligible.begin(), outcome.eligible.end());
    committed_.clear(view.length());
    for (int32_t p : outcome.committed) committed_.set(p);
  }

  bool wants_all_scores() const override { return certainty_.empty(); }

  // The block's priors are raised by the highest of all sequences.
  void observe_together(std::span<CachePolicy* const> batch) override {
    double highest = -std::numeric_limits<double>::infinity();
    for (CachePolicy* other : batch) {
      const std::vector<double>& prior = static_cast<ReleasedD2Cache*>(other)->prior_;
      highest = std::max(highest, *std::max_element(prior.begin() + begin_, prior.end()));
    }
    for (CachePolicy* other : batch)
      for (int32_t p : static_cast<ReleasedD2Cache*>(other)->block_)
        static_cast<ReleasedD2Cache*>(other)->prior_[size_t(p)] += highest;
  }

  // Every sequence computes as many rows as the largest: generated positions by importance + prior + the highest importance
  // among the spare rows of all sequences, positions of the prompt by importance.
  void plan_together(std::span<CachePolicy* const> batch, std::span<StepPlan* const> plans) override {
    size_t count = 0;
    double highest = 0;
    for (size_t i = 0; i < batch.size(); ++i) {
      auto& other = static_cast<ReleasedD2Cache&>(*batch[i]);
      count = std::max(count, plans[i]->rows.size());
      for (int32_t p : other.spare_rows(*plans[i])) highest = std::max(highest, double(other.importance_[size_t(p)]));
    }
    for (size_t i = 0; i < batch.size(); ++i) {
      auto& other = static_cast<ReleasedD2Cache&>(*batch[i]);
      std::vector<int32_t>& spare = other.spare_rows(*plans[i]);
      std::sort(spare.begin(), spare.end(), by_falling([&](int32_t p) {
                  return double(other.importance_[size_t(p)]) + (p >= begin_ ? highest + other.prior_[size_t(p)] : 0.0);
                }));
      std::vector<int32_t>& rows = plans[i]->rows;
      spare.resize(std::min(spare.size(), count - rows.size()));
      rows.insert(rows.end(), spare.begin(), spare.end());
      std::sort(rows.begin(), rows.end());
    }
  }

 private:
  // Step 0 is over: the certainties that count, and memory for all that follows.
  void begin(const SequenceView& view, const StepOutcome& outcome) {
    begin_ = view.prompt_length;
    density_.emplace(view.editable, config_.sigma);
    certainty_.assign(size_t(view.length()), 0.0);
    for (const StepOutcome::Score& s : outcome.scores) certainty_[size_t(s.position)] = s.certainty;
    prior_.resize(size_t(view.length()));
    rows_.clear(view.length());
    scratch_.reserve(size_t(view.length()));
  }

  std::vector<int32_t>& spare_rows(const StepPlan& plan) {
    scratch_.clear();
    for (int32_t p = 0; p < int32_t(importance_.size()); ++p)
      if (!std::binary_search(plan.rows.begin(), plan.rows.end(), p)) scratch_.push_back(p);
    return scratch_;
  }

  // The current_k masked positions of highest prior. The search begins with the last step's block and ends with a multiple
  // of its length, which is the number of positions that it could commit.
  std::span<const int32_t> next_to_decode(const SequenceView& view) {
    const int64_t k = config_.current_k, size = int64_t(block_.size());
    std::vector<int32_t>& masked = scratch_;
    view.masked.list(masked);
    const int64_t last = int64_t(masked.size()) >= k ? masked[size_t(k - 1)] : view.length() - 1;
    const int64_t end = begin_ + ((last - begin_) / size + 1) * size;
    std::erase_if(masked, [&](int32_t p) { return p < block_.front() || p >= end; });
    std::sort(masked.begin(), masked.end(), by_falling([&](int32_t p) { return prior_[size_t(p)]; }));
    masked.resize(std::min(masked.size(), size_t(k)));
    return masked;
  }

  D2CacheConfig config_;
  int shift_;
  // Per position; nothing is known of the prompt's certainties.
  std::vector<double> certainty_;  // of step 0
  std::vector<double> prior_;  // certainty x density after the last step, the block's raised
  std::vector<float> importance_;  // of the last step
  int32_t begin_ = 0;  // the first generated position
  std::vector<int32_t> block_;  // what the last step could commit
  Bitmap committed_;  // what it did
  Bitmap rows_;  // of the step being planned
  std::optional<CertaintyDensity> density_;
  std::vector<int32_t> scratch_;
};

}  // namespace

std::unique_ptr<CachePolicy> make_released_d2_cache(const GenerationConfig& config, const ModelSpec& spec) {
  return std::make_unique<ReleasedD2Cache>(config.d2, spec);
}

}  // namespace dllm
