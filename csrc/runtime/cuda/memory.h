// Memory of torch's caching allocator, so that torch and dllm_ext share one pool. What is given back serves later work
// of the same stream at once, without a wait for the GPU: the stream's order makes that right.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace dllm::cuda {

// On the calling thread's current device.
void* take_memory(cudaStream_t stream, size_t bytes, const char* what);
void give_memory(void* p) noexcept;

}  // namespace dllm::cuda
