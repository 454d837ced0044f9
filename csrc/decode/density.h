// Certainty density (d2Cache, arXiv 2509.23094, eq. 3; normalised and padded as in github.com/Kamichanw/d2Cache): how much of
// a position's neighbourhood is decided already.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/bitmap.h"

namespace dllm {

// For L = known.size() positions, with phi(d) = exp(-d^2 / (2 sigma^2)), sigma > 0,
//   D(i) = sum_{j = -L}^{2L - 1} phi(i - j) known*(j)  /  sum_{d = -3L}^{3L - 1} phi(d)
// known* is true left of the positions, known inside, and right of them true exactly if the last one is known. Rounded to 40
// bits, so that positions that lie alike have the same density.
std::vector<double> certainty_density(std::span<const uint8_t> known, double sigma);

// The same for a canvas: [positions], from the lowest editable position on; 0 left of it. Known: not masked.
std::vector<double> certainty_density(const Bitmap& editable, const Bitmap& masked, double sigma);

}  // namespace dllm
