// The left-hand side of a GEMM as the current ISA's kernel reads it, one panel's product, and how many threads work is worth.
#pragma once

#include <cstdint>

#include "ops/linear.h"
#include "runtime/buffer.h"

namespace dllm::ops::cpu {

struct Activations {
  const void* data;
  int64_t ld;  // elements from one row to the next
  int64_t size;  // bytes of an element
  // Quantised ones only (linear.h).
  const float* scale = nullptr;  // [rows]
  const int32_t* offsets = nullptr;  // [rows]
  const int32_t* group_offsets = nullptr;  // [rows, groups]
  int64_t groups = 0;
};

// x [rows, k] for the weights w: itself, or in `scratch` its fp32 copy where the CPU has no bf16 dot product, or its
// quantised form.
Activations prepare_activations(const PackedLinear& w, const void* x, DType dtype, int64_t rows, int64_t ldx,
                                Buffer& scratch);

// C[rows, 32] = A B for rows [row, row + rows) of A and a panel of w, in blocks along K that stay in cache.
void gemm_panel(const Activations& a, const PackedLinear& w, int64_t panel, int64_t row, int64_t rows, float* c,
                int64_t ldc);

// Panels per thread below which a fork costs more than it saves.
int64_t panel_grain(int64_t rows, const PackedLinear& w);
// Likewise rows of a pass over [rows, columns].
int64_t row_grain(int64_t columns);

}  // namespace dllm::ops::cpu
