// y = x W^T + b for few rows: the GEMM of a denoising step.
//
// Weights are packed once into panels of 32 output columns, in the order the kernel reads them, and the same packed
// copy serves every row count and every ISA:
//   F32   [N/32][K][32]           BF16  [N/32][K/2][32][2]   (pairs along K interleaved, as VDPBF16PS wants them)
// N is padded with zero columns to a multiple of 32; K to a multiple of 2 (BF16).
// Every output element is accumulated in fp32 in one fixed order along K, so a row's result does not depend on how many
// rows are computed with it nor on the number of threads: batches are bitwise invariant.
#pragma once

#include <cstdint>
#include <functional>

#include "runtime/buffer.h"
#include "runtime/dtype.h"

namespace dllm::ops {

inline constexpr int kPanel = 32;

struct PackedLinear {
  int64_t n = 0, k = 0;  // output columns, input columns
  DType dtype = DType::F32;
  bool gate_up = false;  // panels hold 16 gate columns then the same 16 up columns; n counts both
  Buffer weight;  // see above
  Buffer bias;  // fp32 [n padded], or empty

  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  size_t bytes() const { return weight.bytes() + bias.bytes(); }
  int64_t k_padded() const { return dtype == DType::BF16 ? (k + 1) / 2 * 2 : k; }
};

// A source matrix [n, k], row-major, of a checkpoint (F32 or BF16); k may be read with any row stride `ld` (elements).
struct WeightSource {
  const void* data;
  DType dtype;
  int64_t n, k, ld;
};

// Packs the rows of one or more sources stacked along N (for example q, k, v) to `dtype`.
PackedLinear pack_linear(const WeightSource* sources, int count, DType dtype);
// Packs a gated MLP's two projections [n, k] interleaved, for Epilogue::SiluMul.
PackedLinear pack_gate_up(const WeightSource& gate, const WeightSource& up, DType dtype);

enum class Epilogue {
  Store,  // out[r, j]  = (x W^T + b)[r, j]
  AddTo,  // out[r, j] += (x W^T + b)[r, j]            out is F32: the residual stream
  SiluMul,  // out[r, j]  = silu(gate[r, j]) * up[r, j]  w.gate_up, out has n / 2 columns
};

struct LinearArgs {
  const PackedLinear* w;
  const void* x;  // [rows, k] of w->dtype, row stride ldx (elements)
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
