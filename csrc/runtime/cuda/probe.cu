#include "runtime/cuda/probe.h"

namespace dllm::cuda {

static __global__ void probe() {}

cudaError_t probe_kernel() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe);
}

}  // namespace dllm::cuda
