#include "cache/policy.h"

#include <numeric>

namespace dllm {

void CachePolicy::observe(const SequenceView&, const StepOutcome&) {}
void CachePolicy::plan_together(std::span<CachePolicy* const>, std::span<StepPlan* const>) {}
void CachePolicy::observe_together(std::span<CachePolicy* const>) {}

std::unique_ptr<CachePolicy> make_cache_policy(const GenerationConfig& config, const ModelSpec& spec) {
  switch (config.cache) {
    case CacheKind::None:
      return make_no_cache();
    case CacheKind::Prefix:
      return make_prefix_cache(config, spec);
    case CacheKind::Dual:
      return make_dual_cache(spec);
    case CacheKind::DLLM:
      return make_dllm_cache(config, spec);
    case CacheKind::D2:
      return config.reference_quirks ? make_released_d2_cache(config, spec) : make_d2_cache(config, spec);
  }
  return nullptr;
}

void plan_everything(int32_t length, StepPlan& out) {
  out.rows.resize(size_t(length));
  std::iota(out.rows.begin(), out.rows.end(), 0);
}

namespace {
class NoCache final : public CachePolicy {
 public:
  void plan(const SequenceView& view, int, StepPlan& out) override { plan_everything(view.length(), out); }
};
}  // namespace

std::unique_ptr<CachePolicy> make_no_cache() { return std::make_unique<NoCache>(); }

}  // namespace dllm
