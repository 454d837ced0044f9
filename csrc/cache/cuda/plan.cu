// One block per sequence. What is touched is small (a few bytes per position) and stays in L2; the time is that of some
// dozen barriers. d2Cache sorts the importance of its positions, in shared memory up to kSharedSlots of them.
#include "cache/cuda/plan.h"

#include "decode/cuda/density.h"
#include "ops/cuda/block_select.h"
#include "ops/cuda/block_sort.h"
#include "ops/cuda/kernel.h"

namespace dllm::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kPackThreads = 256;
constexpr int kSharedSlots = 8192;  // 64 KiB

using ops::cuda::count_before;
using ops::cuda::SelectScratch;

// Calls f(p) for every position, all threads of the block together, in the same number of turns: f may hold barriers, and is
// called with -1 where a thread has no position left.
template <int N, class F>
DLLM_DEVICE void for_each_position(int length, F&& f) {
  for (int base = 0; base < length; base += N) {
    const int p = base + int(threadIdx.x);
    f(p < length ? p : -1);
  }
}

// The positions for which `wanted` holds, ascending; returns how many.
template <int N, class Wanted, class Store>
DLLM_DEVICE int list_positions(int length, SelectScratch& scratch, Wanted&& wanted, Store&& store) {
  int count = 0;
  for_each_position<N>(length, [&](int p) {
    const bool take = p >= 0 && wanted(p);
    int total;
    const int before = count_before<N>(take, total, scratch);
    if (take) store(count + before, p);
    count += total;
  });
  return count;
}

template <class F>
DLLM_DEVICE int count_positions(int length, F&& wanted) {
  int count = 0;
  for_each_position<kThreads>(length, [&](int p) { count += __syncthreads_count(p >= 0 && wanted(p)); });
  return count;
}

