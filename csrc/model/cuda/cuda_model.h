// The row-sparse transformer on CUDA: the same step as the CPU's (transformer.h), each of its passes a kernel of
// ops/cuda. The plan of a step lies in device memory; the host knows only capacities, which size the launches. So the same
// launches, captured as a graph, serve every step of a shape.
//
// forward() is given a plan by the host and row_stats() waits for the result: one synchronisation per step, with every
// cache and every decoder. The loop on the device (engine/cuda) plans, runs run_layers() and head_stats(), and chooses
// without the host.
#pragma once

#include <memory>
#include <vector>

#include "model/cuda/step_memory.h"
#include "model/cuda/weights.h"
#include "ops/cuda/row_stats.h"

namespace dllm {

// What sizes the launches of a step.
struct StepShape {
  struct Layer {
    int32_t live = 0;  // rows it computes
    int32_t verified = 0;  // rows whose V it compares
    bool operator==(const Layer&) const = default;
  };
  int32_t rows = 0, out_rows = 0, sequences = 0, keys = 0;  // keys: of the longest sequence
  bool importance = false;
  std::vector<Layer> layers;  // dLLM-Cache: one per layer; empty: every layer computes every row
  bool operator==(const StepShape&) const = default;
};

class CudaModel final : public Model {
 public:
  CudaModel(const ModelSpec& spec, std::unique_ptr<Device> device, const Checkpoint& checkpoint, DType dtype,
            Quantization quantization, const LoadProgress& progress);

  Device& device() const override { return *device_; }
  ModelInfo info() const override { return weights_.info; }
  void reserve(const StepSize& most) override;
  void forward(const StepInput& in, bool check_finite = false) override;
  void row_stats(const ops::RowStatsParams& params, const NoiseKey* keys, ops::RowStats* out) override;
  float* logits(int64_t& ld) override;
  std::span<const float> importance(size_t s) const override;
  const StepWork& work(size_t s) const override { return work_[s]; }
  int64_t weight_bytes() const override { return weight_bytes_; }

  // For the loop on the device. reserve() first; `shape` within what was reserved.
  const StepMemory& memory() const { return step_; }
  // Counts up where memory was taken anew: launches that were recorded before then must not be replayed.
  int64_t generation() const { return generation_; }
  int32_t max_rows() const { return capacity_.rows; }
  int32_t max_out_rows() const { return capacity_.out_rows; }
  int32_t max_sequences() const { return capacity_.sequences; }  // also the stride of what the plan has per layer
  void run_layers(const StepShape& shape, bool check_finite = false);
  void head_stats(const StepShape& shape, const ops::RowStatsParams& params);
  const ops::cuda::RowStatsState* stats() const { return stats_.as<ops::cuda::RowStatsState>(); }
  const float* importance_on_device() const { return importance_; }  // [sequences, importance_stride()]
  int64_t importance_stride() const { return importance_ld_; }
  int64_t layer_weight_bytes() const { return layer_bytes_; }
  int64_t head_weight_bytes() const { return int64_t(weights_.head.weight.bytes()); }

 private:
  void linear(const CudaLinear& w, const void* x, const ops::cuda::RowList& rows, int32_t capacity, float* out,
              bool accumulate);
  void run_layer(const StepShape& shape, int layer);
  ops::cuda::RowList choose_rows(const StepShape& shape, int layer);
  void value_projection(const CudaLinear& qkv, const ops::cuda::RowList& rows, int32_t n);
  void find_importance(const StepShape& shape);
  void read_hidden(const StepShape& shape);
  void head_tile(const StepShape& shape, int64_t first, int64_t n, float* out, int64_t ld);
  void send_plan(const StepInput& in);
  void count_work(const StepInput& in);
  void require_finite(const StepShape& shape, int layer);
  void reserve_scratch(const StepCapacity& c, int32_t keys, bool features, bool importance);
  ops::cuda::Stream stream() const { return device_->stream(); }

  const ModelSpec& spec_;
  std::unique_ptr<Device> device_;
  CudaWeights weights_;
  int64_t layer_bytes_ = 0;

  // Plan.
  StepCapacity capacity_;
  int64_t generation_ = 0;
  int32_t keys_ = 0;
  bool features_ = false, captures_importance_ = false;
  DeviceBuffer step_buffer_;
  StepMemory step_{};
  std::vector<char> host_plan_;
  StepShape shape_;  // of the last forward

  // Scratch, [rows of the step] each.
  DeviceBuffer x_, h_, qkv_, q_, attention_, gate_up_, act_, lse_, attention_scratch_;
  DeviceBuffer y_, values_, similarity_, lists_;  // dLLM-Cache
  ops::cuda::RowList live_{}, resting_{};
  DeviceBuffer means_, rollout_[2];  // d2Cache: [layers][rows, ld], [sequences, ld]
  int64_t importance_ld_ = 0;
  const float* importance_ = nullptr;
  DeviceBuffer hidden_, tile_, stats_;  // of out_rows
  Pinned<ops::cuda::RowStatsState> host_stats_;
  Pinned<float> host_importance_, host_logits_, host_x_;
  Pinned<int32_t> host_count_;
  DeviceBuffer logits_;

  std::vector<int64_t> importance_keys_;  // per sequence; 0: not asked for
  std::vector<StepWork> work_;
  int64_t weight_bytes_ = 0;
};

}  // namespace dllm
