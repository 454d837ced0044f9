// The device memory of a running batch: its sequences, the rules, and the scratch of the kernels that plan and commit.
#pragma once

#include "cache/cuda/plan.h"
#include "decode/cuda/commit.h"
#include "runtime/carver.h"

namespace dllm {

struct LoopSize {
  int32_t sequences = 0, length = 0, reads = 0;  // of the longest sequence; of the largest step of one
  int32_t layers = 0;
  bool operator==(const LoopSize&) const = default;
};

struct LoopMemory {
  cuda::SequenceState* states;  // [sequences]
  Rules* rules;
  uint8_t* always_refresh;  // [layers]
  cuda::PlanArgs plan;  // its scratch
  cuda::CommitArgs commit;  // likewise
  size_t bytes;

  static LoopMemory at(void* base, const LoopSize& n) {
    LoopMemory m{};
    Carver c(base);
    const int64_t sequences = n.sequences, slots = cuda::sort_slots(n.length);
    c.take(m.states, sequences);
    c.take(m.rules, 1);
    c.take(m.always_refresh, n.layers);
    c.take(m.plan.rows, sequences * n.length);
    c.take(m.plan.reads, sequences * n.length);
    c.take(m.plan.chosen, sequences * n.length * 2);
    c.take(m.plan.sort_keys, sequences * slots);
    for (int32_t** count : {&m.plan.row_count, &m.plan.read_count, &m.plan.live_count, &m.plan.verified_count})
      c.take(*count, sequences);
    c.take(m.plan.layer_plans, sequences);
    c.take(m.commit.proposals, sequences * n.reads);
    c.take(m.commit.keys, sequences * n.reads);
    for (int32_t** list : {&m.commit.by_key, &m.commit.by_compared, &m.commit.chosen})
      c.take(*list, sequences * n.reads);
    c.take(m.commit.records, sequences);
    c.take(m.commit.committed, sequences * n.reads);
    m.bytes = c.bytes();
    return m;
  }
};

// What a sequence brings along: its canvas, and what the decoders keep for it.
struct SlotMemory {
  int32_t* tokens;
  uint8_t* flags;
  cuda::Density prior, d2;
  double* certainty;
  float* importance;
  double *prior_phi, *prior_tail, *d2_phi, *d2_tail;
  size_t bytes;

  static SlotMemory at(void* base, int32_t length) {
    SlotMemory m{};
    Carver c(base);
    c.take(m.tokens, length);
    c.take(m.flags, length);
    for (double** phi : {&m.prior_phi, &m.d2_phi}) c.take(*phi, 3 * int64_t(length) + 1);
    for (double** tail : {&m.prior_tail, &m.d2_tail}) c.take(*tail, 3 * int64_t(length) + 2);
    m.prior = {m.prior_phi, m.prior_tail, nullptr};
    m.d2 = {m.d2_phi, m.d2_tail, nullptr};
    for (double** value : {&m.prior.value, &m.d2.value, &m.certainty}) c.take(*value, length);
    c.take(m.importance, length);
    m.bytes = c.bytes();
    return m;
  }
};

}  // namespace dllm
