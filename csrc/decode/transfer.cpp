#include "decode/transfer.h"

#include <algorithm>
#include <numeric>

#include "runtime/error.h"
#include "runtime/order.h"

namespace dllm {

Rules rules_of(const GenerationConfig& c, const ModelSpec& spec) {
  Rules r{};
  r.remasking = c.remasking;
  r.schedule = c.schedule;
  r.rule = c.rule();
  r.seed = c.seed;
  r.eps = c.eps;
  r.threshold = c.effective_threshold();
  r.factor = c.factor.value_or(0);
  r.gamma = c.gamma.value_or(0);
  r.alg_temp = c.alg_temp.value_or(0);
  r.steps_per_block = c.steps ? c.steps_per_block() : 0;
  r.min_transfer = c.min_transfer();
  r.num_transfer_tokens = c.num_transfer_tokens.value_or(0);
  r.kl_filter = c.kl_threshold.has_value();
  r.autoregressive = c.autoregressive;
  r.confidence_eos_eot_inf = c.confidence_eos_eot_inf;
  r.reference_quirks = c.reference_quirks;
  r.stop_at_eos = c.stop_at_eos;
  r.transforms_score = c.has_score_transform();
  r.clip_alpha = c.clip_alpha;
  r.position_decay = c.position_decay;
  r.token_frequencies = c.token_frequencies.empty() ? nullptr : c.token_frequencies.data();
  if (spec.stop_ids.size() > Rules::kMaxStopIds)
    fail<ConfigError>("the model has ", spec.stop_ids.size(), " stop ids; up to ", Rules::kMaxStopIds,
                      " are supported");
  r.n_stop_ids = int32_t(spec.stop_ids.size());
  std::copy(spec.stop_ids.begin(), spec.stop_ids.end(), r.stop_ids);
  return r;
}

ops::RowStatsParams stats_params(const GenerationConfig& c, const ModelSpec& spec) {
  ops::RowStatsParams p;
  p.mask_id = spec.mask_id;
  p.banned_id = c.logits_eos_inf ? spec.eos_id : -1;
  if (c.temperature > 0) {
    // LLaDA: argmax of exp(l) / (-ln u)^T is argmax of l + T g. Dream: a draw from softmax(l / T).
    if (c.schedule == Schedule::Dream) p.temperature = float(c.temperature);
    p.noise_scale = c.schedule == Schedule::Dream ? 1.0 : c.temperature;
  }
  return p;
}

std::span<const int32_t> TransferSelector::select(const Rules& r, const StepPosition& at,
                                                  std::span<const Proposal> proposals) {
  const size_t n = proposals.size();
  key_.resize(n);
  const auto order = [&](std::vector<int32_t>& list, auto&& key) {
    for (size_t i = 0; i < n; ++i) key_[i] = key(proposals[i]);
    list.resize(n);
    std::iota(list.begin(), list.end(), 0);
    std::sort(list.begin(), list.end(), by_falling([&](int32_t i) { return key_[size_t(i)]; }));
  };
  order(by_key_, [&](const Proposal& p) { return rules::order_key(r, at, p); });
  if (r.rule == TransferRule::Factor) order(by_compared_, [&](const Proposal& p) { return rules::compared(r, p); });
  chosen_.resize(n);
  rules::Choice choice{chosen_.data()};
  rules::choose(r, at, proposals.data(), int32_t(n), by_key_.data(), by_compared_.data(), choice);
  chosen_.resize(size_t(choice.count));
  std::sort(chosen_.begin(), chosen_.end());
  return chosen_;
}

}  // namespace dllm
