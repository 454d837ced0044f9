// The weights of a model, in the form the kernels read: linear layers packed (ops/linear.h), norms in fp32, the embedding
// table left where it is mapped, since a step touches a few of its rows only.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/model.h"
#include "ops/linear.h"

namespace dllm {

struct LayerWeights {
  Buffer attn_norm;  // fp32 [d]
  ops::PackedLinear qkv;  // [(n_heads + 2 n_kv) head_dim, d] and its bias
  ops::PackedLinear attn_out;  // [d, n_heads head_dim]
  Buffer ffn_norm;  // fp32 [d]
  ops::PackedLinear gate_up;  // [2 mlp, d], interleaved
  ops::PackedLinear down;  // [d, mlp]

  size_t projection_bytes() const { return attn_norm.bytes() + qkv.bytes(); }
  // What follows attention: its output projection and the MLP.
  size_t mlp_bytes() const { return attn_out.bytes() + ffn_norm.bytes() + gate_up.bytes() + down.bytes(); }
};

struct Weights {
  DType dtype = DType::F32;  // of linear layers that are not quantised, activations between them, and KV slabs
  Quantization quantization = Quantization::None;
  const void* embedding = nullptr;  // [vocab, d], owned by `checkpoint` or by `embedding_copy`
  DType embedding_dtype = DType::F32;
  std::vector<LayerWeights> layers;
  Buffer final_norm;  // fp32 [d]
  ops::PackedLinear head;  // [vocab, d]
  std::unique_ptr<Checkpoint> checkpoint;
  Buffer embedding_copy;
  std::vector<std::string> unused_tensors;  // in the checkpoint, but not part of this architecture

  size_t layer_bytes() const;  // read by one pass through all layers
  size_t head_bytes() const { return head.bytes(); }
  size_t resident_bytes() const;
};

Weights load_weights(const ModelSpec& spec, std::unique_ptr<Checkpoint> checkpoint, DType dtype,
                     Quantization quantization, const LoadProgress& progress);

}  // namespace dllm
