// Threads: torch's own pool, so that torch.set_num_threads() and OMP_NUM_THREADS hold here too.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dllm {

namespace detail {
using RangeFn = void (*)(void* ctx, int64_t begin, int64_t end);
void parallel_for(int64_t n, int64_t grain, RangeFn fn, void* ctx);
}  // namespace detail

int num_threads();
void set_num_threads(int n);  // as torch.set_num_threads()
int thread_index();  // 0 .. num_threads() - 1 inside parallel_for

// Calls f(begin, end) on disjoint ranges that cover [0, n). Several threads share ranges of `grain` items (the last may be
// shorter): each works through its own equal part of [0, n), then takes what others have not begun. So f runs many times
// per thread, and which thread gets which range must never influence a result. One call f(0, n) is made where there is
// nobody to share with: one thread, no more than one range, or a loop inside another.
// An exception of f ends the loop early and is thrown here.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  using Fn = std::remove_reference_t<F>;
  detail::parallel_for(
      n, grain, [](void* ctx, int64_t b, int64_t e) { (*static_cast<Fn*>(ctx))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace dllm
