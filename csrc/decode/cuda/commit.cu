// One block per sequence. Proposals are made and ranked by all threads, the choice among the ranked is made by one: its
// loops are over at most a block's masked positions.
#include "decode/cuda/commit.h"

#include "decode/cuda/density.h"
#include "ops/cuda/block_select.h"
#include "ops/cuda/kernel.h"

namespace dllm::cuda {

namespace {

constexpr int kThreads = 256;

using ops::cuda::count_before;
using ops::cuda::SelectScratch;

// order[rank] = i by falling key, ties to the lowest i. A barrier before, and one after, are the caller's.
DLLM_DEVICE void rank_falling(const double* key, int n, int32_t* order) {
  for (int i = int(threadIdx.x); i < n; i += kThreads) {
    const double mine = key[i];
    int rank = 0;
    for (int j = 0; j < n; ++j) rank += key[j] > mine || (key[j] == mine && j < i);
    order[rank] = i;
  }
}

DLLM_KERNEL_OCCUPANCY(kThreads, 1)
commit_kernel(CommitArgs a) {
  DLLM_SHARED(SelectScratch, scratch, );
  DLLM_SHARED(int, count, [1]);
  DLLM_SHARED(int, first_stop, [1]);
  const int slot = int(blockIdx.x), thread = int(threadIdx.x);
  StepRecord& record = a.records[slot];
  if (!record.ran) return;
  const Rules& r = *a.rules;
  const SequenceState q = a.states[slot];
  const int n_reads = a.read_count[slot];
  const ops::cuda::RowStatsState* stats = a.stats;
  for (int s = 0; s < slot; ++s) stats += a.records[s].ran ? a.read_count[s] : 0;
  const float* importance = a.importance ? a.importance + slot * a.importance_ld : nullptr;

  // A NaN or an infinity must not be decoded as if it were an answer, nor choose rows.
  bool finite = true;
  for (int i = thread; i < n_reads; i += kThreads) finite &= stats[i].stats.finite;
  if (importance)
    for (int p = thread; p < q.length; p += kThreads) finite &= importance[p] - importance[p] == 0;
  if (!__syncthreads_and(finite)) {
    if (thread == 0) record.finite = 0;
    return;
  }

  if (q.prior.phi) find_density<kThreads>(q, q.prior);
  __syncthreads();
  const int64_t list = int64_t(slot) * a.max_reads;
  const int32_t* reads = a.reads + int64_t(slot) * a.max_length;
  Proposal* proposals = a.proposals + list;
  int n = 0;
  for (int base = 0; base < n_reads; base += kThreads) {
    const int i = base + thread;
    Proposal p{};
    bool eligible = false;
    if (i < n_reads) {
      const int32_t position = reads[i];
      const ScoreContext context{q.prior.phi ? q.prior.value[position] : 1.0, position - q.block_start()};
      p = rules::propose(r, position, q.step, stats[i].stats, context);
      eligible = q.eligible(position);
      if (q.certainty) q.certainty[position] = rules::certainty(r, p.confidence);
    }
    int total;
    const int before = count_before<kThreads>(eligible, total, scratch);
    if (eligible) proposals[n + before] = p;
    n += total;
  }
  __syncthreads();

  const StepPosition at{q.step, q.step_in_block, q.masked_at_start, 0};
  double* keys = a.keys + list;
  int32_t *by_key = a.by_key + list, *by_compared = a.by_compared + list, *chosen = a.chosen + list;
  for (int i = thread; i < n; i += kThreads) keys[i] = rules::order_key(r, at, proposals[i]);
  __syncthreads();
  rank_falling(keys, n, by_key);
  __syncthreads();
  if (r.rule == TransferRule::Factor) {
    for (int i = thread; i < n; i += kThreads) keys[i] = rules::compared(r, proposals[i]);
    __syncthreads();
    rank_falling(keys, n, by_compared);
    __syncthreads();
  }
  // Those that may still be committed in this block, computed by this step or not.
  int eligible = 0;
  for (int base = 0; base < q.length; base += kThreads) {
    const int p = base + thread;
    eligible += __syncthreads_count(p < q.length && q.eligible(p));
  }
  if (thread == 0) {
    StepPosition full = at;
    full.eligible = eligible;
    rules::Choice choice{chosen};
    rules::choose(r, full, proposals, n, by_key, by_compared, choice);
    count[0] = choice.count;
    first_stop[0] = q.first_stop;
  }
  __syncthreads();

  const int n_chosen = count[0];
  for (int p = thread; p < q.length; p += kThreads) {
    q.flags[p] &= uint8_t(~kFresh);
    if (importance) q.importance[p] = importance[p];
  }
  __syncthreads();
  for (int c = thread; c < n_chosen; c += kThreads) {
    int rank = 0;  // by position
    for (int other = 0; other < n_chosen; ++other) rank += chosen[other] < chosen[c];
    const Proposal& p = proposals[chosen[c]];
    a.committed[list + rank] = {p.position, p.token, float(p.confidence)};
    q.tokens[p.position] = p.token;
    q.flags[p.position] = uint8_t((q.flags[p.position] & ~kMasked) | kFresh);
    if (r.stop_at_eos && p.position >= q.prompt_length && r.stops(p.token)) atomicMin(&first_stop[0], p.position);
  }
  __syncthreads();
  if (thread == 0) {
    SequenceState& state = a.states[slot];
    state.first_stop = first_stop[0];
    state.step = q.step + 1;
    state.step_in_block = q.step_in_block + 1;
    record.committed = n_chosen;
  }
}

}  // namespace

void commit_step(void* stream, const CommitArgs& args) {
  cu::launch(stream, "commit", commit_kernel, unsigned(args.sequences), kThreads, 0, args);
}

}  // namespace dllm::cuda