DLLM_DEVICE double sum_block(double x, double* scratch) {
  x = cu::sum_warp(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  const double sum = cu::sum_warp(threadIdx.x % 32 < kThreads / 32 ? scratch[threadIdx.x % 32] : 0.0);
  __syncthreads();
  return sum;
}

// Moves q (every thread's copy) on to the next block with something to decide; false where there is none.
DLLM_DEVICE bool advance(SequenceState& q) {
  for (;;) {
    if (q.block >= 0 && count_positions(q.length, [&](int p) { return q.eligible(p); }) > 0) return true;
    if (q.block + 1 >= q.n_blocks) return false;
    ++q.block;
    const int64_t begin = int64_t(q.prompt_length) + int64_t(q.block) * q.block_length, end = begin + q.block_length;
    q.block_begin = int32_t(begin < q.length ? begin : q.length);
    q.block_end = int32_t(end < q.length ? end : q.length);
    q.step_in_block = 0;
    q.masked_at_start = count_positions(q.length, [&](int p) { return q.in_block(p) && (q.flags[p] & kMasked); });
  }
}

// d2Cache: the current_k best masked positions, the current block's first, then by certainty x density, then by position.
// The search ends with the block in which the current_k-th masked position lies.
template <class Mark>
DLLM_DEVICE void mark_next_to_decode(const SequenceState& q, int64_t current_k, SelectScratch& scratch, int& end,
                                     Mark&& mark) {
  const auto candidate = [&](int p) { return (q.flags[p] & kMasked) && p < q.first_stop; };
  const int k = current_k < q.length ? int(current_k) : q.length;
  if (threadIdx.x == 0) end = q.length;
  __syncthreads();
  const int count = list_positions<kThreads>(q.length, scratch, candidate, [&](int rank, int p) {
    if (rank != k - 1) return;
    const int64_t offset = p > q.prompt_length ? p - q.prompt_length : 0;
    const int64_t block_end = q.prompt_length + (offset / q.block_length + 1) * q.block_length;
    end = block_end < q.length ? int(block_end) : q.length;
  });
  __syncthreads();
  if (count < k) {
    for_each_position<kThreads>(q.length, [&](int p) {
      if (p >= 0 && candidate(p)) mark(p);
    });
    return;
  }
  const auto key = [&](int p, bool wanted) {
    return wanted ? ops::cuda::ordered_key(q.certainty[p] * q.d2.value[p]) : uint64_t(0);
  };
  const auto current = [&](int p) { return candidate(p) && q.in_block(p); };
  const auto other = [&](int p) { return candidate(p) && p < end && !q.in_block(p); };
  const int in_block = count_positions(q.length, current);
  ops::cuda::mark_largest<kThreads>(
      q.length, k < in_block ? k : in_block, [&](int p) { return key(p, current(p)); }, mark, scratch);
  __syncthreads();
  if (in_block < k)
    ops::cuda::mark_largest<kThreads>(q.length, k - in_block, [&](int p) { return key(p, other(p)); }, mark, scratch);
}

// d2Cache: of the positions not in `chosen`, by falling importance (ties: lowest position), those whose cumulated share of
// the total of all of them stays <= share, and always the first; all, where share is 1.
DLLM_DEVICE void add_nucleus(const SequenceState& q, double share, uint8_t* chosen, uint64_t* keys, int slots,
                             double* scratch) {
  double rest = 0;
  for (int p = int(threadIdx.x); p < slots; p += kThreads) {
    const bool candidate = p < q.length && !chosen[p];
    keys[p] = candidate ? uint64_t(ops::cuda::ordered_key(q.importance[p])) << 32 | (0xffffffffu - unsigned(p)) : 0;
    if (candidate) rest += q.importance[p];
  }
  const double total = sum_block(rest, scratch);
  ops::cuda::sort_falling<kThreads>(keys, slots);
  if (threadIdx.x == 0) {
    double cumulated = 0;
    for (int i = 0; i < slots && keys[i] != 0; ++i) {
      const int p = int(0xffffffffu - unsigned(keys[i]));
      cumulated += double(q.importance[p]) / total;
      if (i > 0 && share < 1 && cumulated > share) break;
      chosen[p] = 1;
    }
  }
  __syncthreads();
}

// Whether p lies between two neighbours of the set that are at most `width` apart, or in it.
DLLM_DEVICE bool inflated(const uint8_t* chosen, int length, int p, int width) {
  if (chosen[p]) return true;
  for (int left = p - 1; left >= 0 && p - left < width; --left) {
    if (!chosen[left]) continue;
    for (int right = p + 1; right < length && right - left <= width; ++right)
      if (chosen[right]) return true;
    return false;
  }
  return false;
}

// d2_policy.cpp.
DLLM_DEVICE const uint8_t* choose_d2_rows(const PlanArgs& a, const SequenceState& q, SelectScratch& scratch, int& end,
                                          double* sums, uint64_t* shared_keys) {
  const int slot = int(blockIdx.x), slots = sort_slots(a.max_length);
  uint8_t* chosen = a.chosen + int64_t(slot) * 2 * a.max_length;
  uint8_t* result = chosen + a.max_length;
  uint64_t* keys = slots <= kSharedSlots ? shared_keys : a.sort_keys + int64_t(slot) * slots;
  find_density<kThreads>(q, q.d2);
  for (int p = int(threadIdx.x); p < q.length; p += kThreads) chosen[p] = (q.flags[p] & kFresh) != 0;
  __syncthreads();
  mark_next_to_decode(q, a.current_k, scratch, end, [&](int p) { chosen[p - a.shift] = 1; });
  __syncthreads();
  add_nucleus(q, a.rollout_p, chosen, keys, slots, sums);
  const int width = a.inflate_w < q.length ? int(a.inflate_w) : q.length;
  for (int p = int(threadIdx.x); p < q.length; p += kThreads) result[p] = inflated(chosen, q.length, p, width);
  __syncthreads();
  return result;
}

// dllm_policy.cpp. What a layer that is not always refreshed does; whether one after the first refreshes the prompt.
struct Refresh {
  bool prompt, response, prompt_after_first;
};
DLLM_DEVICE Refresh refresh_of(const PlanArgs& a, const SequenceState& q) {
  Refresh r{q.step % a.kp == 0, q.step % a.kr == 0, false};
  for (int l = 1; l < a.layers; ++l) r.prompt_after_first |= r.prompt || a.always_refresh[l];
  return r;
}

template <CacheKind kCache>
DLLM_KERNEL_OCCUPANCY(kThreads, 1)
plan_kernel(PlanArgs a) {
  DLLM_SHARED(SelectScratch, scratch, );
  DLLM_SHARED(double, sums, [32]);
  DLLM_SHARED(int, search_end, [1]);
  const int slot = int(blockIdx.x);
  const bool first_thread = threadIdx.x == 0;
  SequenceState q = a.states[slot];
  const bool goes_on = q.active && !q.finished && advance(q);
  __syncthreads();  // all have their copy
  if (!goes_on) {
    if (!first_thread) return;
    a.row_count[slot] = a.read_count[slot] = a.live_count[slot] = a.verified_count[slot] = 0;
    a.layer_plans[slot] = {0, 0, -1};
    if (q.active) a.states[slot].finished = 1;
    return;
  }
  if (first_thread) a.states[slot] = q;

  const auto in_block = [&](int p) { return p >= 0 && p < q.length && q.in_block(p); };
  const auto masked = [&](int p) { return p >= 0 && p < q.length && (q.flags[p] & kMasked); };
  const uint8_t* chosen = nullptr;
  Refresh refresh{};
  if constexpr (kCache == CacheKind::D2) {
    if (q.step > 0) {
      DLLM_DYNAMIC_SHARED(uint64_t, shared_keys);
      chosen = choose_d2_rows(a, q, scratch, search_end[0], sums, shared_keys);
    }
  }
  if constexpr (kCache == CacheKind::DLLM) refresh = refresh_of(a, q);
  const auto computes = [&](int p) {
    if (p < 0) return false;
    if constexpr (kCache == CacheKind::None) return true;
    if constexpr (kCache == CacheKind::Prefix)
      return q.step_in_block == 0 || p >= q.block_begin - a.shift || in_block(p) || in_block(p + a.shift);
    if constexpr (kCache == CacheKind::Dual) return q.step_in_block == 0 || in_block(p + a.shift);
    if constexpr (kCache == CacheKind::D2) return chosen == nullptr || chosen[p] != 0;
    // Rows whose hidden state may be read, now or later, and those that a layer refreshes.
    return (q.flags[p] & kEditable) || q.step == 0 || refresh.prompt_after_first || masked(p + a.shift);
  };
  int32_t* rows = a.rows + int64_t(slot) * a.max_length;
  int32_t* reads = a.reads + int64_t(slot) * a.max_length;
  const int n_rows = list_positions<kThreads>(q.length, scratch, computes, [&](int i, int p) { rows[i] = p; });
  // d2Cache wants the certainty of every masked position that it computes.
  const int n_reads = list_positions<kThreads>(
      q.length, scratch,
      [&](int p) {
        const bool wanted = kCache == CacheKind::D2 ? masked(p) && p < q.first_stop : q.eligible(p);
        return wanted && computes(p - a.shift);
      },
      [&](int i, int p) { reads[i] = p; });
  int n_live = 0, n_verified = 0;
  if constexpr (kCache == CacheKind::DLLM) {
    const int n_response = count_positions(q.length, [&](int p) { return (q.flags[p] & kEditable) && computes(p); });
    const int n_verify = a.rou > 0 ? int(a.rou * double(q.editable_count)) : -1;
    const int verified = n_verify >= 0 && !refresh.response;
    n_live = (refresh.prompt ? n_rows - n_response : 0) + (refresh.response ? n_response : verified ? n_verify : 0);
    n_verified = verified ? n_response : 0;
    if (first_thread) a.layer_plans[slot] = {refresh.prompt, refresh.response, n_verify};
  }
  if (first_thread) {
    a.row_count[slot] = n_rows;
    a.read_count[slot] = n_reads;
    a.live_count[slot] = n_live;
    a.verified_count[slot] = n_verified;
  }
}

DLLM_KERNEL_OCCUPANCY(kPackThreads, 1)
pack_kernel(PackArgs p) {
  DLLM_SHARED(SelectScratch, scratch, );
  const PlanArgs& a = p.plan;
  const StepMemory& out = p.step;
  const int slot = int(blockIdx.x), thread = int(threadIdx.x);
  // What all sequences need, and what those before this one take.
  StepNeeds needs{}, before{};
  for (int s = 0; s < a.sequences; ++s) {
    if (s == slot) before = needs;
    needs.rows += a.row_count[s];
    needs.reads += a.read_count[s];
    needs.live += a.live_count[s];
    needs.verified += a.verified_count[s];
  }
  const bool fits = needs.fits(p.limits);
  const SequenceState& q = a.states[slot];
  const int n_rows = fits ? a.row_count[slot] : 0, n_reads = fits ? a.read_count[slot] : 0;
  if (!fits) before = {};
  if (thread == 0) {
    if (slot == 0) {
      *out.step.count = fits ? needs.rows : 0;
      *out.out_count = fits ? needs.reads : 0;
      *out.verified.count = fits ? needs.verified : 0;
    }
    out.step.sequences[slot] = {before.rows, before.rows + n_rows, q.length};
    p.records[slot] = {n_rows > 0, q.finished, int32_t(q.step), q.block, n_rows, n_reads, 1, 0, needs};
  }
  const int32_t* rows = a.rows + int64_t(slot) * a.max_length;
  const int32_t* reads = a.reads + int64_t(slot) * a.max_length;
  for (int i = thread; i < n_rows; i += kPackThreads) {
    const int r = before.rows + i, position = rows[i];
    out.step.row[r] = r;
    out.step.position[r] = position;
    out.step.sequence[r] = slot;
    out.tokens[r] = q.tokens[position];
    out.is_response[r] = (q.flags[position] & kEditable) != 0;
  }
  for (int i = thread; i < n_reads; i += kPackThreads) {
    const int row = reads[i] - a.shift;
    int low = 0, high = n_rows - 1;  // its place in the ascending list
    while (low < high) {
      const int middle = (low + high) / 2;
      if (rows[middle] < row)
        low = middle + 1;
      else
        high = middle;
    }
    out.out_rows[before.reads + i] = before.rows + low;
    out.keys[before.reads + i] = {a.seed, q.step, uint32_t(reads[i])};
  }
  if (a.cache != CacheKind::DLLM) return;
  const ops::cuda::LayerPlan plan = a.layer_plans[slot];
  for (int l = thread; l < a.layers; l += kPackThreads)
    out.plans[l * p.max_sequences + slot] = {plan.refresh_prompt || a.always_refresh[l],
                                             plan.refresh_response || a.always_refresh[l], plan.n_verify};
  const int n_verified = fits ? a.verified_count[slot] : 0;
  if (thread == 0) out.verified.sequences[slot] = {before.verified, before.verified + n_verified, q.length};
  if (n_verified == 0) return;
  list_positions<kPackThreads>(
      n_rows, scratch, [&](int i) { return (q.flags[rows[i]] & kEditable) != 0; },
      [&](int rank, int i) {
        out.verified.row[before.verified + rank] = before.rows + i;
        out.verified.position[before.verified + rank] = rows[i];
        out.verified.sequence[before.verified + rank] = slot;
      });
}

}  // namespace

