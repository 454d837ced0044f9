// How many positions to commit at each step of a block, for the two published step-count schedules.
#pragma once

#include <cstdint>
#include <vector>

namespace dllm {

// LLaDA (generate.py, get_num_transfer_tokens): `masked` positions spread over `steps`, the remainder first:
// masked 10, steps 4 -> 3, 3, 2, 2. The entries sum to `masked`; trailing ones may be 0.
int64_t llada_transfer_count(int64_t masked, int64_t steps, int64_t step);

// Dream (generation_utils.py): t runs linearly from 1 to eps; a step transfers the share 1 - s/t of what is still masked,
// s the next time; everything at the last step. In fp32, as published, because the count is truncated to an integer.
float dream_transfer_probability(double eps, int64_t steps, int64_t step);
int64_t dream_transfer_count(int64_t masked, double eps, int64_t steps, int64_t step);

}  // namespace dllm
