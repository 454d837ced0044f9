// The passes between GEMMs: embedding gather, RMSNorm, rotary embedding with the write into the KV slab.
#pragma once

#include <cstdint>

#include "ops/kv_layout.h"
#include "runtime/dtype.h"

namespace dllm::ops {

// out[r, :] = table[tokens[r], :]     out fp32 [rows, d]; table [vocab, d] of `dtype`. Ids are checked by the caller.
struct EmbeddingArgs {
  const void* table;
  DType dtype;
  const int32_t* tokens;
  int64_t rows, d;
  float* out;
  int64_t ldo;
};
void embedding(const EmbeddingArgs& args);

// out[r, :] = x[r, :] * rsqrt(mean(x[r, :]^2) + eps) * weight     in fp32, rounded once to out_dtype
// With rows_in, out[r, :] comes from x[rows_in[r], :].
struct RmsNormArgs {
  const float* x;
  int64_t rows, d, ldx;
  const float* weight;
  float eps;
  void* out;
  int64_t ldo;
  DType out_dtype;
  const int32_t* rows_in = nullptr;  // [rows] or null
};
void rms_norm(const RmsNormArgs& args);

// Rotary embedding, half-split ("rotate_half", NeoX): for i < head_dim / 2
//   y[i] = x[i] cos - x[i + hd/2] sin ;  y[i + hd/2] = x[i + hd/2] cos + x[i] sin ;  angle = position * theta^(-2i/hd)
// q is rotated into q_out; k is rotated and written to the slab at the row's position; v is written unrotated.
struct RopeKvArgs {
  const float* qkv;  // [rows, (n_heads + 2 n_kv) * head_dim]: q heads, k heads, v heads
  int64_t rows, ldqkv;
  int n_heads, n_kv, head_dim;
  const float* cos;  // [positions, head_dim / 2]
  const float* sin;
  const int32_t* positions;  // [rows]
  void* q_out;               // [rows, n_heads * head_dim] of `dtype`
  int64_t ldq;
  DType dtype;
  const KvSlab* slabs;         // [sequences], this layer's
  const int32_t* row_to_slab;  // [rows]
};
void rope_kv_write(const RopeKvArgs& args);

}  // namespace dllm::ops
