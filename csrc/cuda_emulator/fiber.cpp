#include "cuda_emulator/fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what a call must preserve on the old stack, and takes it from the new one.
extern "C" void dllm_emu_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.type dllm_emu_switch, @function
dllm_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dllm_emu_switch, .-dllm_emu_switch
)");
#endif

namespace dllm::emu {
namespace {

constexpr size_t kGuard = 4096;
constexpr size_t kSlot = Fiber::kStackBytes + kGuard;

// All stacks lie in one range, each behind a page that faults. Pages cost memory when they are first used.
struct Stacks {
  char* base = nullptr;
  int n = 0;

  char* take() {
    if (!base) {
      void* p = mmap(nullptr, kSlot * Fiber::kMost, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      base = static_cast<char*>(p);
    }
    if (n == Fiber::kMost) throw std::bad_alloc();
    char* stack = base + kSlot * size_t(n++) + kGuard;
    if (mprotect(stack, Fiber::kStackBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    return stack;
  }
};
Stacks stacks;

Fiber* running = nullptr;   // the fiber that is being switched to
Fiber* previous = nullptr;  // where the switch came from

}  // namespace

Fiber::Fiber(void (*main)()) : main_(main), stack_(stacks.take()), stack_bytes_(kStackBytes) { restart(); }

void Fiber::restart() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, stack_bytes_);  // red zones of frames that were dropped
#endif
  fake_stack_ = nullptr;
#if defined(__x86_64__)
  void** sp = reinterpret_cast<void**>(stack_ + stack_bytes_ - 64);
  *--sp = nullptr;  // where entry() would return to; a debugger's trace ends there
  *--sp = reinterpret_cast<void*>(&Fiber::entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  sp_ = sp;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::entry, 0);
#endif
}

void Fiber::entry() {
  arrived();
  running->main_();
}

// First thing on a stack after a switch to it.
void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(running->fake_stack_, &bottom, &bytes);
  if (!previous->main_) {  // a thread's own stack: learned here
    previous->stack_ = static_cast<char*>(const_cast<void*>(bottom));
    previous->stack_bytes_ = bytes;
  }
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  previous = &from;
  running = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
#if defined(__x86_64__)
  dllm_emu_switch(&from.sp_, to.sp_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
  arrived();
}

bool Fiber::on_a_stack(const void* p) { return p >= stacks.base && p < stacks.base + kSlot * size_t(stacks.n); }

}  // namespace dllm::emu
