#include "cache/feature_cache.h"

#include "runtime/buffer.h"

namespace dllm {

FeatureCache::FeatureCache(const ModelSpec& spec, DType dtype, int64_t positions, Device& device) {
  // The CPU's rows begin on cache lines; CUDA's kernels take rows without gaps.
  const int64_t line = device.is_cpu() ? 64 / int64_t(size_of(dtype)) : 1;
  const int64_t ld = (spec.d_model + line - 1) / line * line;
  const size_t bytes = checked_bytes("the feature cache", size_t(positions), size_t(ld), size_of(dtype));
  memory_ =
      DeviceBuffer(device, checked_bytes("the feature cache", bytes, size_t(2 * spec.n_layers)), "the feature cache");
  char* next = memory_.as<char>();
  const auto take = [&] { return ops::FeatureSlab{std::exchange(next, next + bytes), ld, dtype}; };
  for (int l = 0; l < spec.n_layers; ++l) {
    const ops::FeatureSlab attention = take();
    slabs_.push_back({attention, take()});
  }
}

}  // namespace dllm
