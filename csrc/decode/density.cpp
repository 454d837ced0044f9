#include "decode/density.h"

#include <cmath>

namespace dllm {

CertaintyDensity::CertaintyDensity(const Bitmap& editable, double sigma) : density_(size_t(editable.size()), 0.0) {
  while (first_ < editable.size() && !editable.test(first_)) ++first_;
  const int64_t n = editable.size() - first_;
  phi_.resize(size_t(3 * n + 1));
  tail_.resize(size_t(3 * n + 2));
  for (int64_t d = 0; d <= 3 * n; ++d) {
    const double x = double(d) / sigma;  // may overflow to infinity, which is right
    phi_[size_t(d)] = std::exp(-0.5 * x * x);
  }
  // Summed from the small end, so that far positions keep their order.
  for (int64_t d = 3 * n; d >= 0; --d) tail_[size_t(d)] = tail_[size_t(d + 1)] + phi_[size_t(d)];
}

double CertaintyDensity::between(int64_t first, int64_t last) const {
  return tail_[size_t(first)] - tail_[size_t(last + 1)];
}

std::span<const double> CertaintyDensity::of(const Bitmap& masked) {
  const int64_t n = masked.size() - first_;
  if (n == 0) return density_;
  double* density = density_.data() + first_;
  const auto known = [&](int64_t i) { return !masked.test(first_ + i); };
  const bool last_known = known(n - 1);
  for (int64_t i = 0; i < n; ++i) {
    density[i] = between(i + 1, i + n);
    if (last_known) density[i] += between(n - i, 2 * n - 1 - i);
  }
  for (int64_t j = 0; j < n; ++j) {
    if (!known(j)) continue;
    for (int64_t i = 0; i < j; ++i) density[i] += phi_[size_t(j - i)];
    for (int64_t i = j; i < n; ++i) density[i] += phi_[size_t(i - j)];
  }
  const double all = between(1, 3 * n) + between(0, 3 * n - 1);
  for (int64_t i = 0; i < n; ++i) density[i] = keep_40_bits(density[i] / all);
  return density_;
}

}  // namespace dllm
