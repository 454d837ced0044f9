// Reads a checkpoint's tensors one by one, each checked, for whoever packs them: the CPU's weights (weights.cpp) and CUDA's
// (cuda/weights.cpp).
#pragma once

#include <string>
#include <vector>

#include "model/model.h"
#include "ops/quantize.h"
#include "runtime/buffer.h"

namespace dllm {

// The format that loading with `quantization` and `dtype` gives a linear layer.
ops::WeightFormat format_of(Quantization quantization, DType dtype);

class WeightReader {
 public:
  WeightReader(const ModelSpec& spec, const Checkpoint& checkpoint, const LoadProgress& progress);

  // A vector as fp32 (norms, biases).
  void vector(const std::string& name, int64_t n, float* out);
  Buffer vector(const std::string& name, int64_t n);

  // The matrix `name`.weight [n, k] where it is mapped; copied only if the file has it misaligned. `stored`: its format.
  // Valid until done(), to be called when it has been packed: its pages need not stay resident.
  ops::WeightSource matrix(const std::string& name, int64_t n, int64_t k, Quantization stored);
  void done();

  const CheckpointTensor& embedding(const std::string& name);
  static DType dtype_of(const CheckpointTensor& t, const std::string& name);

 private:
  ops::WeightSource quantized_matrix(const std::string& name, int64_t n, int64_t k, Quantization stored);
  void finish(const CheckpointTensor& t);

  const ModelSpec& spec_;
  const Checkpoint& checkpoint_;
  const LoadProgress& progress_;
  size_t total_ = 0, done_ = 0;
  std::vector<const CheckpointTensor*> pending_;
  std::vector<Buffer> aligned_;
};

// The quantisation a model is loaded with: what was asked for, or the checkpoint's own. ConfigError where they differ.
Quantization resolve_quantization(const ModelSpec& spec, Quantization asked);

// Tensors of the checkpoint that are not part of the architecture.
std::vector<std::string> unused_tensors(const ModelSpec& spec, const Checkpoint& checkpoint);

}  // namespace dllm
