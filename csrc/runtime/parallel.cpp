#include "runtime/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace dllm {
namespace {

// A thread's part of the ranges. Each has its cache line: its owner claims from it undisturbed until others come to help.
struct alignas(64) Part {
  std::atomic<int64_t> next;
  int64_t end;
};
constexpr int64_t kParts = 64;  // most of them; more threads than that begin as helpers

}  // namespace

void detail::parallel_for(int64_t n, int64_t grain, RangeFn fn, void* ctx) {
  if (n <= 0) return;
  grain = std::max<int64_t>(1, grain);
  const int64_t ranges = (n + grain - 1) / grain, threads = std::min<int64_t>(num_threads(), ranges);
  const int64_t parts = std::min(threads, kParts);
  Part part[kParts];
  for (int64_t p = 0; p < parts; ++p) {
    part[p].next.store(ranges * p / parts, std::memory_order_relaxed);
    part[p].end = ranges * (p + 1) / parts;
  }
  std::atomic<bool> failed{false};
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    if (last - first == threads) return fn(ctx, 0, n);
    try {
      for (int64_t p = 0; p < parts; ++p) {
        Part& from = part[(first + p) % parts];
        while (from.next.load(std::memory_order_relaxed) < from.end && !failed.load(std::memory_order_relaxed)) {
          const int64_t range = from.next.fetch_add(1, std::memory_order_relaxed);
          if (range < from.end) fn(ctx, range * grain, std::min(n, (range + 1) * grain));
        }
      }
    } catch (...) {
      failed.store(true, std::memory_order_relaxed);
      throw;
    }
  });
}

int num_threads() {
  at::internal::lazy_init_num_threads();
  return at::get_num_threads();
}

void set_num_threads(int n) { at::set_num_threads(n); }

int thread_index() { return at::get_thread_num(); }

}  // namespace dllm
