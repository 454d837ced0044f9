// Rotary tables as the published models compute them: inv_freq, angle, cos and sin in fp32.
#pragma once

#include "model/spec.h"
#include "runtime/dtype.h"

namespace dllm {

// cos and sin [positions, head_dim / 2] for positions [begin, end), written at their place.
void rope_tables(const ModelSpec& spec, DType dtype, int64_t begin, int64_t end, float* cos, float* sin);

}  // namespace dllm
