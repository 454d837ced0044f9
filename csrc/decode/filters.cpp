#include "decode/filters.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>

#include "runtime/buffer.h"
#include "runtime/order.h"

namespace dllm {

namespace {

constexpr float kFiltered = -std::numeric_limits<float>::infinity();

void keep_nucleus(float* logits, int64_t vocab, double top_p) {
  thread_local Buffer scratch;
  scratch.reserve(checked_bytes("the nucleus", size_t(vocab), sizeof(int32_t)), "the nucleus");
  int32_t* const all = scratch.as<int32_t>();
  std::iota(all, all + vocab, 0);
  const std::span ids(all, std::remove_if(all, all + vocab, [&](int32_t i) { return logits[i] == kFiltered; }));
  if (ids.empty()) return;
  std::sort(ids.begin(), ids.end(), by_falling([&](int32_t i) { return logits[i]; }));
  const double best = logits[ids[0]];
  double total = 0;
  for (int32_t i : ids) total += std::exp(logits[i] - best);
  double before = 0;  // probability of the ids ranked above
  for (int32_t i : ids) {
    const double p = std::exp(logits[i] - best) / total;
    if (before > top_p) logits[i] = kFiltered;
    before += p;
  }
}

void keep_top_k(float* logits, int64_t vocab, int64_t k) {
  if (k >= vocab) return;
  thread_local Buffer scratch;
  scratch.reserve(checked_bytes("the best ids", size_t(vocab), sizeof(float)), "the best ids");
  float* const sorted = scratch.as<float>();
  std::copy_n(logits, vocab, sorted);
  std::nth_element(sorted, sorted + (k - 1), sorted + vocab, std::greater<float>());
  const float kth = sorted[k - 1];
  for (int64_t i = 0; i < vocab; ++i)
    if (logits[i] < kth) logits[i] = kFiltered;
}

}  // namespace

void apply_guidance(float* cond, const float* uncond, int64_t vocab, float scale) {
  for (int64_t i = 0; i < vocab; ++i) cond[i] = uncond[i] + (scale + 1.0f) * (cond[i] - uncond[i]);
}

void apply_kept_guidance(float* cond, const float* difference, int64_t vocab, float scale) {
  for (int64_t i = 0; i < vocab; ++i) cond[i] += scale * difference[i];
}

void filter_row(float* logits, int64_t vocab, const GenerationConfig& c, const ops::RowStatsParams& params) {
  if (params.banned_id >= 0) logits[params.banned_id] = kFiltered;
  if (params.temperature != 1.0f)
    for (int64_t i = 0; i < vocab; ++i) logits[i] /= params.temperature;
  // A NaN would break the orderings below; the statistics pass reports it.
  for (int64_t i = 0; i < vocab; ++i)
    if (std::isnan(logits[i])) return;
  int64_t best = -1;
  for (int64_t i = 0; i < vocab; ++i)
    if (i != params.mask_id && (best < 0 || logits[i] > logits[best])) best = i;
  const float best_logit = logits[best];
  if (c.top_p) keep_nucleus(logits, vocab, *c.top_p);
  if (c.top_k) keep_top_k(logits, vocab, *c.top_k);
  logits[best] = best_logit;
}

}  // namespace dllm
