// The row-sparse transformer: forward(tokens[rows], positions[rows]) writes the rows' K and V at their positions and lets
// the rows attend to every cached slot of their sequence. Which rows a step computes is a cache policy's business.
//
//   h = x + out(Attn(rope(q), rope(k), v)),  q k v = Wqkv norm1(x)
//   y = h + down(silu(gate n) * up n),       n = norm2(h)
//
// The residual stream is fp32 in every precision; norms, softmax and accumulation are fp32; weights, the operands of
// GEMMs and the KV slabs have the model's dtype.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/weights.h"
#include "ops/attention.h"
#include "ops/row_stats.h"

namespace dllm {

// Rows of several sequences, packed one after the other without padding.
struct StepInput {
  struct Sequence {
    int64_t row_begin, row_end;
    int64_t n_keys;  // slots that hold a position of this sequence
    std::span<const ops::KvSlab> slabs;  // one per layer
  };
  std::vector<int32_t> tokens, positions;  // [rows]
  std::vector<Sequence> sequences;
  std::vector<int64_t> out_rows;  // rows whose final hidden state is wanted, ascending

  void clear();
};

class Transformer {
 public:
  Transformer(const ModelSpec& spec, const Weights& weights) : spec_(spec), weights_(weights) {}

  // Runs the layers. In the last one only `out_rows` go past the KV write: nothing reads the others.
  // check_finite: a NumericalError names the first layer whose output is not finite (for diagnosis, costs a pass).
  void forward(const StepInput& in, bool check_finite = false);

  // Of the last forward's out_rows, in order.
  void row_stats(const ops::RowStatsParams& params, const NoiseKey* keys, ops::RowStats* out);
  // [out_rows, vocab] fp32, row stride ld. The caller may change them; valid until the next call.
  float* logits(int64_t& ld);

  // Counters: query rows x keys summed over layers (the last layer has out_rows queries only); packed weights read.
  int64_t attention_pairs(int64_t rows, int64_t out_rows, int64_t keys) const {
    return ((spec_.n_layers - 1) * rows + out_rows) * keys;
  }
  int64_t weight_bytes() const { return int64_t(weights_.layer_bytes() + weights_.head_bytes()); }

 private:
  struct Rows {  // a matrix in scratch memory
    void* data;
    int64_t ld;
  };
  Rows scratch(Buffer& b, int64_t rows, int64_t cols, DType t, const char* what);
  void ensure_rope(int64_t positions);
  void qkv(const LayerWeights& w, int layer, const StepInput& in);
  void keep_out_rows(const StepInput& in);
  void attention_and_mlp(const LayerWeights& w, int layer, const StepInput& in);
  void require_finite(int layer) const;

  const ModelSpec& spec_;
  const Weights& weights_;
  int64_t rope_positions_ = 0;
  std::vector<float> cos_, sin_;  // [positions, head_dim / 2]

  // Scratch, reused from step to step. rows_ counts the rows that are live in x_ and q_.
  int64_t rows_ = 0;
  std::vector<ops::AttentionSequence> sequences_;
  std::vector<int32_t> row_to_slab_;
  std::vector<ops::KvSlab> layer_slabs_;
  Buffer x_buffer_, h_buffer_, q_buffer_, attn_buffer_, qkv_buffer_, mlp_buffer_, logits_buffer_, stats_buffer_;
  Rows x_{}, h_{}, q_{}, attn_{};
};

}  // namespace dllm
