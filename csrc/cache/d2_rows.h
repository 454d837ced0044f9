// Steps in d2Cache's choice of rows (arXiv 2509.23094, github.com/Kamichanw/d2Cache) that know nothing of its state.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/bitmap.h"

namespace dllm {

// The nucleus of the positions not in `rows`: by falling importance (ties: lowest position), those whose cumulated share of
// the total of all of them stays <= p, and always the first; all, where p is 1. Adds them to `rows`. `scratch` only keeps
// its memory from call to call.
void add_nucleus(std::span<const float> importance, double p, Bitmap& rows, std::vector<int32_t>& scratch);

// Adds every position between two neighbours of the set that are at most `width` apart.
void inflate(int64_t width, Bitmap& rows);

}  // namespace dllm
