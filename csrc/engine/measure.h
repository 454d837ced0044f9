// Single steps, timed: for benchmarks and profilers.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/engine.h"

namespace dllm {

// Seconds of each of `repeats` steps of `rows` rows over `keys` cached positions, the LM head's statistics of all rows
// included, one sequence. UsageError where a number is out of range.
std::vector<double> time_steps(Engine& engine, int64_t rows, int64_t keys, int64_t repeats);

}  // namespace dllm
