// dLLM-Cache on the device (ops/features.h, ops/similarity.h have the formulas): kept outputs of attention and MLP, the
// similarity of fresh values to cached ones, and from it the rows that a layer computes. One launch each.
#pragma once

#include "ops/cuda/step.h"

namespace dllm::ops::cuda {

// slab[position] = round(y[i]);  x[row] += y[i]     for the list's rows i
struct StoreAndAddArgs {
  const float* y;  // [capacity, d]
  RowList rows;
  void* const* slabs;  // device, [n_sequences]: T [positions, d]
  int32_t d;
  float* x;  // the residual stream [.., d]
};
void store_and_add(Stream stream, DType type, const StoreAndAddArgs& args);

// x[row] = (x[row] + a[position]) + f[position]
struct AddKeptArgs {
  RowList rows;
  void* const* attention_slabs;  // device, [n_sequences]: T [positions, d]
  void* const* mlp_slabs;
  int32_t d;
  float* x;
};
void add_kept(Stream stream, DType type, const AddKeptArgs& args);

// similarity[i] = cosine of (v[i] + bias, rounded to T) and the slab's V at the row's position, fp64, as ops/similarity.h
// defines it; then V of the slab becomes v[i] + bias.
struct VerifyValuesArgs {
  const float* v;  // [capacity, n_kv head_dim]
  const float* bias;  // [n_kv head_dim] or null
  RowList rows;
  const KvView* slabs;  // device, [n_sequences]
  int32_t n_kv, head_dim;
  double* similarity;  // [capacity]
};
void verify_values(Stream stream, DType type, const VerifyValuesArgs& args);

// What a layer does with a sequence's rows, set by the step's plan.
struct LayerPlan {
  int32_t refresh_prompt, refresh_response;  // every row of the part is computed
  int32_t
      n_verify;  // otherwise, of the response: this many rows with the least similarity; -1: none, and no similarity
};

// The step's rows -> those the layer computes, and the others; both ascending, sequence by sequence.
// Equal similarities: the lowest row. A NaN counts as changed most.
struct ChooseRowsArgs {
  RowList step;  // all rows of the step: row[i] = i
  const int32_t* is_response;  // [step rows]
  const LayerPlan* plans;  // [n_sequences]
  RowList verified;  // the response rows whose similarity is given
  const double* similarity;
  int32_t n_sequences;
  RowList live, resting;
};
void choose_rows(Stream stream, const ChooseRowsArgs& args);

}  // namespace dllm::ops::cuda
