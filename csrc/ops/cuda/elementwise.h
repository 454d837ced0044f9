// The passes between GEMMs on the device; the formulas are those of ops/elementwise.h. One launch each.
// n_rows: a count in device memory, at most `capacity`, which sizes the launch.
#pragma once

#include "ops/cuda/step.h"

namespace dllm::ops::cuda {

// out[r, :] = table[tokens[r], :]
struct EmbeddingArgs {
  const void* table;  // [vocab, d] of `type`
  DType type;
  const int32_t* tokens;  // [n_rows]
  const int32_t* n_rows;
  int32_t capacity, d;
  float* out;  // [capacity, d]
};
void embedding(Stream stream, const EmbeddingArgs& args);

// out[i, :] = x[row, :] * rsqrt(mean(x[row, :]^2) + eps) * weight    row = rows[i], or i where rows is null
struct RmsNormArgs {
  const float* x;  // [.., d]
  const int32_t* rows;
  const int32_t* n_rows;
  int32_t capacity, d;
  const float* weight;
  float eps;
  void* out;  // T [capacity, d]
};
void rms_norm(Stream stream, DType type, const RmsNormArgs& args);

// qkv + bias; q rotated into q_out, k rotated and v into the slab at the row's position.
struct RopeKvArgs {
  const float* qkv;  // [capacity, (n_heads + 2 n_kv) head_dim]: q heads, k heads, v heads
  const float* bias;  // [(n_heads + 2 n_kv) head_dim] or null
  const float* cos;  // [positions, head_dim / 2]
  const float* sin;
  const int32_t* positions;  // [n_rows]
  const int32_t* sequence;  // [n_rows]
  const int32_t* n_rows;
  int32_t capacity, n_heads, n_kv, head_dim;
  const KvView* slabs;  // [n_sequences] of this layer
  void* q_out;  // T [capacity, n_heads head_dim]
};
void rope_kv_write(Stream stream, DType type, const RopeKvArgs& args);

// out[r, i] = silu(gate_up[r, i]) * gate_up[r, m + i],  silu(x) = x / (1 + exp(-x))
struct SiluMulArgs {
  const float* gate_up;  // [capacity, 2 m]
  const int32_t* n_rows;
  int32_t capacity, m;
  void* out;  // T [capacity, m]
};
void silu_mul(Stream stream, DType type, const SiluMulArgs& args);

}  // namespace dllm::ops::cuda