void plan_step(void* stream, const PlanArgs& args) {
  const dim3 grid(unsigned(args.sequences));
  switch (args.cache) {
    case CacheKind::None:
      return cu::launch(stream, "plan", plan_kernel<CacheKind::None>, grid, kThreads, 0, args);
    case CacheKind::Prefix:
      return cu::launch(stream, "plan", plan_kernel<CacheKind::Prefix>, grid, kThreads, 0, args);
    case CacheKind::Dual:
      return cu::launch(stream, "plan", plan_kernel<CacheKind::Dual>, grid, kThreads, 0, args);
    case CacheKind::DLLM:
      return cu::launch(stream, "plan", plan_kernel<CacheKind::DLLM>, grid, kThreads, 0, args);
    case CacheKind::D2: {
      const int slots = sort_slots(args.max_length);
      const size_t shared = slots <= kSharedSlots ? size_t(slots) * sizeof(uint64_t) : sizeof(uint64_t);
      return cu::launch(stream, "plan", plan_kernel<CacheKind::D2>, grid, kThreads, shared, args);
    }
  }
}

void pack_step(void* stream, const PackArgs& args) {
  cu::launch(stream, "pack", pack_kernel, unsigned(args.plan.sequences), kPackThreads, 0, args);
}

}  // namespace dllm::cuda
