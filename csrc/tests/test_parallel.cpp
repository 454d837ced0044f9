// parallel_for: every item once, on whatever number of threads.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <utility>
#include <vector>

#include "runtime/parallel.h"
#include "tests/check.h"
#include "tests/threads.h"

using namespace dllm;
using test::Threads;

namespace {

using Range = std::pair<int64_t, int64_t>;

std::vector<Range> ranges_of(int64_t n, int64_t grain) {
  std::mutex mutex;
  std::vector<Range> ranges;
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    CHECK(thread_index() >= 0 && thread_index() < num_threads());
    const std::lock_guard lock(mutex);
    ranges.emplace_back(begin, end);
  });
  std::sort(ranges.begin(), ranges.end());
  return ranges;
}

}  // namespace

TEST(parallel_for_covers_every_item_once_in_ranges_of_the_grain) {
  for (int threads : {1, 2, 3, 5, 70}) {
    const Threads set(threads);
    for (int64_t n : {0, 1, 2, 5, 63, 64, 65, 1000})
      for (int64_t grain : {0, 1, 3, 64, 1000}) {
        const std::vector<Range> ranges = ranges_of(n, grain);
        int64_t next = 0;
        for (const auto& [begin, end] : ranges) {
          CHECK_EQ(begin, next);
          if (ranges.size() > 1) CHECK_EQ(end, std::min(n, begin + std::max<int64_t>(1, grain)));
          next = end;
        }
        CHECK_EQ(next, n);
        if (threads == 1 || n <= grain) CHECK(ranges.size() <= 1);
      }
  }
}

// Item 0 waits for all the others: they are done only if somebody else takes those of its thread.
TEST(a_thread_that_is_held_up_loses_its_items_to_the_others) {
  constexpr int64_t kItems = 100;
  for (int threads : {2, 5}) {
    const Threads set(threads);
    std::atomic<int64_t> done{0};
    parallel_for(kItems, 1, [&](int64_t begin, int64_t end) {
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (begin == 0 && done < kItems - 1 && std::chrono::steady_clock::now() < deadline) {
      }
      if (begin == 0) CHECK_EQ(done.load(), kItems - 1);
      done += end - begin;
    });
    CHECK_EQ(done.load(), kItems);
  }
}

TEST(a_loop_inside_a_loop_stays_on_its_thread) {
  const Threads set(3);
  std::atomic<int64_t> items{0};
  parallel_for(20, 1, [&](int64_t, int64_t) {
    int calls = 0;
    parallel_for(50, 1, [&](int64_t begin, int64_t end) {
      ++calls;
      items += end - begin;
    });
    CHECK_EQ(calls, 1);
  });
  CHECK_EQ(items.load(), 20 * 50);
}

TEST(an_exception_ends_the_loop_and_the_next_one_runs) {
  for (int threads : {1, 2, 5}) {
    const Threads set(threads);
    for (int64_t bad : {0, 57, 99})
      CHECK_THROWS(std::runtime_error, "item", parallel_for(100, 1, [&](int64_t begin, int64_t end) {
                     if (begin <= bad && bad < end) throw std::runtime_error("item");
                   }));
    CHECK_THROWS(std::runtime_error, "all",
                 parallel_for(100, 1, [](int64_t, int64_t) { throw std::runtime_error("all"); }));
    CHECK_EQ(ranges_of(100, 10).back().second, 100);
  }
}
