// Memory that cuBLAS works in, one piece for a stream.
//
// ATen gives its handle a workspace too, but may take it away: torch.compile's CUDA graphs free all of them. A graph of
// ours has the workspace's address in it, so it must stay as long as our graphs do.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <mutex>

namespace dllm::cuda {

class BlasWorkspace {
 public:
  BlasWorkspace(cudaStream_t stream, size_t bytes);
  ~BlasWorkspace();
  BlasWorkspace(const BlasWorkspace&) = delete;
  BlasWorkspace& operator=(const BlasWorkspace&) = delete;

  // Puts the calling thread's handle, ATen's, into working order for this stream, workspace included. Before a capture:
  // a thread's first handle is made with calls that a capture does not allow.
  void* handle();  // a cublasHandle_t

  // Held while a product is submitted: it may be several kernels with sums in the workspace between them, and another
  // thread's on the same stream must not come in between.
  std::mutex submitting;

 private:
  cudaStream_t stream_;
  size_t bytes_;
  void* memory_;
};

// The stream's, made where there is none. Devices on one stream share it; the last one that goes gives it back.
std::shared_ptr<BlasWorkspace> blas_workspace(cudaStream_t stream);

}  // namespace dllm::cuda
