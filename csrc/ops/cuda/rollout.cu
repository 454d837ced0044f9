// One layer of attention rollout. Reads rows x keys of `mean` once, 4 bytes each; the rest is small. A block has 32 keys of
// one sequence, so that 4096 keys fill 128 SMs. Its 256 threads bring the rows in parts of 128, 128 bytes of each, through
// registers into shared memory, the next part while the first warp adds this one: a lane per key, row after row, which
// is about as long as the part's loads take. Sums are in the order of the rows, as on the CPU.
#include "ops/cuda/rollout.h"

#include "ops/cuda/kernel.h"

namespace dllm::ops::cuda {
namespace {

using namespace cu;

constexpr int kThreads = 256;
constexpr int kKeys = 32;
constexpr int kRows = 128;  // of a part

// N neighbouring keys in one access.
template <int N>
DLLM_KERNEL(kThreads)
rollout_kernel(RolloutArgs a) {
  constexpr int kLoads = kRows * kKeys / (kThreads * N), kRowsPerLoad = kThreads * N / kKeys;
  DLLM_SHARED(float, part, [kRows][kKeys]);
  DLLM_SHARED(float, halves, [kRows]);  // c of the row's position, halved
  DLLM_SHARED(int, computed, [kKeys]);  // whether the key is one of the step's positions
  const int thread = int(threadIdx.x);
  const int first_key = int(blockIdx.x) * kKeys;
  const SequenceRows sequence = a.sequences[blockIdx.y];
  const int n_rows = sequence.end - sequence.begin, n_keys = sequence.n_keys;
  if (first_key >= n_keys) return;
  const float* c = a.c ? a.c + int64_t(blockIdx.y) * a.ld : nullptr;
  const int32_t* positions = a.positions + sequence.begin;

  const int load_row = thread * N / kKeys, load_key = thread * N % kKeys;
  const float* mean = a.mean + int64_t(sequence.begin) * a.ld_mean + first_key + load_key;
  float next[kLoads][N], next_half;
  const auto load = [&](int row) {
    DLLM_UNROLL
    for (int l = 0; l < kLoads; ++l) {
      const int r = row + l * kRowsPerLoad + load_row;
      DLLM_UNROLL
      for (int j = 0; j < N; ++j) next[l][j] = 0;
      if (r >= n_rows) continue;
      if (first_key + load_key + N <= n_keys) {
        load_elements(mean + r * a.ld_mean, next[l]);
      } else {  // what lies beyond the keys was never written
        DLLM_UNROLL
        for (int j = 0; j < N; ++j)
          if (first_key + load_key + j < n_keys) next[l][j] = mean[r * a.ld_mean + j];
      }
    }
    next_half = 0;
    if (thread < kRows && row + thread < n_rows) next_half = c ? 0.5f * c[positions[row + thread]] : 0.5f;
  };

  load(0);
  if (thread < kKeys) computed[thread] = 0;
  __syncthreads();
  for (int r = thread; r < n_rows; r += kThreads) {
    const int key = positions[r] - first_key;
    if (key >= 0 && key < kKeys) computed[key] = 1;
  }
  __syncthreads();
  float sum = 0;
  if (thread < kKeys && first_key + thread < n_keys) {
    sum = c ? c[first_key + thread] : 1.0f;
    if (computed[thread]) sum *= 0.5f;
  }
  for (int row = 0; row < n_rows; row += kRows) {
    DLLM_UNROLL
    for (int l = 0; l < kLoads; ++l) store_elements(&part[l * kRowsPerLoad + load_row][load_key], next[l]);
    if (thread < kRows) halves[thread] = next_half;
    __syncthreads();
    load(row + kRows);
    if (thread < kKeys) {
      const int here = n_rows - row < kRows ? n_rows - row : kRows;
      for (int r = 0; r < here; ++r) sum = fmaf(halves[r], part[r][thread], sum);
    }
    __syncthreads();
  }
  if (thread < kKeys && first_key + thread < n_keys) a.out[int64_t(blockIdx.y) * a.ld + first_key + thread] = sum;
}

}  // namespace

void rollout(Stream stream, const RolloutArgs& a) {
  if (a.n_sequences == 0 || a.max_keys == 0) return;
  const dim3 grid(unsigned((a.max_keys + kKeys - 1) / kKeys), unsigned(a.n_sequences));
  if (a.ld_mean % 4 == 0 && reinterpret_cast<uintptr_t>(a.mean) % 16 == 0)
    launch(stream, "rollout", rollout_kernel<4>, grid, kThreads, 0, a);
  else
    launch(stream, "rollout", rollout_kernel<1>, grid, kThreads, 0, a);
}

}  // namespace dllm::ops::cuda
