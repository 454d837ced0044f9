#include "decode/transfer.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "decode/schedule.h"
#include "runtime/order.h"

namespace dllm {

namespace {

double selection_uniform(const GenerationConfig& c, uint32_t step, int32_t position) {
  return philox_uniform({c.seed, step, uint32_t(position)}, 0, NoiseStream::Selection);
}

// What positions are ordered by: the score. Drawing n positions without replacement by softmax(score / alg_temp) is taking
// the n largest of score / alg_temp + Gumbel noise (Efraimidis and Spirakis 2006; Kool et al. 2019).
double order_key(const GenerationConfig& c, const StepPosition& at, const Proposal& p) {
  return c.alg_temp ? p.score / *c.alg_temp + gumbel(selection_uniform(c, at.step, p.position)) : p.score;
}

int64_t count_by_steps(const GenerationConfig& c, const StepPosition& at) {
  const int64_t steps = c.steps_per_block();
  if (at.step_in_block >= steps) return at.eligible;
  return c.schedule == Schedule::LLaDA ? llada_transfer_count(at.masked_at_start, steps, at.step_in_block)
                                       : dream_transfer_count(at.eligible, c.eps, steps, at.step_in_block);
}

// What threshold and factor compare: the confidence. The released d2Cache harness compares the score.
double compared(const GenerationConfig& c, const Proposal& p) { return c.reference_quirks ? p.score : p.confidence; }

void choose_by_threshold(const GenerationConfig& c, std::span<const Proposal> proposals, std::vector<int32_t>& chosen) {
  for (size_t i = 0; i < proposals.size(); ++i)
    if (proposals[i].stable && compared(c, proposals[i]) >= c.effective_threshold()) chosen.push_back(int32_t(i));
}

// Fast-dLLM (arXiv 2505.22618, Theorem 1 and section 3.3): the largest n such that (k + 1)(1 - c_k) < f for every k <= n.
// The released code of Fast-dLLM commits one more where the last candidate fails; this is the stated rule. The harness of
// d2Cache commits one less where none fails.
void choose_by_factor(const GenerationConfig& c, std::span<const Proposal> proposals, std::vector<int32_t>& chosen) {
  const auto value = [&](int32_t i) { return compared(c, proposals[size_t(i)]); };
  for (size_t i = 0; i < proposals.size(); ++i)
    if (proposals[i].stable) chosen.push_back(int32_t(i));
  std::sort(chosen.begin(), chosen.end(), by_falling(value));
  size_t n = 0;
  while (n < chosen.size() && double(n + 2) * (1.0 - value(chosen[n])) < *c.factor) ++n;
  if (c.reference_quirks && n == chosen.size() && n > 0) --n;
  chosen.resize(n);
}

// EB-sampler (arXiv 2505.24857): the longest prefix in order of score with sum H - max H <= gamma. The released d2Cache
// harness takes the maximum over the batch instead, which for one sequence is the newest entropy.
void choose_by_entropy_bound(const GenerationConfig& c, std::span<const Proposal> proposals,
                             std::span<const int32_t> order, std::vector<int32_t>& chosen) {
  double sum = 0, highest = 0;
  for (int32_t i : order) {
    const double h = proposals[size_t(i)].entropy;
    sum += h;
    highest = c.reference_quirks ? h : std::max(highest, h);
    if (sum - highest > *c.gamma) break;
    chosen.push_back(i);
  }
}

// Left to right: a prefix of the run of neighbours that begins at the first masked position.
void choose_leading(const GenerationConfig& c, const StepPosition& at, std::span<const Proposal> proposals,
                    std::vector<int32_t>& chosen) {
  int64_t run = std::min<int64_t>(1, int64_t(proposals.size()));
  while (run < int64_t(proposals.size()) && proposals[size_t(run)].position == proposals[size_t(run - 1)].position + 1)
    ++run;
  int64_t n = 0;
  if (c.rule() == TransferRule::Steps)
    n = count_by_steps(c, at);
  else if (c.rule() == TransferRule::Threshold)
    while (n < run && proposals[size_t(n)].confidence >= c.effective_threshold()) ++n;
  else if (c.reference_quirks)
    n = run;
  const int64_t least = c.rule() == TransferRule::Steps && !c.num_transfer_tokens ? 0 : c.min_transfer();
  chosen.resize(size_t(std::min(std::max(n, least), run)));
  std::iota(chosen.begin(), chosen.end(), 0);
}

void choose_each_by_itself(const GenerationConfig& c, const StepPosition& at, std::span<const Proposal> proposals,
                           std::vector<int32_t>& chosen) {
  const int64_t steps = c.steps_per_block();
  const double p = at.step_in_block >= steps ? 1.0 : dream_transfer_probability(c.eps, steps, at.step_in_block);
  for (size_t i = 0; i < proposals.size(); ++i)
    if (p >= 1.0 || selection_uniform(c, at.step, proposals[i].position) < p) chosen.push_back(int32_t(i));
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

double certainty(const GenerationConfig& c, double confidence) {
  return c.remasking == Remasking::Entropy && !c.reference_quirks ? std::exp(confidence) : confidence;
}

Proposal propose(const GenerationConfig& c, const ModelSpec& spec, int32_t position, uint32_t step,
                 const ops::RowStats& s, const ScoreContext& context) {
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

  // PC-Sampler (arXiv 2508.13021): rare tokens count for more.
  const auto debiased = [&](double x) {
    return std::min(-x * std::log(c.token_frequencies[size_t(s.sampled_id)] + 1e-10), c.clip_alpha);
  };
  const bool debias = !c.token_frequencies.empty();
  if (debias && c.reference_quirks) confidence = debiased(confidence);
  double score = confidence;
  if (c.has_score_transform()) {
    score = certainty(c, confidence);
    if (debias && !c.reference_quirks) score = debiased(score);
    score *= context.density * std::exp(-c.position_decay * context.from_block_start);
  }
  return {position, s.sampled_id, confidence, score, s.entropy};
}

std::span<const int32_t> TransferSelector::select(const GenerationConfig& c, const StepPosition& at,
                                                  std::span<const Proposal> proposals) {
  const size_t n = proposals.size();
  chosen_.clear();
  chosen_.reserve(n);
  if (c.remasking == Remasking::Origin) {
    choose_each_by_itself(c, at, proposals, chosen_);
    return chosen_;
  }
  if (c.autoregressive) {
    choose_leading(c, at, proposals, chosen_);
    return chosen_;
  }

  key_.resize(n);
  for (size_t i = 0; i < n; ++i) key_[i] = order_key(c, at, proposals[i]);
  order_.resize(n);
  std::iota(order_.begin(), order_.end(), 0);
  std::sort(order_.begin(), order_.end(), by_falling([&](int32_t i) { return key_[size_t(i)]; }));

  int64_t least = c.min_transfer();
  switch (c.rule()) {
    case TransferRule::Steps:
      least = std::max(count_by_steps(c, at), c.num_transfer_tokens.value_or(0));
      break;
    case TransferRule::Threshold:
      choose_by_threshold(c, proposals, chosen_);
      break;
    case TransferRule::Factor:
      choose_by_factor(c, proposals, chosen_);
      break;
    case TransferRule::Gamma:
      choose_by_entropy_bound(c, proposals, order_, chosen_);
      break;
    case TransferRule::Count:
      break;
  }
  // KLASS falls back only where its filter leaves nothing; the other rules promise `least`.
  const bool enough = c.kl_threshold ? !chosen_.empty() : int64_t(chosen_.size()) >= least;
  if (!enough) chosen_.assign(order_.begin(), order_.begin() + std::min(least, int64_t(n)));
  std::sort(chosen_.begin(), chosen_.end());
  return chosen_;
}

}  // namespace dllm
