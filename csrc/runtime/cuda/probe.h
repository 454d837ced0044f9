// Whether this build's kernels run on the current GPU.
#pragma once

#include <cuda_runtime_api.h>

namespace dllm::cuda {

// cudaErrorNoKernelImageForDevice where nothing was compiled for its architecture, nor PTX that it could compile.
cudaError_t probe_kernel();

}  // namespace dllm::cuda
