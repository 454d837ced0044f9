// The left-hand side of a GEMM as the current ISA's kernel reads it, and how many threads work is worth.
#pragma once

#include <cstdint>

#include "runtime/buffer.h"
#include "runtime/dtype.h"

namespace dllm::ops::cpu {

struct Activations {
  const void* data;
  int64_t ld;    // elements from one row to the next
  int64_t size;  // bytes of an element
};

// x itself, or where the CPU has no bf16 dot product, its fp32 copy in `scratch`.
Activations prepare_activations(const void* x, DType dtype, int64_t rows, int64_t k, int64_t ldx, Buffer& scratch);

// C[rows, 32] = A B over all of K, in blocks of kBlockBytes.
void gemm_panel(const Activations& a, DType dtype, int64_t row, int64_t rows, int64_t k, const void* panel, float* c,
                int64_t ldc);

// Panels per thread below which a fork costs more than it saves.
int64_t panel_grain(int64_t rows, int64_t k, DType dtype);
// Likewise rows of a pass over [rows, columns].
int64_t row_grain(int64_t columns);

}  // namespace dllm::ops::cpu
