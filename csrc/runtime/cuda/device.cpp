// A GPU, through the CUDA runtime and torch's allocator. Nothing here has run on one yet: the same engine runs over the
// emulated device (cuda_emulator/device.cpp) in tests.
#include "runtime/device.h"

#include <ATen/Context.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <array>
#include <chrono>
#include <mutex>
#include <thread>
#include <type_traits>

#include "runtime/cuda/blas.h"
#include "runtime/cuda/check.h"
#include "runtime/cuda/memory.h"
#include "runtime/cuda/probe.h"

namespace dllm {

namespace {

using cuda::check;

struct CapturedWork final : Graph {
  explicit CapturedWork(cudaGraph_t graph) {
    check(cudaGraphInstantiateWithFlags(&executable, graph, 0), "making a graph ready to run");
  }
  ~CapturedWork() override { (void)cudaGraphExecDestroy(executable); }  // after its runs, where some are under way
  cudaGraphExec_t executable = nullptr;
};

// "13.0" of 13000
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

template <class... Parts>
[[noreturn]] void not_available(const Parts&... why) {
  fail<ConfigError>("device = \"cuda\" is not available: ", why..., ", or use device = \"cpu\"");
}

// ConfigError unless there is a GPU that runs this build's kernels.
void require_gpu() {
  int driver = 0, runtime = 0, count = 0;
  (void)cudaDriverGetVersion(&driver);  // 0: there is none
  (void)cudaRuntimeGetVersion(&runtime);
  if (driver == 0) not_available("this machine has no NVIDIA driver; install one for CUDA ", version_text(runtime));
  const cudaError_t e = cudaGetDeviceCount(&count);
  if (e != cudaSuccess) (void)cudaGetLastError();
  if (e == cudaErrorInsufficientDriver)
    not_available("the NVIDIA driver is for CUDA ", version_text(driver), " and torch needs ", version_text(runtime),
                  "; update the driver");
  if (e == cudaErrorNoDevice || (e == cudaSuccess && count == 0))
    not_available("the NVIDIA driver finds no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES");
  if (e != cudaSuccess) not_available("CUDA says: ", cudaGetErrorString(e), "; look at nvidia-smi");
}

void require_kernels(int device) {
  const cudaError_t e = cuda::probe_kernel();
  if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorInvalidDeviceFunction) {
    (void)cudaGetLastError();
    cudaDeviceProp p;
    check(cudaGetDeviceProperties(&p, device), "asking for the GPU's properties");
    not_available("this build's kernels do not run on ", p.name, ", whose compute capability is ", p.major, ".",
                  p.minor,
                  " (8.0 or newer is needed); build dllm_ext with TORCH_CUDA_ARCH_LIST unset, or with that in it");
  }
  check(e, "loading a kernel");
}

// Graphs cannot be captured on the default stream. Where the caller chose another one in torch, that is it.
c10::cuda::CUDAStream choose_stream() {
  const auto current = c10::cuda::getCurrentCUDAStream();
  return current == c10::cuda::getDefaultCUDAStream() ? c10::cuda::getStreamFromPool() : current;
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(const c10::cuda::CUDAStream& stream) : stream_(stream), index_(stream.device_index()) {
    make_current();
    require_kernels(index_);
    blas_ = cuda::blas_workspace(stream_);
    cudaDeviceProp p;
    check(cudaGetDeviceProperties(&p, index_), "asking for the GPU's properties");
    name_ = "cuda:" + std::to_string(index_) + " (" + p.name + ")";
    // A GPU that can read the host's pages (Grace Hopper; where Linux manages both memories, others too) need not stage
    // what copy_in() gives it.
    int reads_host_pages = 0;
    check(cudaDeviceGetAttribute(&reads_host_pages, cudaDevAttrPageableMemoryAccess, index_),
          "asking for the GPU's properties");
    stages_copies_ = !reads_host_pages;
    for (Event& e : events_) e.create();
  }

  bool is_cpu() const override { return false; }
  std::string name() const override { return name_; }

  void* take(size_t bytes, const char* what) override {
    make_current();
    return cuda::take_memory(stream_, bytes, what);
  }
  void give(void* p) noexcept override { cuda::give_memory(p); }
  void* take_pinned(size_t bytes, const char* what) override {
    make_current();
    void* p = nullptr;
    const cudaError_t e = cudaHostAlloc(&p, bytes, cudaHostAllocDefault);
    if (e == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      fail<OutOfMemoryError>("out of memory: ", what, " asked for ", bytes, " bytes of pinned memory");
    }
    check(e, "taking pinned memory");
    return p;
  }
  void give_pinned(void* p) noexcept override { (void)cudaFreeHost(p); }

  void* stream() override {
    make_current();
    return stream_;
  }

  // The host's copy is pageable memory everywhere in the engine. CUDA first copies that into memory of its own, and
  // returns no sooner ("API synchronization behavior" in its manual); it may wait for earlier work of the stream.
  void copy_in(void* device, const void* host, size_t bytes) override {
    if (capturing_) fail<UsageError>("copy_in inside capture(): the graph would keep this copy's data");
    if (bytes == 0) return;
    make_current();
    check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_), "copying to the GPU");
    if (!stages_copies_) synchronize();
  }
  void copy_out(void* pinned, const void* device, size_t bytes) override {
    if (bytes == 0) return;
    make_current();
    check(cudaMemcpyAsync(pinned, device, bytes, cudaMemcpyDeviceToHost, stream_), "copying from the GPU");
  }
  void fill_zero(void* device, size_t bytes) override {
    if (bytes == 0) return;
    make_current();
    check(cudaMemsetAsync(device, 0, bytes, stream_), "filling memory");
  }
  void synchronize() override {
    make_current();
    check(cudaStreamSynchronize(stream_), "waiting for the GPU");
  }

  Mark mark() override {
    make_current();
    ++marks_;
    check(cudaEventRecord(event(marks_), stream_), "recording an event");
    return marks_;
  }
  // By looking again and again with a pause between. CUDA's own wait spins, and the core that it keeps busy may be one
  // that torch's threads want; or it sleeps until an interrupt (cudaEventBlockingSync), which comes no sooner than a
  // short pause ends. The pause costs nothing: the GPU has the next step already. An event that since served a later
  // mark makes this wait longer than it must, never shorter.
  void wait(Mark mark) override {
    make_current();
    for (;;) {
      const cudaError_t e = cudaEventQuery(event(mark));
      if (e != cudaErrorNotReady) return check(e, "waiting for a step");
      (void)cudaGetLastError();  // "not ready" is an answer
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  std::unique_ptr<Graph> capture(const std::function<void()>& work) override {
    make_current();
    {
      const std::lock_guard lock(blas_->submitting);
      (void)blas_->handle();
    }
    // ThreadLocal: what other threads do with CUDA meanwhile, torch's allocator for one, stays allowed.
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "beginning a capture");
    capturing_ = true;
    cudaGraph_t graph = nullptr;
    try {
      work();
    } catch (...) {
      capturing_ = false;
      if (cudaStreamEndCapture(stream_, &graph) == cudaSuccess && graph) (void)cudaGraphDestroy(graph);
      (void)cudaGetLastError();
      throw;
    }
    capturing_ = false;
    check(cudaStreamEndCapture(stream_, &graph), "ending a capture");
    const std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, decltype(&cudaGraphDestroy)> owner(graph,
                                                                                                 cudaGraphDestroy);
    return std::make_unique<CapturedWork>(graph);
  }
  void replay(const Graph& graph) override {
    make_current();
    check(cudaGraphLaunch(static_cast<const CapturedWork&>(graph).executable, stream_), "launching a graph");
  }

 private:
  struct Event {
    void create() { check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event"); }
    ~Event() {
      if (event) (void)cudaEventDestroy(event);
    }
    cudaEvent_t event = nullptr;
  };

  cudaEvent_t event(Mark mark) const { return events_[mark % events_.size()].event; }
  // Kernels can be launched only on the calling thread's current device. It stays ours afterwards: where there are
  // several GPUs, a caller who has chosen another one in torch has to choose it again.
  void make_current() const { check(cudaSetDevice(index_), "choosing the GPU"); }

  cudaStream_t stream_;
  int index_;
  std::shared_ptr<cuda::BlasWorkspace> blas_;
  std::string name_;
  bool stages_copies_ = true, capturing_ = false;
  std::array<Event, 8> events_;  // more than the loop has steps under way
  Mark marks_ = 0;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device() {
  require_gpu();
  try {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);  // torch's allocator, as the first tensor on CUDA would
    return std::make_unique<CudaDevice>(choose_stream());
  } catch (const c10::Error& e) {
    not_available("torch says: ", e.what_without_backtrace(), "; look at nvidia-smi");
  }
}

}  // namespace dllm
