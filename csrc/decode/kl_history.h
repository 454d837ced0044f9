// KLASS (arXiv 2511.05664, github.com/shkim0116/KLASS): how far the distribution of a masked position moved each time it
// was computed. A position is stable once the last `length` of its divergences are all below a threshold.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/row_stats.h"

namespace dllm {

class KlHistory {
 public:
  // missing_counts: divergences that do not exist yet count as 0 (the released d2Cache harness), else as unstable.
  KlHistory(int64_t positions, int64_t length, bool missing_counts);

  // Adds KL(p || p') = sum p ln((p + eps) / (p' + eps)), eps = 1e-12, for the row's softmax p and the one kept from the
  // last update of this position (0 at first), and keeps p. logits [vocab] fp32, -inf for a filtered id. Updates of
  // different positions may run at the same time.
  void update(int32_t position, const float* logits, int64_t vocab, double log_sum_exp);

  bool stable(int32_t position, double threshold) const;
  void forget(int32_t position) { tracks_[size_t(position)] = {}; }

 private:
  struct Track {
    std::vector<float> logits;  // of the last update
    double log_sum_exp = 0;
    std::vector<double> divergences;  // newest last, at most length_
  };
  int64_t length_;
  bool missing_counts_;
  std::vector<Track> tracks_;
};

}  // namespace dllm
