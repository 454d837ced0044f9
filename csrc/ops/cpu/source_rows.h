// Rows of a checkpoint's matrices, as fp32 or as stored quantised values.
#pragma once

#include "ops/quantize.h"

namespace dllm::ops::cpu {

// Row `index` of an F32 or BF16 matrix.
void read_row(const WeightSource& source, int64_t index, float* out);

// Row `index` in `format`, as quantize_row gives it: read where the matrix is quantised, else quantised now.
void read_quantized_row(const WeightSource& source, int64_t index, WeightFormat format, float* scratch, uint8_t* q,
                        void* scales);

}  // namespace dllm::ops::cpu
