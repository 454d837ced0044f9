// How many positions to commit at each step of a block, for the two published step-count schedules.
#pragma once

#include <cmath>
#include <cstdint>

#include "runtime/host_device.h"

namespace dllm {

// LLaDA (generate.py, get_num_transfer_tokens): `masked` positions spread over `steps`, the remainder first:
// masked 10, steps 4 -> 3, 3, 2, 2. The entries sum to `masked`; trailing ones may be 0.
DLLM_HD inline int64_t llada_transfer_count(int64_t masked, int64_t steps, int64_t step) {
  return masked / steps + (step < masked % steps ? 1 : 0);
}

// torch.linspace(1, eps, steps + 1)[i] in fp32: both halves are counted from their own end, each in one rounding.
DLLM_HD inline float dream_time(double eps, int64_t steps, int64_t i) {
  const float start = 1.0f, end = float(eps);
  const float delta = (end - start) / float(steps);
  return i < (steps + 1) / 2 ? fmaf(delta, float(i), start) : fmaf(-delta, float(steps - i), end);
}

// Dream (generation_utils.py): t runs linearly from 1 to eps; a step transfers the share 1 - s/t of what is still masked,
// s the next time; everything at the last step. In fp32, as published, because the count is truncated to an integer.
DLLM_HD inline float dream_transfer_probability(double eps, int64_t steps, int64_t step) {
  if (step + 1 >= steps) return 1.0f;
  return 1.0f - dream_time(eps, steps, step + 1) / dream_time(eps, steps, step);
}
DLLM_HD inline int64_t dream_transfer_count(int64_t masked, double eps, int64_t steps, int64_t step) {
  if (step + 1 >= steps) return masked;
  return int64_t(float(masked) * dream_transfer_probability(eps, steps, step));
}

}  // namespace dllm
