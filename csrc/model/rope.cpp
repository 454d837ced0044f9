#include "model/rope.h"

#include <cmath>

namespace dllm {

void rope_tables(const ModelSpec& spec, DType dtype, int64_t begin, int64_t end, float* cos, float* sin) {
  const int half = spec.head_dim / 2;
  const bool round = !spec.rope_full_precision && dtype != DType::F32;
  const auto rounded = [&](float x) {
    if (!round) return x;
    return dtype == DType::BF16 ? bf16_to_float(float_to_bf16(x)) : f16_to_float(float_to_f16(x));
  };
  for (int i = 0; i < half; ++i) {
    const float inv_freq = 1.0f / std::pow(spec.rope_theta, float(2 * i) / float(spec.head_dim));
    for (int64_t p = begin; p < end; ++p) {
      const float angle = float(p) * inv_freq;
      cos[p * half + i] = rounded(std::cos(angle));
      sin[p * half + i] = rounded(std::sin(angle));
    }
  }
}

}  // namespace dllm
