#include "cuda_emulator/device.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "runtime/device.h"

namespace dllm {

namespace {

emu::Queue::Mode queue_mode = emu::Queue::Mode::Lazy;
emu::Queue* newest = nullptr;

struct CapturedWork final : Graph {
  explicit CapturedWork(emu::Graph g) : graph(std::move(g)) {}
  emu::Graph graph;
};

class EmulatedDevice final : public Device {
 public:
  EmulatedDevice() : queue_(queue_mode) { newest = &queue_; }
  ~EmulatedDevice() override {
    if (newest == &queue_) newest = nullptr;
  }

  bool is_cpu() const override { return false; }
  std::string name() const override { return "cuda (emulated on the CPU)"; }

  void* take(size_t bytes, const char* what) override {
    void* p = emu::arena().take(bytes);
    if (!p) fail<OutOfMemoryError>("out of memory: ", what, " asked for ", bytes, " bytes of device memory");
    return p;
  }
  void give(void* p) noexcept override { emu::arena().give(p); }
  void* take_pinned(size_t bytes, const char* what) override {
    void* p = std::malloc(bytes);
    if (!p) fail<OutOfMemoryError>("out of memory: ", what, " asked for ", bytes, " bytes of pinned memory");
    std::memset(p, 0xFF, bytes);
    return p;
  }
  void give_pinned(void* p) noexcept override { std::free(p); }

  void* stream() override { return &queue_; }
  void copy_in(void* device, const void* host, size_t bytes) override {
    if (queue_.capturing()) fail<UsageError>("copy_in inside capture(): the graph would keep this copy's data");
    std::vector<char> staged(static_cast<const char*>(host), static_cast<const char*>(host) + bytes);
    queue_.push("copy_in", emu::Kind::CopyIn,
                [device, staged = std::move(staged)] { emu::copy(device, staged.data(), staged.size()); });
  }
  void copy_out(void* pinned, const void* device, size_t bytes) override {
    queue_.push("copy_out", emu::Kind::CopyOut, [=] { emu::copy(pinned, device, bytes); });
  }
  void fill_zero(void* device, size_t bytes) override {
    queue_.push("fill_zero", emu::Kind::Fill, [=] { emu::fill(device, 0, bytes); });
  }
  void synchronize() override { queue_.synchronize(); }
  Mark mark() override { return queue_.submitted(); }
  void wait(Mark mark) override { queue_.run_until(mark); }

  std::unique_ptr<Graph> capture(const std::function<void()>& work) override {
    queue_.begin_capture();
    try {
      work();
    } catch (...) {
      queue_.end_capture();
      throw;
    }
    return std::make_unique<CapturedWork>(queue_.end_capture());
  }
  void replay(const Graph& graph) override { queue_.replay(static_cast<const CapturedWork&>(graph).graph); }

 private:
  emu::Queue queue_;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device() { return std::make_unique<EmulatedDevice>(); }

namespace emu {
void set_queue_mode(Queue::Mode mode) { queue_mode = mode; }
Queue* last_queue() { return newest; }
}  // namespace emu

}  // namespace dllm
