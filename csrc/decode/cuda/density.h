// The certainty density of decode/density.h, computed by one block.
#pragma once

#include "decode/cuda/sequence_state.h"
#include "decode/density.h"
#include "ops/cuda/kernel.h"

namespace dllm::cuda {

// density.value for every position; terms are added in the order in which CertaintyDensity::of adds them. A barrier is the
// caller's.
template <int kThreads>
DLLM_DEVICE void find_density(const SequenceState& q, const Density& density) {
  const double *phi = density.phi, *tail = density.tail;
  const int first = q.first_editable, n = q.length - first;
  const auto between = [&](int a, int b) { return tail[a] - tail[b + 1]; };
  const auto known = [&](int i) { return !(q.flags[first + i] & kMasked); };
  for (int p = int(threadIdx.x); p < first; p += kThreads) density.value[p] = 0;
  if (n == 0) return;
  const bool last_known = known(n - 1);
  const double all = between(1, 3 * n) + between(0, 3 * n - 1);
  for (int i = int(threadIdx.x); i < n; i += kThreads) {
    double sum = between(i + 1, i + n);
    if (last_known) sum += between(n - i, 2 * n - 1 - i);
    for (int j = 0; j < n; ++j)
      if (known(j)) sum += phi[i < j ? j - i : i - j];
    density.value[first + i] = keep_40_bits(sum / all);
  }
}

}  // namespace dllm::cuda
