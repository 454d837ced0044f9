// Fast-dLLM's two caches (Wu et al. 2025, arXiv 2505.22618, github.com/NVlabs/Fast-dLLM), refreshed by a full pass at the
// first step of each block, a pass that also decodes.
//
// Dream (shift 1): the released code shifts logits inside the recomputed window and so loses the window's first one. Here
// the window itself is shifted, as the row that predicts token i is i - 1.

#include <algorithm>

#include "cache/policy.h"

namespace dllm {

namespace {

// Keeps K and V left of the block; computes the block and everything right of it.
class PrefixCache final : public CachePolicy {
 public:
  PrefixCache(int shift, bool leaves_last_row) : shift_(shift), leaves_last_row_(leaves_last_row) {}

  void plan(const SequenceView& view, int, StepPlan& out) override {
    const BlockView& block = view.block;
    if (block.step == 0) return plan_everything(view.length(), out);
    out.rows.clear();
    for (int32_t p : block.positions) {
      if (p >= block.suffix_begin) break;
      for (int32_t row = p - shift_; row <= p; ++row)
        if (out.rows.empty() || out.rows.back() < row) out.rows.push_back(row);
    }
    const int32_t begin = std::max(block.suffix_begin - shift_, out.rows.empty() ? 0 : out.rows.back() + 1);
    const int32_t end = view.length() - (leaves_last_row_ ? shift_ : 0);
    for (int32_t p = begin; p < end; ++p) out.rows.push_back(p);
  }

 private:
  int shift_;
  bool leaves_last_row_;  // the released d2Cache harness shifts the whole window, and so leaves the last row stale
};

// Keeps K and V of everything; computes the block only, whose K and V are overwritten in place.
class DualCache final : public CachePolicy {
 public:
  explicit DualCache(int shift) : shift_(shift) {}

  void plan(const SequenceView& view, int, StepPlan& out) override {
    if (view.block.step == 0) return plan_everything(view.length(), out);
    out.rows.clear();
    for (int32_t p : view.block.positions) out.rows.push_back(p - shift_);
  }

 private:
  int shift_;
};

}  // namespace

std::unique_ptr<CachePolicy> make_prefix_cache(const GenerationConfig& config, const ModelSpec& spec) {
  return std::make_unique<PrefixCache>(spec.logit_shift, config.reference_quirks);
}

std::unique_ptr<CachePolicy> make_dual_cache(const ModelSpec& spec) {
  return std::make_unique<DualCache>(spec.logit_shift);
}

}  // namespace dllm
