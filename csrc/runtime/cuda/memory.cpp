#include "runtime/cuda/memory.h"

#include <c10/cuda/CUDACachingAllocator.h>

#include "runtime/cuda/check.h"

namespace dllm::cuda {

void* take_memory(cudaStream_t stream, size_t bytes, const char* what) {
  try {
    return c10::cuda::CUDACachingAllocator::raw_alloc_with_stream(bytes, stream);
  } catch (const c10::OutOfMemoryError&) {
    (void)cudaGetLastError();
    size_t free = 0, total = 0;
    (void)cudaMemGetInfo(&free, &total);
    fail<OutOfMemoryError>("out of memory: ", what, " asked for ", bytes, " bytes of device memory (", free, " of ",
                           total, " are free)");
  } catch (const c10::Error& e) {
    fail<Error>("CUDA, taking ", bytes, " bytes for ", what, ": ", e.what_without_backtrace());
  }
}

void give_memory(void* p) noexcept {
  try {
    c10::cuda::CUDACachingAllocator::raw_delete(p);
  } catch (...) {  // at the process's end the driver may be gone before us, and the memory with it
  }
}

}  // namespace dllm::cuda
