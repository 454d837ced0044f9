// The decoding rules for one step of one sequence: what a masked position proposes, what it counts for, and which proposals
// are committed. The CPU (transfer.cpp) and the loop on the device (decode/cuda/commit.cu) run these same functions; they
// differ in how they put the proposals into order.
#pragma once

#include <cmath>
#include <cstdint>

#include "decode/config.h"
#include "decode/schedule.h"
#include "model/spec.h"
#include "ops/philox.h"
#include "ops/row_stats.h"
#include "runtime/host_device.h"

namespace dllm {

// What a GenerationConfig says of decoding, as plain data.
struct Rules {
  static constexpr int kMaxStopIds = 8;

  Remasking remasking;
  Schedule schedule;
  TransferRule rule;
  uint64_t seed;
  double eps, threshold, factor, gamma;
  double alg_temp;  // 0: off
  int64_t steps_per_block;  // TransferRule::Steps
  int64_t min_transfer;  // 1 where none is given
  int64_t num_transfer_tokens;  // 0: not given
  bool kl_filter, autoregressive, confidence_eos_eot_inf, reference_quirks, stop_at_eos, transforms_score;
  double clip_alpha, position_decay;
  const double* token_frequencies;  // [vocab] or null
  int32_t n_stop_ids;
  int32_t stop_ids[kMaxStopIds];  // EOS first

