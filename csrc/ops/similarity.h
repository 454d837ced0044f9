// Fresh values against the cached ones, to find the rows whose features changed (dLLM-Cache, arXiv 2506.06295).
#pragma once

#include <cstdint>

#include "ops/kv_layout.h"

namespace dllm::ops {

// similarity[r] = a.b / (max(|a|, 1e-8) max(|b|, 1e-8)), as torch.nn.functional.cosine_similarity defines it, over the
// whole width n_kv * head_dim: a is v[r] rounded to the slab's dtype, b the slab's V at positions[r]. Products and sums
// are fp64, in the same order on every instruction set. NaN where a row holds one.
struct ValueSimilarityArgs {
  const float* v;  // [rows, n_kv * head_dim]
  int64_t rows, ldv;
  const int32_t* positions;  // [rows]
  KvSlab slab;
  double* similarity;  // [rows]
};
void value_similarity(const ValueSimilarityArgs& args);

// V of the slab at positions[r] becomes v[r], with the bits that rope_kv_write gives it; K stays.
struct WriteValuesArgs {
  const float* v;  // [rows, n_kv * head_dim]
  int64_t rows, ldv;
  const int32_t* positions;  // [rows], each once
  KvSlab slab;
};
void write_values(const WriteValuesArgs& args);

}  // namespace dllm::ops
