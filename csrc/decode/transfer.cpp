#include "decode/transfer.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "decode/schedule.h"

namespace dllm {

namespace {

double selection_uniform(const GenerationConfig& c, uint32_t step, int32_t position) {
  return philox_uniform({c.seed, step, uint32_t(position)}, 0, NoiseStream::Selection);
}

// Proposals by falling score; equal scores by position.
std::vector<int32_t> order_by(std::span<const double> score) {
  std::vector<int32_t> order(score.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return score[a] > score[b]; });
  return order;
}

// Drawing n positions without replacement by softmax(confidence / alg_temp) is taking the n largest of
// confidence / alg_temp + Gumbel noise (Efraimidis and Spirakis 2006; Kool et al. 2019).
std::vector<double> scores_of(const GenerationConfig& c, const StepPosition& at, std::span<const Proposal> proposals) {
  std::vector<double> score;
  for (const Proposal& p : proposals)
    score.push_back(c.alg_temp ? p.confidence / *c.alg_temp + gumbel(selection_uniform(c, at.step, p.position))
                               : p.confidence);
  return score;
}

int64_t count_by_steps(const GenerationConfig& c, const StepPosition& at, int64_t eligible) {
  const int64_t steps = c.steps_per_block();
  if (at.step_in_block >= steps) return eligible;
  return c.schedule == Schedule::LLaDA ? llada_transfer_count(at.masked_at_start, steps, at.step_in_block)
                                       : dream_transfer_count(eligible, c.eps, steps, at.step_in_block);
}

// Fast-dLLM (arXiv 2505.22618, Theorem 1 and section 3.3): the largest n such that every k <= n is 1 or satisfies
// (k + 1)(1 - c_k) < f. The released code commits one more where the last candidate fails; this is the stated rule.
int64_t count_by_factor(double factor, std::span<const Proposal> p, std::span<const int32_t> order) {
  int64_t n = 1;
  while (n < int64_t(order.size()) && double(n + 2) * (1.0 - p[size_t(order[size_t(n)])].confidence) < factor) ++n;
  return n;
}

std::vector<int32_t> select_origin(const GenerationConfig& c, const StepPosition& at,
                                   std::span<const Proposal> proposals) {
  const int64_t steps = c.steps_per_block();
  const double p = at.step_in_block >= steps ? 1.0 : dream_transfer_probability(c.eps, steps, at.step_in_block);
  std::vector<int32_t> chosen;
  for (size_t i = 0; i < proposals.size(); ++i)
    if (p >= 1.0 || selection_uniform(c, at.step, proposals[i].position) < p) chosen.push_back(int32_t(i));
  return chosen;
}

}  // namespace

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

Proposal propose(const GenerationConfig& c, const ModelSpec& spec, int32_t position, uint32_t step,
                 const ops::RowStats& s) {
  auto probability = [&](float logit) { return std::exp(double(logit) - s.log_sum_exp); };
  double confidence = 0;
  switch (c.remasking) {
    case Remasking::LowConfidence:
      confidence = probability(s.sampled_logit);
      break;
    case Remasking::TopkMargin:
      confidence = probability(s.top1_logit) - (s.top2_id >= 0 ? probability(s.top2_logit) : 0.0);
      break;
    case Remasking::Entropy:
      confidence = -s.entropy;
      break;
    case Remasking::Random:
      confidence = selection_uniform(c, step, position);
      break;
    case Remasking::Origin:
      break;
  }
  const bool stops = std::find(spec.stop_ids.begin(), spec.stop_ids.end(), s.sampled_id) != spec.stop_ids.end();
  if (c.confidence_eos_eot_inf && stops) confidence = 0;
  return {position, s.sampled_id, confidence};
}

std::vector<int32_t> select_transfers(const GenerationConfig& c, const StepPosition& at,
                                      std::span<const Proposal> proposals) {
  if (c.remasking == Remasking::Origin) return select_origin(c, at, proposals);
  const std::vector<double> score = scores_of(c, at, proposals);
  std::vector<int32_t> order = order_by(score);
  const int64_t eligible = int64_t(order.size());

  int64_t n = 0;
  switch (c.rule()) {
    case TransferRule::Steps:
      n = count_by_steps(c, at, eligible);
      if (c.num_transfer_tokens) n = std::max(n, c.min_transfer());
      break;
    case TransferRule::Threshold:
      while (n < eligible && score[size_t(order[size_t(n)])] >= c.effective_threshold()) ++n;
      n = std::max(n, c.min_transfer());
      break;
    case TransferRule::Factor:
      n = std::max(count_by_factor(c.factor.value(), proposals, order), c.min_transfer());
      break;
    case TransferRule::Count:
      n = c.min_transfer();
      break;
  }
  order.resize(size_t(std::min(n, eligible)));
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace dllm
