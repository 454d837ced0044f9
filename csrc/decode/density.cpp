#include "decode/density.h"

#include <cmath>

namespace dllm {

namespace {
// Positions that lie alike, left and right in a gap, get sums that differ in their last bits only: they are to tie.
double keep_40_bits(double x) {
  int exponent = 0;
  const double mantissa = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 40)), exponent - 40);
}
}  // namespace

std::vector<double> certainty_density(std::span<const uint8_t> known, double sigma) {
  const int64_t n = int64_t(known.size());
  std::vector<double> phi(size_t(3 * n + 1)), tail(size_t(3 * n + 2));
  for (int64_t d = 0; d <= 3 * n; ++d) {
    const double x = double(d) / sigma;  // may overflow to infinity, which is right
    phi[size_t(d)] = std::exp(-0.5 * x * x);
  }
  // tail[d] = phi(d) + phi(d + 1) + ... , summed from the small end, so that far positions keep their order.
  for (int64_t d = 3 * n; d >= 0; --d) tail[size_t(d)] = tail[size_t(d + 1)] + phi[size_t(d)];
  const auto between = [&](int64_t first, int64_t last) { return tail[size_t(first)] - tail[size_t(last + 1)]; };

  const double all = n == 0 ? 1.0 : between(1, 3 * n) + between(0, 3 * n - 1);
  std::vector<double> density(size_t(n), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    density[size_t(i)] = between(i + 1, i + n);
    if (known[size_t(n - 1)]) density[size_t(i)] += between(n - i, 2 * n - 1 - i);
  }
  for (int64_t j = 0; j < n; ++j) {
    if (!known[size_t(j)]) continue;
    for (int64_t i = 0; i < j; ++i) density[size_t(i)] += phi[size_t(j - i)];
    for (int64_t i = j; i < n; ++i) density[size_t(i)] += phi[size_t(i - j)];
  }
  for (double& d : density) d = keep_40_bits(d / all);
  return density;
}

std::vector<double> certainty_density(const Bitmap& editable, const Bitmap& masked, double sigma) {
  int64_t first = 0;
  while (first < editable.size() && !editable.test(first)) ++first;
  std::vector<uint8_t> known;
  for (int64_t p = first; p < masked.size(); ++p) known.push_back(!masked.test(p));
  std::vector<double> density = certainty_density(known, sigma);
  density.insert(density.begin(), size_t(first), 0.0);
  return density;
}

}  // namespace dllm
