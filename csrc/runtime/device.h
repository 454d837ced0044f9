// Where a model's memory lies and its work runs. Three implementations: this process's CPU (device.cpp), CUDA
// (runtime/cuda/device.cpp), and CUDA emulated on the CPU, for tests (cuda_emulator/device.cpp).
//
// Work goes into one stream per device, in order. The host does not wait for it unless it says so: synchronize(), or
// wait(mark) for what was submitted before the mark. Neither is called inside a block by the loop on the device, but for
// the mark of the step before the one under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

namespace dllm {

// Work that was recorded once and is submitted as a whole.
class Graph {
 public:
  virtual ~Graph() = default;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual bool is_cpu() const = 0;
  virtual std::string name() const = 0;

  // Aligned to 256 bytes, and not initialised, on a GPU; to 64 bytes, and zero, on the CPU. OutOfMemoryError names `what`
  // and the bytes.
  virtual void* take(size_t bytes, const char* what) = 0;
  virtual void give(void* p) noexcept = 0;
  // Host memory that copy_out can write to while the host goes on.
  virtual void* take_pinned(size_t bytes, const char* what) = 0;
  virtual void give_pinned(void* p) noexcept = 0;

  virtual void* stream() = 0;  // what kernels are launched on (ops::cuda::Stream)
  // Once it returns, the host may change its copy. Not inside capture().
  virtual void copy_in(void* device, const void* host, size_t bytes) = 0;
  virtual void copy_out(void* pinned, const void* device, size_t bytes) = 0;
  virtual void fill_zero(void* device, size_t bytes) = 0;
  virtual void synchronize() = 0;

  using Mark = uint64_t;
  virtual Mark mark() = 0;  // a point in the stream
  virtual void wait(Mark mark) = 0;  // until all work before it is done

  // Records what `work` submits instead of running it; replay() submits that. Addresses and launch sizes are recorded,
  // contents of device memory are not.
  virtual std::unique_ptr<Graph> capture(const std::function<void()>& work) = 0;
  virtual void replay(const Graph& graph) = 0;
};

Device& cpu_device();

// The CUDA device of this build: ConfigError that says why there is none.
std::unique_ptr<Device> make_cuda_device();

// Owned memory of a device.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Device& device, size_t bytes, const char* what)
      : device_(&device), data_(bytes ? device.take(bytes, what) : nullptr), bytes_(bytes) {}
  ~DeviceBuffer() {
    if (data_) device_->give(data_);
  }
  DeviceBuffer(DeviceBuffer&& o) noexcept { *this = std::move(o); }
  DeviceBuffer& operator=(DeviceBuffer&& o) noexcept {
    std::swap(device_, o.device_);
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    return *this;
  }

  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Host memory of copy_out.
template <class T>
class Pinned {
 public:
  Pinned() = default;
  Pinned(Device& device, size_t count, const char* what)
      : device_(&device), data_(count ? static_cast<T*>(device.take_pinned(count * sizeof(T), what)) : nullptr),
        count_(count) {}
  ~Pinned() {
    if (data_) device_->give_pinned(data_);
  }
  Pinned(Pinned&& o) noexcept { *this = std::move(o); }
  Pinned& operator=(Pinned&& o) noexcept {
    std::swap(device_, o.device_);
    std::swap(data_, o.data_);
    std::swap(count_, o.count_);
    return *this;
  }
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  Device* device_ = nullptr;
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace dllm
