// Choice by one block: the k largest of n keys, ties to the lowest index, without sorting and without touching an index
// twice. The result depends on the keys alone. For device code; every thread of the block calls these functions, with the
// same n, k and scratch.
//
//   DLLM_SHARED(SelectScratch, scratch, );
//   mark_largest<1024>(n, k, [&](int i) { return ordered_key(score[i]); }, [&](int i) { chosen[i] = 1; }, scratch);
//
// Keys are unsigned integers; ordered_key gives one to a float or double, ~ordered_key(x) orders from the smallest. key(i)
// is called several times for every i, always by thread i % (threads of the block): what that thread wrote itself it may
// read without a barrier. mark(i) is called once for every chosen i, by the same thread. There is no barrier after the
// last mark.
//
// The k-th key is found by its digits of 8 bits, highest first: a histogram of the digit over the keys that share all
// higher digits, and the bin in which the k-th falls. It ends early where the whole of a bin is chosen. A pass reads the
// keys once (from L1 or L2 after the first time); at most 8 passes for 64 bits, and one more that marks.
#pragma once

#include <climits>
#include <cstdint>

#include "ops/cuda/kernel.h"

namespace dllm::ops::cuda {

struct SelectScratch {
  int histogram[256];
  int totals[32];  // of warps
  int digit, before, size;  // the bin found, how many keys lie above it and in it
};

// The order of the numbers as that of integers; -0 equals 0. Not for NaN: the caller says where it belongs.
DLLM_DEVICE uint64_t ordered_key(double x) {
  const double y = x + 0.0;  // makes -0 0
  uint64_t bits;
  memcpy(&bits, &y, 8);
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}
DLLM_DEVICE uint32_t ordered_key(float x) {
  const float y = x + 0.0f;
  uint32_t bits;
  memcpy(&bits, &y, 4);
  return bits >> 31 ? ~bits : bits | uint32_t(1) << 31;
}

// How many threads before this one say yes, and in `total` how many of the block do. kThreads is a multiple of 32.
template <int kThreads>
DLLM_DEVICE int count_before(bool flag, int& total, SelectScratch& s) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned votes = __ballot_sync(cu::kAllLanes, flag);
  if (lane == 0) s.totals[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1));
  total = 0;
  for (unsigned w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += s.totals[w];
    total += s.totals[w];
  }
  __syncthreads();  // totals may be written again
  return before;
}

// Chosen are the keys above `key`, and the first `ties` of those equal to it.
template <class Key>
struct Threshold {
  Key key;
  int ties;
};

// Of the k largest keys(i), i < n.
template <int kThreads, class KeyOf>
DLLM_DEVICE auto find_threshold(int n, int k, KeyOf&& key_of, SelectScratch& s) {
  using Key = decltype(key_of(0));
  static_assert(Key(-1) > Key(0), "keys are unsigned");
  if (k <= 0) return Threshold<Key>{Key(-1), 0};
  if (k >= n) return Threshold<Key>{Key(0), INT_MAX};
  const int thread = int(threadIdx.x), lane = thread % 32;
  Key found = 0, known = 0;  // the digits of the k-th key that are known, and the mask of these
  for (int shift = int(sizeof(Key)) * 8 - 8; shift >= 0; shift -= 8) {
    for (int i = thread; i < 256; i += kThreads) s.histogram[i] = 0;
    __syncthreads();
    for (int base = 0; base < n; base += kThreads) {
      const int i = base + thread;
      const Key key = i < n ? key_of(i) : Key(0);
      const bool candidate = i < n && (key & known) == found;
      const int digit = int(key >> shift & 255);
      const unsigned candidates = __ballot_sync(cu::kAllLanes, candidate);
      if (candidates == 0) continue;
      // Similar numbers share their leading digits. Adding one by one to a single counter, a warp would wait 32 times.
      const int leader = __ffs(int(candidates)) - 1, its_digit = __shfl_sync(cu::kAllLanes, digit, leader);
      const bool alike = __all_sync(cu::kAllLanes, !candidate || digit == its_digit);
      if (alike ? lane == leader : candidate) atomicAdd(&s.histogram[digit], alike ? __popc(candidates) : 1);
    }
    __syncthreads();
    if (thread < 32) {  // eight bins per lane, from the highest
      const int* bins = s.histogram + 248 - 8 * lane;
      int sum = 0;
      for (int j = 7; j >= 0; --j) sum += bins[j];
      int upto = sum;
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(cu::kAllLanes, upto, offset);
        if (lane >= offset) upto += other;
      }
      if (upto - sum < k && k <= upto) {  // one lane
        int before = upto - sum, j = 7;
        while (before + bins[j] < k) before += bins[j--];
        s.digit = 248 - 8 * lane + j;
        s.before = before;
        s.size = bins[j];
      }
    }
    __syncthreads();
    found |= Key(s.digit) << shift;
    known |= Key(255) << shift;
    k -= s.before;
    if (k == s.size) return Threshold<Key>{found, INT_MAX};  // with all lower digits
  }
  return Threshold<Key>{found, k};
}

template <int kThreads, class KeyOf, class Mark>
DLLM_DEVICE void mark_largest(int n, int k, KeyOf&& key_of, Mark&& mark, SelectScratch& s) {
  const auto threshold = find_threshold<kThreads>(n, k, key_of, s);
  int ties_before = 0;
  for (int base = 0; base < n; base += kThreads) {
    const int i = base + int(threadIdx.x);
    const auto key = i < n ? key_of(i) : decltype(key_of(0))(0);
    const bool tie = i < n && key == threshold.key;
    int ties;
    const int rank = ties_before + count_before<kThreads>(tie, ties, s);
    ties_before += ties;
    if (i < n && (key > threshold.key || (tie && rank < threshold.ties))) mark(i);
  }
}

}  // namespace dllm::ops::cuda
