// y = x W^T in floating point: cuBLAS through ATen's handle (dense_linear.cpp). The emulator replaces this op, and no
// other, by plain loops (cuda_emulator/dense_linear.cpp).
#pragma once

#include "ops/cuda/step.h"

namespace dllm::ops::cuda {

struct DenseLinearArgs {
  const void* w;  // T [n, k]
  const void* x;  // T [rows, k]
  float* out;  // [rows, ldo]
  int64_t n, k, rows, ldo;
  bool accumulate;  // out += instead of out =
};
void dense_linear(Stream stream, DType type, const DenseLinearArgs& args);

}  // namespace dllm::ops::cuda
