#include "runtime/parallel.h"

#include <ATen/Parallel.h>

namespace dllm {

void detail::parallel_for(int64_t n, int64_t grain, RangeFn fn, void* ctx) {
  at::parallel_for(0, n, grain, [&](int64_t b, int64_t e) { fn(ctx, b, e); });
}

int num_threads() {
  at::internal::lazy_init_num_threads();
  return at::get_num_threads();
}

int thread_index() { return at::get_thread_num(); }

}  // namespace dllm
