// The KV slabs of one sequence: one per layer, written in place at their position, allocated once for the whole canvas.
#pragma once

#include <span>
#include <vector>

#include "model/spec.h"
#include "ops/kv_layout.h"
#include "runtime/buffer.h"

namespace dllm {

class KvCache {
 public:
  KvCache() = default;
  KvCache(const ModelSpec& spec, DType dtype, int64_t positions);

  std::span<const ops::KvSlab> slabs() const { return slabs_; }
  size_t bytes() const { return memory_.bytes(); }

 private:
  Buffer memory_;
  std::vector<ops::KvSlab> slabs_;
};

}  // namespace dllm
