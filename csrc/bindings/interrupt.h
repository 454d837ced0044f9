// Ctrl-C during a native call that has released the GIL. Python's own SIGINT handler only leaves a note for the
// interpreter, which is not running then; this one also raises a flag that the loop polls, without touching the GIL.
#pragma once

#include <atomic>
#include <csignal>

namespace dllm {

class InterruptGuard {
 public:
  InterruptGuard();   // does nothing outside the main thread, or where SIGINT has no handler to chain to
  ~InterruptGuard();  // the outermost one restores the handler
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  const std::atomic<bool>* flag() const;

 private:
  bool installed_ = false;
};

}  // namespace dllm
