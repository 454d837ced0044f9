#include "cache/d2_rows.h"

#include <algorithm>
#include <vector>

namespace dllm {

void add_nucleus(std::span<const float> importance, double p, Bitmap& rows) {
  std::vector<int32_t> order;
  double total = 0;
  for (int32_t i = 0; i < int32_t(importance.size()); ++i)
    if (!rows.test(i)) {
      order.push_back(i);
      total += importance[size_t(i)];
    }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return importance[size_t(a)] > importance[size_t(b)]; });
  double cumulated = 0;
  for (size_t k = 0; k < order.size(); ++k) {
    cumulated += double(importance[size_t(order[k])]) / total;
    if (k > 0 && p < 1 && cumulated > p) break;
    rows.set(order[k]);
  }
}

void inflate(int64_t width, Bitmap& rows) {
  if (width == 0) return;
  const std::vector<int32_t> members = rows.members();
  for (size_t k = 1; k < members.size(); ++k)
    if (members[k] - members[k - 1] <= width)
      for (int32_t p = members[k - 1] + 1; p < members[k]; ++p) rows.set(p);
}

}  // namespace dllm
