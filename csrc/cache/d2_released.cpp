// d2Cache as released (github.com/Kamichanw/d2Cache, 72feb60), for reference_quirks. It differs from d2_policy.cpp where the
// code does not do what it says it does:
// - the update of certainties never takes effect, so those of step 0 are used throughout;
// - rows are chosen at the end of the step before, with that step's block, which the caller has meanwhile reduced to its still
//   masked positions: the block's length shrinks, and with it the grid that the search range is rounded to;
// - stop ids do not bound the candidates;
// - Dream: row P - 1 is set, not added: exactly if position P is chosen;
// - batches: every sequence computes as many rows as the largest.

#include <algorithm>

#include "cache/d2_rows.h"
#include "cache/policy.h"

namespace dllm {

namespace {

class ReleasedD2Cache final : public CachePolicy, public BatchedRows {
 public:
  ReleasedD2Cache(const D2CacheConfig& config, const ModelSpec& spec) : config_(config), shift_(spec.logit_shift) {}

  void plan(const SequenceView& view, int, StepPlan& out) override {
    out.importance = true;
    out.is_full = view.step == 0;
    if (out.is_full) return plan_everything(view.length(), out);
    out.rows = next_rows_;
  }

  void observe(const SequenceView& view, const StepOutcome& outcome) override {
    const int32_t begin = view.prompt_length, length = view.length(), n = length - begin;
    if (certainty_.empty()) {
      certainty_.resize(size_t(n));
      for (const StepOutcome::Score& s : outcome.scores) certainty_[size_t(s.position - begin)] = s.certainty;
    }
    importance_.assign(outcome.importance.begin(), outcome.importance.end());

    const std::vector<double> density = density_of(view, config_.sigma);
    prior_.resize(size_t(n));
    for (int32_t i = 0; i < n; ++i) prior_[size_t(i)] = certainty_[size_t(i)] * density[size_t(begin + i)];
    batch_prior_ = highest_prior();
    block_.assign(outcome.eligible.begin(), outcome.eligible.end());

    Bitmap chosen(n);
    for (int32_t i : choose(view)) chosen.set(i);
    Bitmap rows(length);
    chosen.for_each([&](int64_t i) {
      if (i >= shift_) rows.set(begin + i - shift_);
    });
    for (int32_t p : outcome.committed) rows.set(p);
    add_nucleus(importance_, config_.rollout_p, rows);
    if (shift_) chosen.test(0) ? rows.set(begin - 1) : rows.reset(begin - 1);
    inflate(config_.inflate_w, rows);
    next_rows_ = members_of(rows);
  }

  bool wants_all_scores() const override { return true; }

  BatchedRows* batched_rows() override { return this; }
  double highest_prior() const override { return *std::max_element(prior_.begin(), prior_.end()); }
  void set_batch_prior(double highest) override { batch_prior_ = highest; }

  double spare_importance(const StepPlan& plan) const override {
    double highest = 0;
    for (int32_t p = 0; p < int32_t(importance_.size()); ++p)
      if (!std::binary_search(plan.rows.begin(), plan.rows.end(), p))
        highest = std::max(highest, double(importance_[size_t(p)]));
    return highest;
  }

  // Generated positions by importance + prior + spare importance, those of the prompt by importance.
  void top_up(int64_t count, double spare_importance, StepPlan& plan) const override {
    const int32_t length = int32_t(importance_.size()), begin = length - int32_t(prior_.size());
    std::vector<double> score(importance_.begin(), importance_.end());
    for (int32_t p = begin; p < length; ++p) score[size_t(p)] += spare_importance + raised_prior(p - begin, begin);
    std::vector<int32_t> spare;
    for (int32_t p = 0; p < length; ++p)
      if (!std::binary_search(plan.rows.begin(), plan.rows.end(), p)) spare.push_back(p);
    std::stable_sort(spare.begin(), spare.end(),
                     [&](int32_t a, int32_t b) { return score[size_t(a)] > score[size_t(b)]; });
    for (size_t i = 0; int64_t(plan.rows.size()) < count && i < spare.size(); ++i) plan.rows.push_back(spare[i]);
    std::sort(plan.rows.begin(), plan.rows.end());
  }

 private:
  // Certainty x density of generated position i (from 0); the block's are raised by the highest of the batch.
  double raised_prior(int32_t i, int32_t begin) const {
    const bool in_block = std::binary_search(block_.begin(), block_.end(), begin + i);
    return prior_[size_t(i)] + (in_block ? batch_prior_ : 0.0);
  }

  // Generated positions (from 0) to compute, of those masked after the step.
  std::vector<int32_t> choose(const SequenceView& view) const {
    const int32_t begin = view.prompt_length, n = int32_t(prior_.size());
    const int64_t k = config_.current_k, size = int64_t(block_.size());
    std::vector<int32_t> masked;
    for (int32_t i = 0; i < n; ++i)
      if (view.masked.test(begin + i)) masked.push_back(i);
    const int64_t last = int64_t(masked.size()) >= k ? masked[size_t(k - 1)] : n - 1;
    const int64_t end = (last / size + 1) * size;
    std::erase_if(masked, [&](int32_t i) { return i < block_.front() - begin || i >= end; });
    std::stable_sort(masked.begin(), masked.end(),
                     [&](int32_t a, int32_t b) { return raised_prior(a, begin) > raised_prior(b, begin); });
    masked.resize(std::min(masked.size(), size_t(k)));
    return masked;
  }

  D2CacheConfig config_;
  int shift_;
  std::vector<double> certainty_;  // per generated position, of step 0
  std::vector<double> prior_;  // certainty x density per generated position, after the last step
  double batch_prior_ = 0;  // the highest of all sequences
  std::vector<int32_t> block_;  // masked positions of the block when the last step began
  std::vector<float> importance_;  // per position, of the last step
  std::vector<int32_t> next_rows_;
};

}  // namespace

std::unique_ptr<CachePolicy> make_released_d2_cache(const GenerationConfig& config, const ModelSpec& spec) {
  return std::make_unique<ReleasedD2Cache>(config.d2, spec);
}

}  // namespace dllm
