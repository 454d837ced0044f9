#include "runtime/cuda/blas.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAGuard.h>
#include <cublas_v2.h>

#include <unordered_map>

#include "runtime/cuda/check.h"
#include "runtime/cuda/memory.h"

namespace dllm::cuda {

namespace {

// NVIDIA's advice: 32 MiB from Hopper on, 4 MiB before (cuBLAS, cublasSetWorkspace).
size_t advised_bytes() { return size_t(at::cuda::getCurrentDeviceProperties()->major >= 9 ? 32 : 4) << 20; }

}  // namespace

BlasWorkspace::BlasWorkspace(cudaStream_t stream, size_t bytes)
    : stream_(stream), bytes_(bytes), memory_(take_memory(stream, bytes, "cuBLAS")) {}

BlasWorkspace::~BlasWorkspace() { give_memory(memory_); }

void* BlasWorkspace::handle() {
  try {
    const auto stream = c10::cuda::getStreamFromExternal(stream_, c10::cuda::current_device());
    const c10::cuda::CUDAStreamGuard guard(stream);
    const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();  // now on the stream, with ATen's workspace
    // What torch computes later is not affected: it sets its own workspace whenever it asks for the handle.
    if (cublasSetWorkspace(handle, memory_, bytes_) != CUBLAS_STATUS_SUCCESS)
      fail<Error>("cuBLAS does not take a workspace of ", bytes_, " bytes");
    return handle;
  } catch (const c10::OutOfMemoryError&) {
    fail<OutOfMemoryError>("out of memory: cuBLAS found no device memory to start with");
  } catch (const c10::Error& e) {
    fail<Error>("cuBLAS did not start: ", e.what_without_backtrace());
  }
}

std::shared_ptr<BlasWorkspace> blas_workspace(cudaStream_t stream) {
  static std::mutex mutex;
  static std::unordered_map<cudaStream_t, std::weak_ptr<BlasWorkspace>> workspaces;
  const std::lock_guard lock(mutex);
  std::weak_ptr<BlasWorkspace>& known = workspaces[stream];
  std::shared_ptr<BlasWorkspace> workspace = known.lock();
  if (!workspace) {
    workspace = std::make_shared<BlasWorkspace>(stream, advised_bytes());
    known = workspace;
  }
  return workspace;
}

}  // namespace dllm::cuda
