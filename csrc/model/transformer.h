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

#include "model/model.h"
#include "model/weights.h"
#include "ops/attention.h"

namespace dllm {

class Transformer final : public Model {
 public:
  Transformer(const ModelSpec& spec, const Weights& weights) : spec_(spec), weights_(weights) {}
  Transformer(const ModelSpec& spec, std::unique_ptr<const Weights> weights)
      : spec_(spec), owned_(std::move(weights)), weights_(*owned_) {}

  Device& device() const override { return cpu_device(); }
  ModelInfo info() const override {
    return {weights_.dtype, weights_.quantization, weights_.resident_bytes(), weights_.unused_tensors};
  }
  void reserve(const StepSize& most) override;
  // In the last layer only `out_rows` (with kept features: FeatureStep::last_rows) go past the KV write, as nothing reads
  // the others; where rollout is wanted, past attention.
  void forward(const StepInput& in, bool check_finite = false) override;
  void row_stats(const ops::RowStatsParams& params, const NoiseKey* keys, ops::RowStats* out) override;
  float* logits(int64_t& ld) override;
  std::span<const float> importance(size_t s) const override { return importance_[s]; }
  const StepWork& work(size_t s) const override { return work_[s]; }
  int64_t weight_bytes() const override { return weight_bytes_; }

 private:
  struct Rows {  // a matrix in scratch memory
    void* data;
    int64_t ld;
  };
  Rows scratch(Buffer& b, int64_t rows, int64_t cols, DType t, const char* what);
  void ensure_rope(int64_t positions);
  void prepare(const StepInput& in);
  void reserve_features(const StepSize& most);
  void reserve_importance(const StepSize& most);
  void prepare_captures(const StepInput& in);
  void choose_rows(const StepInput& in, int layer);
  std::span<const int32_t> least_similar(const StepInput& in, size_t s, int layer);
  void qkv(const StepInput& in, int layer);
  void keep_last_rows(const StepInput& in, const Rows& m, size_t row_bytes);
  void attention(const StepInput& in, int layer);
  void mlp(const StepInput& in, int layer);
  void add_to_stream(const StepInput& in, int layer, const ops::PackedLinear& w, const void* rows, int64_t ld,
                     int64_t begin, int64_t n, ops::FeatureSlab LayerFeatures::* slab);
  void add_kept_features(const StepInput& in, int layer);
  void find_importance(const StepInput& in);
  static int64_t capture_stride(int64_t keys);
  void require_finite(int layer) const;

  const ModelSpec& spec_;
  std::unique_ptr<const Weights> owned_;
  const Weights& weights_;
  int64_t rope_positions_ = 0;
  std::vector<float> cos_, sin_;  // [positions, head_dim / 2]

  // Scratch, reused from step to step. x_ has a row for every row of the step; the others have one for each of live_, the
  // rows (of x_) that the layer at hand computes.
  int64_t rows_ = 0, out_rows_ = 0;
  int64_t weight_bytes_ = 0;
  bool keeps_features_ = false;  // of the step's sequences: all or none
  bool wants_importance_ = false;  // at least one does
  std::vector<int32_t> live_, live_positions_;
  std::vector<int32_t> live_slab_;  // index of the row's sequence; for the KV write only
  std::vector<std::vector<int32_t>> resting_;  // per sequence, rows (of x_) that get kept features instead
  std::vector<ops::AttentionSequence> sequences_;  // row ranges are in live_
  std::vector<ops::KvSlab> layer_slabs_;
  std::vector<float*> captures_;  // per sequence [n_layers][rows, ld]: head means of attention
  std::vector<std::vector<float>> importance_;
  std::vector<int32_t> verified_, verified_positions_, changed_;  // dLLM-Cache, one sequence at a time
  std::vector<double> similarity_;
  std::vector<int32_t> resting_positions_;
  std::vector<StepWork> work_;
  Buffer x_buffer_, h_buffer_, q_buffer_, attn_buffer_, qkv_buffer_, mlp_buffer_, logits_buffer_, stats_buffer_;
  Buffer feature_buffer_, value_buffer_, capture_buffer_;
  Rows x_{}, h_{}, q_{}, attn_{};
};

}  // namespace dllm
