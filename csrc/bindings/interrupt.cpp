#include "bindings/interrupt.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace dllm {

namespace {
std::atomic<bool> interrupted;
struct sigaction previous;

void on_sigint(int signal) {
  interrupted = true;
  previous.sa_handler(signal);
}
}  // namespace

InterruptGuard::InterruptGuard() {
  interrupted = false;
  if (::syscall(SYS_gettid) != ::getpid()) return;
  if (::sigaction(SIGINT, nullptr, &previous) != 0) return;
  const bool chainable =
      !(previous.sa_flags & SA_SIGINFO) && previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN;
  if (!chainable) return;
  struct sigaction ours = previous;
  ours.sa_handler = on_sigint;
  installed_ = ::sigaction(SIGINT, &ours, nullptr) == 0;
}

InterruptGuard::~InterruptGuard() {
  if (installed_) ::sigaction(SIGINT, &previous, nullptr);
}

const std::atomic<bool>* InterruptGuard::flag() const { return installed_ ? &interrupted : nullptr; }

}  // namespace dllm
