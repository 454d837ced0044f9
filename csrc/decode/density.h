// Certainty density (d2Cache, arXiv 2509.23094, eq. 3; normalised and padded as in github.com/Kamichanw/d2Cache): how much of
// a position's neighbourhood is decided already.
//
// For the L positions from the lowest editable one on, with phi(d) = exp(-d^2 / (2 sigma^2)), sigma > 0,
//   D(i) = sum_{j = -L}^{2L - 1} phi(i - j) known*(j)  /  sum_{d = -3L}^{3L - 1} phi(d)
// known* is true left of the positions, inside where nothing is masked, and right of them if the last one is known.
// Rounded to 40 bits, so that positions that lie alike have the same density.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "runtime/bitmap.h"
#include "runtime/host_device.h"

namespace dllm {

// Positions that lie alike, left and right in a gap, get sums that differ in their last bits only: they are to tie.
DLLM_HD inline double keep_40_bits(double x) {
  int exponent = 0;
  const double mantissa = frexp(x, &exponent);
  return ldexp(nearbyint(ldexp(mantissa, 40)), exponent - 40);
}

class CertaintyDensity {
 public:
  CertaintyDensity(const Bitmap& editable, double sigma);

  // phi(d) for d = 0 .. 3L, and phi(d) + phi(d + 1) + ... for d = 0 .. 3L + 1.
  std::span<const double> phi() const { return phi_; }
  std::span<const double> tail() const { return tail_; }

  // Per position of the canvas, 0 left of the lowest editable one; valid until the next call.
  std::span<const double> of(const Bitmap& masked);

 private:
  double between(int64_t first, int64_t last) const;  // phi(first) + ... + phi(last)

  int64_t first_ = 0;  // the lowest editable position
  std::vector<double> phi_, tail_;  // phi(d), and phi(d) + phi(d + 1) + ...
  std::vector<double> density_;
};

}  // namespace dllm
