// A model that the loop can step: the CPU's transformer (transformer.h), or CUDA's (cuda/cuda_model.h).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/checkpoint.h"
#include "model/spec.h"
#include "model/step_input.h"
#include "ops/row_stats.h"
#include "runtime/device.h"

namespace dllm {

// What a forward did for one sequence.
struct StepWork {
  int64_t layer_rows = 0;  // rows whose q, k, v were computed, summed over layers
  int64_t verify_rows = 0;  // rows of which only v was, summed over layers
  // Query rows x keys, summed over layers. In the CPU's last one only rows that go on are queries, but rollout wants all.
  int64_t attention_pairs = 0;
  double selection_seconds = 0;  // in rollout, or in similarities and their order
};

// What was loaded.
struct ModelInfo {
  DType dtype = DType::F32;  // of linear layers that are not quantised, activations between them, and KV slabs
  Quantization quantization = Quantization::None;
  size_t resident_bytes = 0;  // of weights
  std::vector<std::string> unused_tensors;  // in the checkpoint, but not part of this architecture
};

class Model {
 public:
  virtual ~Model() = default;
  virtual Device& device() const = 0;
  virtual ModelInfo info() const = 0;

  // Takes the memory for steps of up to this size, after which such steps take none, but for scratch that kernels keep per
  // thread, and for rollout where it holds more than 64 MB.
  virtual void reserve(const StepSize& most) = 0;
  // Runs the layers. check_finite: a NumericalError names the first layer whose output is not finite (for diagnosis).
  virtual void forward(const StepInput& in, bool check_finite = false) = 0;

  // Of the last forward's out_rows, in order.
  virtual void row_stats(const ops::RowStatsParams& params, const NoiseKey* keys, ops::RowStats* out) = 0;
  // [out_rows, vocab] fp32 in host memory, row stride ld. The caller may change them; valid until the next call.
  virtual float* logits(int64_t& ld) = 0;

  // Of the last forward: attention rollout of sequence s [n_keys], where it was asked for; work of every sequence.
  virtual std::span<const float> importance(size_t s) const = 0;
  virtual const StepWork& work(size_t s) const = 0;
  // Weights read by the last forward and what was asked of its rows; a layer that computes no row reads none.
  virtual int64_t weight_bytes() const = 0;
};

// Called with bytes read so far and bytes in all.
using LoadProgress = std::function<void(size_t done, size_t total)>;

// quantization None: as the checkpoint has it. ConfigError where it has another format than the one asked for.
std::unique_ptr<Model> load_cpu_model(const ModelSpec& spec, std::unique_ptr<Checkpoint> checkpoint, DType dtype,
                                      Quantization quantization, const LoadProgress& progress);
// ConfigError that says why, where this build or this machine has no CUDA.
std::unique_ptr<Model> load_cuda_model(const ModelSpec& spec, std::unique_ptr<Checkpoint> checkpoint, DType dtype,
                                       Quantization quantization, const LoadProgress& progress);

}  // namespace dllm
