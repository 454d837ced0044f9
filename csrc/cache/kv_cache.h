// The KV slabs of one sequence: one per layer, written in place at their position, allocated once for the whole canvas.
#pragma once

#include <span>
#include <vector>

#include "model/spec.h"
#include "ops/kv_layout.h"
#include "runtime/device.h"

namespace dllm {

class KvCache {
 public:
  KvCache() = default;
  KvCache(const ModelSpec& spec, DType dtype, int64_t positions, Device& device = cpu_device());

  std::span<const ops::KvSlab> slabs() const { return slabs_; }
  size_t bytes() const { return memory_.bytes(); }

 private:
  DeviceBuffer memory_;
  std::vector<ops::KvSlab> slabs_;
};

}  // namespace dllm
