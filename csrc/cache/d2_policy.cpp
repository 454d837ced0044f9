// d2Cache (Jiang et al. 2025, arXiv 2509.23094, github.com/Kamichanw/d2Cache): one set of rows for all layers. Step 0 computes
// everything; from then on a step computes the masked positions most likely to be decoded next, those decoded by the step
// before (their K and V still encode the mask), and the positions that attention rollout finds most important.
//
// This is the algorithm as intended; what the released code does instead is d2_released.cpp. Rows are chosen when a step is
// planned, so for the block that the step decodes, and certainties are updated whenever a position is computed.

#include <algorithm>
#include <tuple>

#include "cache/d2_rows.h"
#include "cache/policy.h"
#include "decode/density.h"

namespace dllm {

namespace {

class D2CachePolicy final : public CachePolicy {
 public:
  D2CachePolicy(const D2CacheConfig& config, const ModelSpec& spec) : config_(config), shift_(spec.logit_shift) {}

  void plan(const SequenceView& view, int, StepPlan& out) override {
    out.importance = true;
    if (view.step == 0) return plan_everything(view.length(), out);
    Bitmap rows(view.length());
    for (int32_t p : next_to_decode(view)) rows.set(p - shift_);
    for (int32_t p : committed_) rows.set(p);
    add_nucleus(importance_, config_.rollout_p, rows);
    inflate(config_.inflate_w, rows);
    out.rows = rows.members();
  }

  void observe(const SequenceView& view, const StepOutcome& outcome) override {
    certainty_.resize(size_t(view.length()), 0.0);
    for (const StepOutcome::Score& s : outcome.scores) certainty_[size_t(s.position)] = s.certainty;
    committed_.assign(outcome.committed.begin(), outcome.committed.end());
    importance_.assign(outcome.importance.begin(), outcome.importance.end());
  }

  bool wants_all_scores() const override { return true; }

 private:
  // The current_k best masked positions: the current block's first, then by certainty x density, then by position. The search
  // ends with the block in which the current_k-th masked position lies.
  std::vector<int32_t> next_to_decode(const SequenceView& view) const {
    std::vector<int32_t> candidates;
    view.masked.for_each([&](int64_t p) {
      if (p < view.first_stop) candidates.push_back(int32_t(p));
    });
    const size_t k = size_t(config_.current_k);
    if (candidates.size() >= k) {
      const int32_t end = end_of_block(view, candidates[k - 1]);
      std::erase_if(candidates, [&](int32_t p) { return p >= end; });
    }
    const std::vector<double> density = certainty_density(view.editable, view.masked, config_.sigma);
    const auto in_block = [&](int32_t p) {
      return std::binary_search(view.block.positions.begin(), view.block.positions.end(), p);
    };
    const auto key = [&](int32_t p) { return std::tuple(!in_block(p), -certainty_[size_t(p)] * density[size_t(p)]); };
    std::stable_sort(candidates.begin(), candidates.end(), [&](int32_t a, int32_t b) { return key(a) < key(b); });
    candidates.resize(std::min(candidates.size(), k));
    return candidates;
  }

  // One past the block of position p; filled positions of the prompt belong to the first block.
  int32_t end_of_block(const SequenceView& view, int32_t p) const {
    const int64_t offset = std::max<int64_t>(p - view.prompt_length, 0), length = view.block_length;
    return int32_t(std::min<int64_t>(view.prompt_length + (offset / length + 1) * length, view.length()));
  }

  D2CacheConfig config_;
  int shift_;
  std::vector<double> certainty_;  // per position, when last computed
  std::vector<float> importance_;  // per position, of the last step
  std::vector<int32_t> committed_;  // by the last step
};

}  // namespace

std::unique_ptr<CachePolicy> make_d2_cache(const GenerationConfig& config, const ModelSpec& spec) {
  return std::make_unique<D2CachePolicy>(config.d2, spec);
}

}  // namespace dllm
