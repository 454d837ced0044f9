#include "bindings/interrupt.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace dllm {

namespace {
std::atomic<bool> interrupted;
struct sigaction previous;
int depth = 0;  // of guards in the main thread: on_step may call generate() of another engine

void on_sigint(int signal) {
  interrupted = true;
  previous.sa_handler(signal);
}
}  // namespace

InterruptGuard::InterruptGuard() {
  if (::syscall(SYS_gettid) != ::getpid()) return;
  if (depth == 0) {
    if (::sigaction(SIGINT, nullptr, &previous) != 0) return;
    const bool chainable =
        !(previous.sa_flags & SA_SIGINFO) && previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN;
    if (!chainable) return;
    interrupted = false;
    struct sigaction ours = previous;
    ours.sa_handler = on_sigint;
    if (::sigaction(SIGINT, &ours, nullptr) != 0) return;
  }
  installed_ = true;
  ++depth;
}

InterruptGuard::~InterruptGuard() {
  if (installed_ && --depth == 0) ::sigaction(SIGINT, &previous, nullptr);
}

const std::atomic<bool>* InterruptGuard::flag() const { return installed_ ? &interrupted : nullptr; }

}  // namespace dllm
