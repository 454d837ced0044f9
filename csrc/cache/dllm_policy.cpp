// dLLM-Cache (Liu et al. 2025, arXiv 2506.06295, github.com/maomaocun/dLLM-cache). Per layer it keeps K, V and the outputs of
// attention and MLP. The prompt is refreshed every kp steps, the response every kr steps; in between the share `rou` of the
// response whose V changed most. Steps are counted over the whole generation, not per block. `always_refresh_layers` (the
// released code: layer 0) refresh everything at every step.
//
// What no later step can read is not computed, which changes no token:
// - prompt rows where no layer after the first refreshes the prompt: layer 0 would give them the same K and V again, as their
//   tokens do not change, and nothing reads their residual stream (but for rows whose logits are read);
// - the last layer's outputs for positions that are no longer masked.

#include <algorithm>

#include "cache/policy.h"

namespace dllm {

namespace {

class DLLMCachePolicy final : public CachePolicy {
 public:
  DLLMCachePolicy(const DLLMCacheConfig& config, const ModelSpec& spec) : config_(config), shift_(spec.logit_shift) {
    always_.assign(size_t(spec.n_layers), false);
    for (int64_t layer : config.always_refresh_layers) always_[size_t(layer)] = true;
  }

  void plan(const SequenceView& view, int stream, StepPlan& out) override {
    const int64_t t = evaluations_[stream]++;  // each stream counts its own: guidance may skip the second
    const bool prompt = t % config_.kp == 0, response = t % config_.kr == 0;
    FeatureStep& f = out.features;
    f.layers.clear();
    bool prompt_after_first = false;
    for (size_t l = 0; l < always_.size(); ++l) {
      f.layers.push_back({prompt || always_[l], response || always_[l]});
      prompt_after_first |= l > 0 && f.layers[l].prompt;
    }
    f.n_verify = config_.rou > 0 ? int64_t(config_.rou * double(view.editable.count())) : -1;

    // Rows whose hidden state may be read, now or later.
    read_.clear(view.length());
    view.masked.for_each([&](int64_t i) { read_.set(i - shift_); });
    out.rows.clear();
    f.prompt_rows.clear();
    f.response_rows.clear();
    f.last_rows.clear();
    for (int32_t p = 0; p < view.length(); ++p) {
      const bool editable = view.editable.test(p);
      if (!editable && t > 0 && !prompt_after_first && !read_.test(p)) continue;
      const int32_t row = int32_t(out.rows.size());
      out.rows.push_back(p);
      (editable ? f.response_rows : f.prompt_rows).push_back(row);
      if (read_.test(p)) f.last_rows.push_back(row);
    }
  }

 private:
  DLLMCacheConfig config_;
  int shift_;
  std::vector<bool> always_;  // per layer
  int64_t evaluations_[2] = {0, 0};
  Bitmap read_;  // see plan()
};

}  // namespace

std::unique_ptr<CachePolicy> make_dllm_cache(const GenerationConfig& config, const ModelSpec& spec) {
  return std::make_unique<DLLMCachePolicy>(config.dllm, spec);
}

}  // namespace dllm
