// The kept outputs of every layer's attention and MLP, of one sequence (dLLM-Cache): [positions, d_model] of the model's
// dtype each, 2 n_layers d_model elements per position beside the KV slabs.
#pragma once

#include <span>
#include <vector>

#include "model/spec.h"
#include "model/step_input.h"
#include "runtime/device.h"

namespace dllm {

class FeatureCache {
 public:
  FeatureCache() = default;
  FeatureCache(const ModelSpec& spec, DType dtype, int64_t positions, Device& device = cpu_device());

  std::span<const LayerFeatures> slabs() const { return slabs_; }

 private:
  DeviceBuffer memory_;
  std::vector<LayerFeatures> slabs_;
};

}  // namespace dllm
