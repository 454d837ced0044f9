// Stacks, and the switch between them. One fiber runs until it switches to another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace dllm::emu {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;
  static constexpr int kMost = 1100;  // of fibers with their own stack

  Fiber() = default;  // the thread that calls switch_to() with it
  // A fiber that runs main() on its own stack; main() does not return.
  explicit Fiber(void (*main)());
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Forgets what ran here: the next switch to it starts main() anew. What lived on the stack is not destroyed.
  void restart();

  // Goes on in `to`; returns when something switches back to `from`, the fiber of the caller.
  static void switch_to(Fiber& from, Fiber& to);

  // Whether p lies on the stack of some fiber.
  static bool on_a_stack(const void* p);

 private:
  static void entry();
  static void arrived();

  void (*main_)() = nullptr;
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;  // ASan's
#if defined(__x86_64__)
  void* sp_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace dllm::emu
