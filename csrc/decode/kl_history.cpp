#include "decode/kl_history.h"

#include <algorithm>
#include <cmath>

namespace dllm {

KlHistory::KlHistory(int64_t positions, int64_t length, bool missing_counts)
    : length_(length), missing_counts_(missing_counts), tracks_(size_t(positions)) {}

void KlHistory::update(int32_t position, const float* logits, int64_t vocab, double log_sum_exp) {
  constexpr double kEps = 1e-12;
  Track& t = tracks_[size_t(position)];
  const bool first = t.logits.empty();
  double divergence = 0;
  for (int64_t v = 0; v < vocab; ++v) {
    const double p = std::exp(double(logits[v]) - log_sum_exp);
    if (p == 0) continue;
    const double q = first ? 0.0 : std::exp(double(t.logits[size_t(v)]) - t.log_sum_exp);
    divergence += p * std::log((p + kEps) / (q + kEps));
  }
  t.logits.assign(logits, logits + vocab);
  t.log_sum_exp = log_sum_exp;
  t.divergences.reserve(size_t(length_));
  if (int64_t(t.divergences.size()) == length_) t.divergences.erase(t.divergences.begin());
  t.divergences.push_back(divergence);
}

bool KlHistory::stable(int32_t position, double threshold) const {
  const std::vector<double>& d = tracks_[size_t(position)].divergences;
  if (int64_t(d.size()) < length_ && !missing_counts_) return false;
  return std::all_of(d.begin(), d.end(), [&](double kl) { return kl < threshold; });
}

}  // namespace dllm
