// numpy arrays as the kernels see them. bf16 arrays are uint16.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>

#include "ops/quantize.h"
#include "runtime/dtype.h"

namespace dllm {

// An array of fp32, or bf16 as uint16, whose last dimension is contiguous.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, cols, ld;
};

// cols -1: any number. UsageError, which calls the array `what`, unless it is such a matrix.
Matrix matrix(const pybind11::array& a, const char* what, int64_t cols = -1, bool writeable = false);

// A matrix of weights that is not empty.
ops::WeightSource weight_source(const pybind11::array& a);

}  // namespace dllm
