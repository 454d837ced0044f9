#include "runtime/device.h"

#include <cstdlib>
#include <cstring>

#include "runtime/buffer.h"

namespace dllm {

namespace {

struct Recorded final : Graph {
  explicit Recorded(std::function<void()> w) : work(std::move(w)) {}
  std::function<void()> work;
};

// Everything is done when it is asked for.
class CpuDevice final : public Device {
 public:
  bool is_cpu() const override { return true; }
  std::string name() const override { return "cpu"; }

  void* take(size_t bytes, const char* what) override { return take_memory(bytes, what); }
  void give(void* p) noexcept override { std::free(p); }
  void* take_pinned(size_t bytes, const char* what) override { return take_memory(bytes, what); }
  void give_pinned(void* p) noexcept override { std::free(p); }

  void* stream() override { return nullptr; }
  void copy_in(void* device, const void* host, size_t bytes) override { std::memcpy(device, host, bytes); }
  void copy_out(void* pinned, const void* device, size_t bytes) override { std::memcpy(pinned, device, bytes); }
  void fill_zero(void* device, size_t bytes) override { std::memset(device, 0, bytes); }
  void synchronize() override {}
  Mark mark() override { return 0; }
  void wait(Mark) override {}

  std::unique_ptr<Graph> capture(const std::function<void()>& work) override {
    return std::make_unique<Recorded>(work);
  }
  void replay(const Graph& graph) override { static_cast<const Recorded&>(graph).work(); }
};

}  // namespace

Device& cpu_device() {
  static CpuDevice device;
  return device;
}

}  // namespace dllm
