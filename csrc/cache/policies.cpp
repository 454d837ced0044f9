// No cache, and Fast-dLLM's two (Wu et al. 2025, arXiv 2505.22618, github.com/NVlabs/Fast-dLLM), whose caches are
// refreshed by a full pass at the first step of each block, a pass that also decodes.
//
// Dream (shift 1): the released code shifts logits inside the recomputed window and so loses the window's first one. Here
// the window itself is shifted, as the row that predicts token i is i - 1.

#include <algorithm>
#include <numeric>

#include "cache/policy.h"

namespace dllm {

namespace {

void plan_everything(int32_t length, StepPlan& out) {
  out.rows.resize(size_t(length));
  std::iota(out.rows.begin(), out.rows.end(), 0);
}

class NoCache final : public CachePolicy {
 public:
  void plan(int32_t length, const BlockView&, int, StepPlan& out) const override { plan_everything(length, out); }
};

// Keeps K and V left of the block; computes the block and everything right of it.
class PrefixCache final : public CachePolicy {
 public:
  void plan(int32_t length, const BlockView& block, int shift, StepPlan& out) const override {
    if (block.step == 0) return plan_everything(length, out);
    out.rows.clear();
    for (int32_t p : block.positions) {
      if (p >= block.suffix_begin) break;
      for (int32_t row = p - shift; row <= p; ++row)
        if (out.rows.empty() || out.rows.back() < row) out.rows.push_back(row);
    }
    const int32_t begin = std::max(block.suffix_begin - shift, out.rows.empty() ? 0 : out.rows.back() + 1);
    for (int32_t p = begin; p < length; ++p) out.rows.push_back(p);
  }
};

// Keeps K and V of everything; computes the block only, whose K and V are overwritten in place.
class DualCache final : public CachePolicy {
 public:
  void plan(int32_t length, const BlockView& block, int shift, StepPlan& out) const override {
    if (block.step == 0) return plan_everything(length, out);
    out.rows.clear();
    for (int32_t p : block.positions) out.rows.push_back(p - shift);
  }
};

}  // namespace

std::unique_ptr<CachePolicy> make_cache_policy(CacheKind kind) {
  switch (kind) {
    case CacheKind::None:
      return std::make_unique<NoCache>();
    case CacheKind::Prefix:
      return std::make_unique<PrefixCache>();
    case CacheKind::Dual:
      return std::make_unique<DualCache>();
  }
  return nullptr;
}

}  // namespace dllm
