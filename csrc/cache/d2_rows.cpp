#include "cache/d2_rows.h"

#include <algorithm>

#include "runtime/order.h"

namespace dllm {

void add_nucleus(std::span<const float> importance, double p, Bitmap& rows, std::vector<int32_t>& scratch) {
  std::vector<int32_t>& rest = scratch;
  rest.clear();
  rest.reserve(importance.size());
  double total = 0;
  for (int32_t i = 0; i < int32_t(importance.size()); ++i)
    if (!rows.test(i)) {
      rest.push_back(i);
      total += importance[size_t(i)];
    }
  // A heap, as few of them are wanted. Its top is what `first` puts last.
  const auto first = by_falling([&](int32_t i) { return importance[size_t(i)]; });
  const auto later = [&](int32_t a, int32_t b) { return first(b, a); };
  std::make_heap(rest.begin(), rest.end(), later);
  double cumulated = 0;
  for (bool none = true; !rest.empty(); none = false) {
    const int32_t best = rest.front();
    cumulated += double(importance[size_t(best)]) / total;
    if (!none && p < 1 && cumulated > p) break;
    rows.set(best);
    std::pop_heap(rest.begin(), rest.end(), later);
    rest.pop_back();
  }
}

void inflate(int64_t width, Bitmap& rows) {
  if (width == 0) return;
  int64_t before = -1;  // the member left of the one at hand
  rows.for_each([&](int64_t member) {
    if (before >= 0 && member - before <= width)
      for (int64_t p = before + 1; p < member; ++p) rows.set(p);
    before = member;
  });
}

}  // namespace dllm
