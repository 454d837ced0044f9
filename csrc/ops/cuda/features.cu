// dLLM-Cache's passes. Bound by memory; per row, with elements of T bytes:
//   store_and_add  reads 8 d (y and the residual stream), writes 4 d and T d
//   add_kept       reads 4 d and 2 T d, writes 4 d
//   verify_values  reads 4 n and T n, writes T n, with n = n_kv head_dim; a block per row, because it needs sums
// ops/cuda/rows.h says how the first two go to threads.
//   choose_rows    a block per sequence: reads the list and the similarities, writes two lists; some ten passes over a
//                  sequence's similarities, which stay in L1
#include "ops/cuda/features.h"

#include "ops/cuda/block_select.h"
#include "ops/cuda/kernel.h"
#include "ops/cuda/rows.h"

namespace dllm::ops::cuda {
namespace {

using namespace cu;

constexpr int kVerifyThreads = 256, kVerifyWarps = kVerifyThreads / 32;
constexpr int kChooseThreads = 1024;

template <class T>
DLLM_DEVICE T* feature_row(void* const* slabs, const RowList& rows, int i, int d) {
  return static_cast<T*>(slabs[rows.sequence[i]]) + int64_t(rows.position[i]) * d;
}

template <class T, int N>
DLLM_KERNEL(kRowThreads)
store_and_add_kernel(StoreAndAddArgs a) {
  const int c = first_column<N>(), rows = *a.rows.count;
  if (c >= a.d) return;
  for (int i = first_row(); i < rows; i += row_stride()) {
    float* to = a.x + int64_t(a.rows.row[i]) * a.d + c;
    float y[N], x[N];
    load_elements(a.y + int64_t(i) * a.d + c, y);
    load_elements(to, x);
    store_elements(feature_row<T>(a.slabs, a.rows, i, a.d) + c, y);
    DLLM_UNROLL
    for (int j = 0; j < N; ++j) x[j] += y[j];
    store_elements(to, x);
  }
}

template <class T, int N>
DLLM_KERNEL(kRowThreads)
add_kept_kernel(AddKeptArgs a) {
  const int c = first_column<N>(), rows = *a.rows.count;
  if (c >= a.d) return;
  for (int i = first_row(); i < rows; i += row_stride()) {
    float* to = a.x + int64_t(a.rows.row[i]) * a.d + c;
    float x[N], attention[N], mlp[N];
    load_elements(to, x);
    load_elements(feature_row<T>(a.attention_slabs, a.rows, i, a.d) + c, attention);
    load_elements(feature_row<T>(a.mlp_slabs, a.rows, i, a.d) + c, mlp);
    DLLM_UNROLL
    for (int j = 0; j < N; ++j) x[j] = (x[j] + attention[j]) + mlp[j];
    store_elements(to, x);
  }
}

template <class T, int N>
DLLM_KERNEL(kVerifyThreads)
verify_values_kernel(VerifyValuesArgs a) {
  constexpr double kLeast = 1e-16;  // (1e-8)^2
  DLLM_SHARED(double, sums, [3][kVerifyWarps]);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int columns = a.n_kv * a.head_dim, rows = *a.rows.count;
  for (int i = int(blockIdx.x); i < rows; i += int(gridDim.x)) {
    const KvView slab = a.slabs[a.rows.sequence[i]];
    const int64_t position = a.rows.position[i];
    double dot = 0, fresh_square = 0, cached_square = 0;
    for (int c = thread * N; c < columns; c += kVerifyThreads * N) {
      const int head = c / a.head_dim, element = c % a.head_dim;
      T* at = static_cast<T*>(slab.v) + (int64_t(head) * slab.capacity + position) * a.head_dim + element;
      float fresh[N], cached[N];
      load_elements(a.v + int64_t(i) * columns + c, fresh);
      load_elements(at, cached);
      if (a.bias) {
        float bias[N];
        load_elements(a.bias + c, bias);
        DLLM_UNROLL
        for (int j = 0; j < N; ++j) fresh[j] += bias[j];
      }
      store_elements(at, fresh);
      DLLM_UNROLL
      for (int j = 0; j < N; ++j) {
        // Products of two fp32 values are exact in fp64: a fused multiply-add would round the same.
        const double x = double(to_float(from_float<T>(fresh[j]))), y = double(cached[j]);
        dot += x * y;
        fresh_square += x * x;
        cached_square += y * y;
      }
    }
    dot = sum_warp(dot);
    fresh_square = sum_warp(fresh_square);
    cached_square = sum_warp(cached_square);
    if (lane == 0) {
      sums[0][warp] = dot;
      sums[1][warp] = fresh_square;
      sums[2][warp] = cached_square;
    }
    __syncthreads();
    dot = sum_warp(lane < kVerifyWarps ? sums[0][lane] : 0.0);
    fresh_square = sum_warp(lane < kVerifyWarps ? sums[1][lane] : 0.0);
    cached_square = sum_warp(lane < kVerifyWarps ? sums[2][lane] : 0.0);
    const auto at_least = [](double x) { return x < kLeast ? kLeast : x; };  // NaN stays
    // One root of the product: for equal vectors sqrt(x * x) is x, so that rows that did not change tie at exactly 1.
    if (thread == 0) a.similarity[i] = dot / sqrt(at_least(fresh_square) * at_least(cached_square));
    __syncthreads();  // before the next row's sums
  }
}

// A block per sequence. Where its rows go depends on how many of the earlier sequences' rows are live, which follows from
// their plans and parts: no block waits for another.
DLLM_KERNEL(kChooseThreads) choose_rows_kernel(ChooseRowsArgs a) {
  DLLM_SHARED(SelectScratch, scratch, );
  DLLM_SHARED(int, warp_sums, [kChooseThreads / 32]);
  DLLM_DYNAMIC_SHARED(unsigned, live);  // a bit for each row of the sequence
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int s = int(blockIdx.x);
  const auto add = [](int x, int y) { return x + y; };

  const auto verified_rows = [&](int sequence) {
    const LayerPlan plan = a.plans[sequence];
    if (plan.refresh_response || plan.n_verify <= 0) return 0;
    const int n = a.verified.sequences[sequence].end - a.verified.sequences[sequence].begin;
    return plan.n_verify < n ? plan.n_verify : n;
  };
  // Rows of the earlier sequences, and how many of them are live.
  int earlier = 0, earlier_live = 0;
  for (int t = 0; t < s; ++t) {
    const LayerPlan plan = a.plans[t];
    const SequenceRows range = a.step.sequences[t];
    earlier += range.end - range.begin;
    if (thread == 0) earlier_live += verified_rows(t);
    for (int r = range.begin + thread; r < range.end; r += kChooseThreads)
      earlier_live += (a.is_response[r] ? plan.refresh_response : plan.refresh_prompt) != 0;
  }
  earlier_live = reduce_warp(earlier_live, add);
  if (lane == 0) warp_sums[warp] = earlier_live;

  const LayerPlan plan = a.plans[s];
  const SequenceRows range = a.step.sequences[s];
  const int rows = range.end - range.begin;
  for (int base = 0; base < rows; base += kChooseThreads) {
    const int i = base + thread;
    const bool all = i < rows && (a.is_response[range.begin + i] ? plan.refresh_response : plan.refresh_prompt);
    const unsigned bits = __ballot_sync(kAllLanes, all);
    if (lane == 0 && i < rows) live[i / 32] = bits;
  }
  __syncthreads();
  earlier_live = reduce_warp(warp_sums[lane], add);

  if (const int n = verified_rows(s)) {
    const SequenceRows verified = a.verified.sequences[s];
    mark_largest<kChooseThreads>(
        verified.end - verified.begin, n,
        [&](int i) {
          const double similarity = a.similarity[verified.begin + i];
          return ordered_key(similarity == similarity ? -similarity : 2.0);  // the change
        },
        [&](int i) {
          const int row = a.verified.row[verified.begin + i] - range.begin;
          atomicOr(&live[row / 32], 1u << row % 32);
        },
        scratch);
    __syncthreads();
  }

  int live_before = earlier_live;
  for (int base = 0; base < rows; base += kChooseThreads) {
    const int i = base + thread, row = range.begin + i;
    const bool is_live = i < rows && (live[i / 32] >> i % 32 & 1);
    int live_here;
    const int at = live_before + count_before<kChooseThreads>(is_live, live_here, scratch);
    live_before += live_here;
    if (i >= rows) continue;
    const RowList& list = is_live ? a.live : a.resting;
    const int to = is_live ? at : earlier + i - at;
    list.row[to] = row;
    list.position[to] = a.step.position[row];
    list.sequence[to] = s;
  }
  if (thread == 0) {
    const int resting_before = earlier + rows - live_before;
    a.live.sequences[s] = {earlier_live, live_before, range.n_keys};
    a.resting.sequences[s] = {earlier - earlier_live, resting_before, range.n_keys};
    if (s == a.n_sequences - 1) {
      *a.live.count = live_before;
      *a.resting.count = resting_before;
    }
  }
}

}  // namespace

void store_and_add(Stream stream, DType type, const StoreAndAddArgs& a) {
  if (a.rows.capacity == 0) return;
  dispatch_rows(type, a.d % 4 == 0, [&]<class T, int N>() {
    launch(stream, "store_and_add", store_and_add_kernel<T, N>, row_grid(a.rows.capacity, a.d, N), kRowThreads, 0, a);
  });
}

void add_kept(Stream stream, DType type, const AddKeptArgs& a) {
  if (a.rows.capacity == 0) return;
  dispatch_rows(type, a.d % 4 == 0, [&]<class T, int N>() {
    launch(stream, "add_kept", add_kept_kernel<T, N>, row_grid(a.rows.capacity, a.d, N), kRowThreads, 0, a);
  });
}

void verify_values(Stream stream, DType type, const VerifyValuesArgs& a) {
  if (a.rows.capacity == 0) return;
  const dim3 grid(unsigned(min(a.rows.capacity, kMaxBlocks)));
  dispatch_rows(type, a.head_dim % 4 == 0, [&]<class T, int N>() {
    launch(stream, "verify_values", verify_values_kernel<T, N>, grid, kVerifyThreads, 0, a);
  });
}

void choose_rows(Stream stream, const ChooseRowsArgs& a) {
  if (a.n_sequences == 0 || a.step.capacity == 0) return;
  const size_t bitmap = (size_t(a.step.capacity) + 31) / 32 * sizeof(unsigned);
  launch(stream, "choose_rows", choose_rows_kernel, dim3(unsigned(a.n_sequences)), kChooseThreads, bitmap, a);
}

}  // namespace dllm::ops::cuda
