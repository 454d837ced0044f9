// Attention on the device: ops/attention.h's formula for packed rows of ragged sequences over position-addressed slabs,
//   out[r, h, :] = softmax(scale * q[r, h, :] K[h / group, :, :]^T) V[h / group, :, :]
// bf16, fp16: tensor cores (mma.sync), K and V through cp.async; fp32: plain arithmetic, for token parity.
// A result does not depend on the rows beside it, nor on the capacity: keys are cut into chunks whose number depends on
// n_keys alone, and chunks are merged in order.
#pragma once

#include "ops/cuda/step.h"

namespace dllm::ops::cuda {

struct AttentionArgs {
  const void* q;  // T [max_rows, n_heads * head_dim], rotated
  int32_t ldq;
  void* out;  // T, likewise
  int32_t ldo;
  float* lse;  // [max_rows, n_heads]: ln sum_j exp(scale q k_j); or null
  const SequenceRows* sequences;  // device, [n_sequences]
  const KvView* slabs;  // device, [n_sequences], of this layer
  int32_t n_sequences, n_heads, n_kv, head_dim;  // head_dim 64 or 128; any multiple of 8 up to 256 in fp32
  int32_t max_rows, max_keys;  // capacities: rows of all sequences, keys of the longest
  float scale;
  void* scratch;  // attention_scratch_bytes
};
// Enough for calls with fewer rows and keys, too.
size_t attention_scratch_bytes(DType type, int32_t n_heads, int32_t head_dim, int32_t max_rows, int32_t max_keys);
// One launch, or two where keys are split.
void attention(Stream stream, DType type, const AttentionArgs& args);

// mean[r, j] = 1 / n_heads sum_h exp(scale q[r, h] k[h / group, j] - lse[r, h]), heads in order: the head means that
// d2Cache's rollout needs (ops/rollout.h), from the attention's own lse. One launch.
struct HeadMeanArgs {
  AttentionArgs attention;  // of the attention call whose lse this is; out and scratch are not used
  float* mean;  // [max_rows, ld]: columns [0, n_keys) of every row are written
  int64_t ld;
};
void head_mean(Stream stream, DType type, const HeadMeanArgs& args);

}  // namespace dllm::ops::cuda
