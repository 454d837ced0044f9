// Kept outputs of a layer's attention and MLP, one row per position (dLLM-Cache, arXiv 2506.06295): written for the rows
// that a step computes, added to the residual stream for those it does not.
#pragma once

#include <cstdint>

#include "runtime/dtype.h"

namespace dllm::ops {

struct FeatureSlab {
  void* data = nullptr;  // [positions, d] of `dtype`
  int64_t ld = 0;
  DType dtype = DType::F32;
};

// slab[positions[i]] = round(y[i]);   x[x_rows[i]] += y[i]     for i in [0, rows): x gets the unrounded y.
struct StoreAndAddArgs {
  const float* y;  // [rows, d]
  int64_t rows, d, ldy;
  FeatureSlab slab;
  const int32_t* positions;  // [rows], each once
  float* x;  // the residual stream
  int64_t ldx;
  const int32_t* x_rows;  // [rows], each once
};
void store_and_add(const StoreAndAddArgs& args);

// x[x_rows[i]] = (x[x_rows[i]] + a[positions[i]]) + f[positions[i]]     for i in [0, rows), in fp32.
struct AddKeptArgs {
  FeatureSlab a, f;
  int64_t rows, d;
  const int32_t* positions;  // [rows]
  float* x;
  int64_t ldx;
  const int32_t* x_rows;  // [rows], each once
};
void add_kept(const AddKeptArgs& args);

}  // namespace dllm::ops
