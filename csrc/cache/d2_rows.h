// The choices that d2Cache makes among positions (arXiv 2509.23094, github.com/Kamichanw/d2Cache), apart from its state.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cache/policy.h"

namespace dllm {

// Certainty density of every position from the lowest editable one on, 0 left of it; sigma > 0.
std::vector<double> density_of(const SequenceView& view, double sigma);

// The nucleus of the positions not in `rows`: by falling importance (ties: lowest position), those whose cumulated share of
// the total of all of them stays <= p, and always the first. Adds them to `rows`.
void add_nucleus(std::span<const float> importance, double p, Bitmap& rows);

// Adds every position between two neighbours of the set that are at most `width` apart.
void inflate(int64_t width, Bitmap& rows);

std::vector<int32_t> members_of(const Bitmap& rows);

}  // namespace dllm
