#include "decode/schedule.h"

#include <cmath>

namespace dllm {

namespace {

// torch.linspace(1, eps, steps + 1)[i] in fp32: both halves are counted from their own end, each in one rounding.
float dream_time(double eps, int64_t steps, int64_t i) {
  const float start = 1.0f, end = float(eps);
  const float delta = (end - start) / float(steps);
  return i < (steps + 1) / 2 ? std::fma(delta, float(i), start) : std::fma(-delta, float(steps - i), end);
}

}  // namespace

int64_t llada_transfer_count(int64_t masked, int64_t steps, int64_t step) {
  return masked / steps + (step < masked % steps ? 1 : 0);
}

float dream_transfer_probability(double eps, int64_t steps, int64_t step) {
  if (step + 1 >= steps) return 1.0f;
  return 1.0f - dream_time(eps, steps, step + 1) / dream_time(eps, steps, step);
}

int64_t dream_transfer_count(int64_t masked, double eps, int64_t steps, int64_t step) {
  if (step + 1 >= steps) return masked;
  return int64_t(float(masked) * dream_transfer_probability(eps, steps, step));
}

}  // namespace dllm
