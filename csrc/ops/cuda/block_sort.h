// Sorting by one block, for device code.
#pragma once

#include <cstdint>

#include "ops/cuda/kernel.h"

namespace dllm::ops::cuda {

// keys[0 .. n) falling; n a power of two. Batcher's bitonic network. Every thread of the block calls it; barriers lie
// before the first access and after the last.
template <int kThreads>
DLLM_DEVICE void sort_falling(uint64_t* keys, int n) {
  __syncthreads();
  for (int run = 2; run <= n; run *= 2)
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int i = int(threadIdx.x); i < n / 2; i += kThreads) {
        const int low = 2 * stride * (i / stride) + i % stride, high = low + stride;
        const uint64_t a = keys[low], b = keys[high];
        const bool falling = (low & run) == 0;
        if (falling ? a < b : a > b) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      __syncthreads();
    }
}

}  // namespace dllm::ops::cuda
