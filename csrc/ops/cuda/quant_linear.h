// y = x W^T for few rows and weights in 8 or 4 bits (ops/quantize.h) against 16-bit activations: W8A16 and W4A16.
//   I8   y[r, j]  = (sum_i x[r, i] q[j, i]) s[j]
//   I4   y[r, j]  = sum_g (sum_{i in g} x[r, i] v[q[j, i]]) s[j, g]      g: 64 terms along K
// bf16, fp16: mma.sync, weights stream through cp.async once and are turned into T in registers (all of v and q are whole
// numbers below 128, exact in bf16 and fp16); sums in fp32. fp32: plain arithmetic, for parity.
// A row's result does not depend on the rows beside it.
#pragma once

#include "ops/cuda/step.h"
#include "ops/quantize.h"

namespace dllm::ops::cuda {

// Bytes and contents of a matrix [n, k] in the order the kernel reads it: made on the host, once, from the checkpoint's
// form (ops/quantize.h). n a multiple of 16, k of 64; ConfigError otherwise. Scales follow the weights.
size_t quant_bytes(WeightFormat format, int64_t n, int64_t k);
void quant_pack(const WeightSource& source, void* out);

struct QuantLinearArgs {
  const void* weights;  // device, quant_bytes
  WeightFormat format;
  int64_t n, k;
  const void* x;  // T [capacity, k]
  const int32_t* n_rows;
  float* out;  // [capacity, ldo]
  int64_t ldo;
  bool accumulate;  // out += instead of out =
  int32_t rows;  // the capacity: sizes the launch. More than 64 are computed 64 at a time, each with all weights
  // Only these output columns (rows of W), multiples of 16; column 0 of `out` is then the first. -1: to the end.
  int64_t column_begin = 0, column_end = -1;
};
// One launch.
void quant_linear(Stream stream, DType type, const QuantLinearArgs& args);

}  // namespace dllm::ops::cuda
