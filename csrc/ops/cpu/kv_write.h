// Writing into a KV slab, for the kernels that do.
#pragma once

#include <cstdint>

#include "ops/kv_layout.h"

namespace dllm::ops::cpu {

// V of one head and position, rounded to the slab's dtype. Two threads may write the positions of a pair (2p, 2p + 1).
void write_v(const KvSlab& slab, int64_t position, int head, const float* v);

}  // namespace dllm::ops::cpu
