// What the CUDA runtime reports becomes one of our exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include "runtime/error.h"

namespace dllm::cuda {

// check(cudaStreamSynchronize(stream), "waiting for the GPU")
inline void check(cudaError_t e, const char* doing) {
  if (e == cudaSuccess) return;
  (void)cudaGetLastError();  // it is reported here, and not once more after the next kernel's launch
  if (e == cudaErrorMemoryAllocation) fail<OutOfMemoryError>("out of memory: CUDA, ", doing);
  fail<Error>("CUDA, ", doing, ": ", cudaGetErrorString(e), " (", cudaGetErrorName(e), ")");
}

}  // namespace dllm::cuda