  DLLM_HD bool stops(int32_t token) const {
    for (int32_t i = 0; i < n_stop_ids; ++i)
      if (stop_ids[i] == token) return true;
    return false;
  }
};
Rules rules_of(const GenerationConfig& config, const ModelSpec& spec);

// What the model proposes for one masked position.
struct Proposal {
  int32_t position;
  int32_t token;
  double confidence;  // by `remasking`: what threshold and factor look at
  double score;  // what positions are ordered by: the confidence, unless a score transform is in force
  double entropy = 0;  // of the position's distribution, in nats (gamma)
  bool stable = true;  // KLASS lets threshold and factor choose it
};

// Where in its block a sequence is.
struct StepPosition {
  uint32_t step = 0;  // forward index of the sequence, over the whole generation: keys the noise
  int64_t step_in_block = 0;  // from 0
  int64_t masked_at_start = 0;  // positions that were masked when the block began
  int64_t eligible = 0;  // positions that may still be committed in this block, computed by this step or not
};

// What a score transform knows of a position.
struct ScoreContext {
  double density = 1;  // certainty density, 1 where no prior is in force
  int32_t from_block_start = 0;
};

namespace rules {

DLLM_HD inline double selection_uniform(const Rules& r, uint32_t step, int32_t position) {
  return philox_uniform({r.seed, step, uint32_t(position)}, 0, NoiseStream::Selection);
}

// The confidence as a number that orders positions and may be multiplied: exp(-H) for negative entropies (as they are, with
// reference_quirks).
DLLM_HD inline double certainty(const Rules& r, double confidence) {
  return r.remasking == Remasking::Entropy && !r.reference_quirks ? exp(confidence) : confidence;
}

// x0, its confidence and its score from a row's statistics.
DLLM_HD inline Proposal propose(const Rules& r, int32_t position, uint32_t step, const ops::RowStats& s,
                                const ScoreContext& context) {
  const auto probability = [&](float logit) { return exp(double(logit) - s.log_sum_exp); };
  double confidence = 0;
  switch (r.remasking) {
    case Remasking::LowConfidence:
    case Remasking::Origin:  // reported, and not looked at
      confidence = probability(s.sampled_logit);
      break;
    case Remasking::TopkMargin:
      confidence = probability(s.top1_logit) - (s.top2_id >= 0 ? probability(s.top2_logit) : 0.0);
      break;
    case Remasking::Entropy:
      confidence = -s.entropy;
      break;
    case Remasking::Random:
      confidence = selection_uniform(r, step, position);
      break;
  }
  if (r.confidence_eos_eot_inf && r.stops(s.sampled_id)) confidence = 0;

  // PC-Sampler (arXiv 2508.13021): rare tokens count for more.
  const auto debiased = [&](double x) {
    const double y = -x * log(r.token_frequencies[s.sampled_id] + 1e-10);
    return y < r.clip_alpha ? y : r.clip_alpha;
  };
  if (r.token_frequencies && r.reference_quirks) confidence = debiased(confidence);
  double score = confidence;
  if (r.transforms_score) {
    score = certainty(r, confidence);
    if (r.token_frequencies && !r.reference_quirks) score = debiased(score);
    score *= context.density * exp(-r.position_decay * context.from_block_start);
  }
  return {position, s.sampled_id, confidence, score, s.entropy};
}

// What positions are ordered by: the score. Drawing n positions without replacement by softmax(score / alg_temp) is taking
// the n largest of score / alg_temp + Gumbel noise (Efraimidis and Spirakis 2006; Kool et al. 2019).
DLLM_HD inline double order_key(const Rules& r, const StepPosition& at, const Proposal& p) {
  return r.alg_temp > 0 ? p.score / r.alg_temp + gumbel(selection_uniform(r, at.step, p.position)) : p.score;
}

// What threshold and factor compare: the confidence. The released d2Cache harness compares the score.
DLLM_HD inline double compared(const Rules& r, const Proposal& p) {
  return r.reference_quirks ? p.score : p.confidence;
}

DLLM_HD inline int64_t count_by_steps(const Rules& r, const StepPosition& at) {
  if (at.step_in_block >= r.steps_per_block) return at.eligible;
  return r.schedule == Schedule::LLaDA ? llada_transfer_count(at.masked_at_start, r.steps_per_block, at.step_in_block)
                                       : dream_transfer_count(at.eligible, r.eps, r.steps_per_block, at.step_in_block);
}

// The chosen proposals, as indices, in no order; the caller's list has room for all.
struct Choice {
  int32_t* chosen;
  int32_t count = 0;
  DLLM_HD void add(int32_t i) { chosen[count++] = i; }
};

// Fast-dLLM (arXiv 2505.22618, Theorem 1 and section 3.3): the largest n such that (k + 1)(1 - c_k) < f for every k <= n.
// The released code of Fast-dLLM commits one more where the last candidate fails; this is the stated rule. The harness of
// d2Cache commits one less where none fails.
DLLM_HD inline void choose_by_factor(const Rules& r, const Proposal* proposals, int32_t n, const int32_t* by_compared,
                                     Choice& out) {
  bool failed = false;
  for (int32_t k = 0; k < n && !failed; ++k) {
    const Proposal& p = proposals[by_compared[k]];
    if (!p.stable) continue;
    failed = !(double(out.count + 2) * (1.0 - compared(r, p)) < r.factor);
    if (!failed) out.add(by_compared[k]);
  }
  if (r.reference_quirks && !failed && out.count > 0) --out.count;
}

// EB-sampler (arXiv 2505.24857): the longest prefix in order of score with sum H - max H <= gamma. The released d2Cache
// harness takes the maximum over the batch instead, which for one sequence is the newest entropy.
DLLM_HD inline void choose_by_entropy_bound(const Rules& r, const Proposal* proposals, int32_t n, const int32_t* by_key,
                                            Choice& out) {
  double sum = 0, highest = 0;
  for (int32_t k = 0; k < n; ++k) {
    const double h = proposals[by_key[k]].entropy;
    sum += h;
    highest = r.reference_quirks || h > highest ? h : highest;
    if (sum - highest > r.gamma) break;
    out.add(by_key[k]);
  }
}

// Left to right: a prefix of the run of neighbours that begins at the first masked position.
DLLM_HD inline void choose_leading(const Rules& r, const StepPosition& at, const Proposal* proposals, int32_t count,
                                   Choice& out) {
  int64_t run = count > 0 ? 1 : 0;
  while (run < count && proposals[run].position == proposals[run - 1].position + 1) ++run;
  int64_t n = 0;
  if (r.rule == TransferRule::Steps)
    n = count_by_steps(r, at);
  else if (r.rule == TransferRule::Threshold)
    while (n < run && proposals[n].confidence >= r.threshold) ++n;
  else if (r.reference_quirks)
    n = run;
  const int64_t least = r.rule == TransferRule::Steps && r.num_transfer_tokens == 0 ? 0 : r.min_transfer;
  n = n > least ? n : least;
  n = n < run ? n : run;
  for (int64_t i = 0; i < n; ++i) out.add(int32_t(i));
}

DLLM_HD inline void choose_each_by_itself(const Rules& r, const StepPosition& at, const Proposal* proposals, int32_t n,
                                          Choice& out) {
  const double p = at.step_in_block >= r.steps_per_block
                       ? 1.0
                       : dream_transfer_probability(r.eps, r.steps_per_block, at.step_in_block);
  for (int32_t i = 0; i < n; ++i)
    if (p >= 1.0 || selection_uniform(r, at.step, proposals[i].position) < p) out.add(i);
}

// Chooses among n proposals of ascending positions. by_key: their indices by falling order_key, by_compared by falling
// `compared` (read by TransferRule::Factor only); ties to the lowest. Never empty where a rule promises progress; may be
// empty under the Dream schedule, whose counts are truncated.
DLLM_HD inline void choose(const Rules& r, const StepPosition& at, const Proposal* proposals, int32_t n,
                           const int32_t* by_key, const int32_t* by_compared, Choice& out) {
  if (r.remasking == Remasking::Origin) return choose_each_by_itself(r, at, proposals, n, out);
  if (r.autoregressive) return choose_leading(r, at, proposals, n, out);
  int64_t least = r.min_transfer;
  switch (r.rule) {
    case TransferRule::Steps:
      least = count_by_steps(r, at);
      if (least < r.num_transfer_tokens) least = r.num_transfer_tokens;
      break;
    case TransferRule::Threshold:
      for (int32_t i = 0; i < n; ++i)
        if (proposals[i].stable && compared(r, proposals[i]) >= r.threshold) out.add(i);
      break;
    case TransferRule::Factor:
      choose_by_factor(r, proposals, n, by_compared, out);
      break;
    case TransferRule::Gamma:
      choose_by_entropy_bound(r, proposals, n, by_key, out);
      break;
    case TransferRule::Count:
      break;
  }
  // KLASS falls back only where its filter leaves nothing; the other rules promise `least`.
  if (r.kl_filter ? out.count > 0 : out.count >= least) return;
  out.count = 0;
  for (int32_t k = 0; k < n && k < least; ++k) out.add(by_key[k]);
}

}  // namespace rules
}  // namespace dllm
