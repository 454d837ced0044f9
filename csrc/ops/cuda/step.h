// What the kernels of one step share: the step's rows, and where their sequences keep K and V. All of it lies in device
// memory, so that a captured graph stays valid when rows, their number, or sequences change: a launch is sized by a
// capacity that the host knows, and threads beyond the count in device memory return at once.
//
// Element types of activations, weights and slabs ("T"): fp32, bf16, fp16 (runtime/dtype.h). Everything else is fp32.
#pragma once

#include <cstdint>

#include "runtime/dtype.h"

namespace dllm::ops::cuda {

using Stream = void*;  // cudaStream_t; in the emulator an emu::Queue*, or null: run at once

// A sequence's part of the step's packed rows.
struct SequenceRows {
  int32_t begin, end;
  int32_t n_keys;  // positions [0, n_keys) are attended
};

// One layer's K and V of one sequence: [n_kv][capacity][head_dim] of T each, K rotated, addressed by position.
struct KvView {
  void* k;
  void* v;
  int32_t capacity;
};

// A list of rows in device memory: those a layer computes, or those it does not (dLLM-Cache).
struct RowList {
  int32_t* row;  // [capacity] index into the step's rows (the residual stream)
  int32_t* position;  // [capacity]
  int32_t* sequence;  // [capacity]
  SequenceRows* sequences;  // [n_sequences]: ranges of this list
  int32_t* count;
  int32_t capacity;
};

}  // namespace dllm::ops::cuda
