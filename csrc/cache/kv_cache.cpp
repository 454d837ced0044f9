#include "cache/kv_cache.h"

#include "runtime/buffer.h"

namespace dllm {

KvCache::KvCache(const ModelSpec& spec, DType dtype, int64_t positions, Device& device) {
  ops::KvSlab s;
  s.capacity = (positions + 31) / 32 * 32;
  s.n_kv = spec.n_kv_heads;
  s.head_dim = spec.head_dim;
  s.dtype = dtype;
  // Every slab starts on a cache line: 32 columns of the smallest type are one.
  const size_t k_bytes = checked_bytes("the KV cache", size_t(s.k_elements()), size_of(dtype));
  const size_t v_bytes = checked_bytes("the KV cache", size_t(s.v_elements()), size_of(dtype));
  const size_t bytes = checked_bytes("the KV cache", k_bytes + v_bytes, size_t(spec.n_layers));
  memory_ = DeviceBuffer(device, bytes, "the KV cache");
  char* p = memory_.as<char>();
  for (int l = 0; l < spec.n_layers; ++l) {
    s.k = p;
    s.v = p + k_bytes;
    p += k_bytes + v_bytes;
    slabs_.push_back(s);
  }
}

}  // namespace dllm
