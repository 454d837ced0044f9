// y = x W^T + b for few rows: the GEMM of a denoising step.
//
// Weights are packed once into panels of 32 output columns, in the order the kernel reads them, and the same packed
// copy serves every row count and every ISA:
//   F32   [N/32][K][32]
//   BF16  [N/32][K/2][32][2]    pairs along K interleaved, as VDPBF16PS wants them
//   I8    [N/32][K/4][32][4]    q + 128, fours along K interleaved, as VPDPBUSD wants them
//   I4    [N/32][K/64]{ bf16 scales [32], [16][16 columns][4] bytes }    q: column j in the low halves, j + 16 in the high
// N is padded with zero columns to a multiple of 32; K with zeros to a multiple of 2 (BF16) or 64 (I8, I4).
//
// Quantised weights (quantize.h) meet activations that are quantised row by row as they come (W8A8, W4A8):
//   x[r, i] ~ a[r, i] * xs[r],  xs[r] = max_i |x[r, i]| / 127,  a = x * (127 / max) rounded to nearest, ties to even
//   I8   y[r, j] = (sum_i a[r, i] q[j, i]) * xs[r] * ws[j]
//   I4   y[r, j] = (sum_g (sum_{i in g} a[r, i] v[q[j, i]]) * ws[j, g]) * xs[r]   g: 64 terms along K
// Inner sums are exact integers.
//
// Every output element is accumulated in one fixed order along K, so a row's result does not depend on how many rows are
// computed with it nor on the number of threads: batches are bitwise invariant.
#pragma once

#include <cstdint>

#include "ops/quantize.h"
#include "runtime/buffer.h"
#include "runtime/dtype.h"

namespace dllm::ops {

inline constexpr int kPanel = 32;

struct PackedLinear {
  int64_t n = 0, k = 0;  // output columns, input columns
  WeightFormat format = WeightFormat::F32;
  bool gate_up = false;  // panels hold 16 gate columns then the same 16 up columns; n counts both
  Buffer weight;  // see above
  Buffer scale;  // I8: fp32 [n padded], else empty
  Buffer bias;  // fp32 [n padded], or empty

  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t k_padded() const;
  int64_t panel_bytes() const;
  const char* panel(int64_t index) const { return weight.as<char>() + index * panel_bytes(); }
  size_t bytes() const { return weight.bytes() + scale.bytes() + bias.bytes(); }
};

// Packs the rows of one or more sources stacked along N (for example q, k, v) to `format`: F32 and BF16 sources to any,
// quantised ones to their own. UsageError otherwise, ConfigError where a sum could overflow (k > 65536 with I8).
PackedLinear pack_linear(const WeightSource* sources, int count, WeightFormat format);
// Packs a gated MLP's two projections [n, k] interleaved, for Epilogue::SiluMul.
PackedLinear pack_gate_up(const WeightSource& gate, const WeightSource& up, WeightFormat format);

enum class Epilogue {
  Store,  // out[r, j]  = (x W^T + b)[r, j]
  AddTo,  // out[r, j] += (x W^T + b)[r, j]            out is F32: the residual stream
  SiluMul,  // out[r, j]  = silu(gate[r, j]) * up[r, j]  w.gate_up, out has n / 2 columns
};

struct LinearArgs {
  const PackedLinear* w;
  const void* x;  // [rows, k], row stride ldx (elements)
  DType x_dtype;  // that of F32 and BF16 weights; either for quantised ones
  int64_t rows, ldx;
  void* out;  // [rows, n] of out_dtype, row stride ldo
  int64_t ldo;
  DType out_dtype;
  Epilogue epilogue;
  // Row r of the result goes to row out_rows[r] of `out`, each of them once; null: to row r.
  const int32_t* out_rows = nullptr;
  // Only these panels of w; column 0 of `out` is then the first column of panel_begin. -1: to the end.
  int64_t panel_begin = 0, panel_end = -1;
};

void linear(const LinearArgs& args);

// Row stride for an activation matrix of `cols` columns: breaks powers of two, so that the rows of a tile do not fall
// into one cache set; keeps 64-byte alignment.
int64_t activation_stride(int64_t cols, DType dtype);

}  // namespace dllm::ops
