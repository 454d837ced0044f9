#include "ops/rollout.h"

#include <algorithm>

#include "ops/cpu/activations.h"
#include "ops/cpu/kernels.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"

namespace dllm::ops {

void rollout(const RolloutArgs& args) {
  const auto axpy = cpu::kernels().axpy;
  thread_local Buffer scratch;
  scratch.reserve(checked_bytes("rollout", size_t(args.n_rows), 4), "rollout");
  float* half = scratch.as<float>();  // u / 2
  float* c = args.importance;
  std::fill_n(c, args.n_keys, 1.0f);

  // Columns in whole panels, so that an element is never in a vector for one number of threads and in the rest of one
  // for another; several of them, so that a part of a row is worth its cache misses.
  const int64_t panels = (args.n_keys + cpu::kColumns - 1) / cpu::kColumns;
  const int64_t grain = std::max<int64_t>(8, cpu::row_grain(args.n_rows * cpu::kColumns));
  for (int l = args.n_layers - 1; l >= 0; --l) {
    const float* mean = args.mean + l * args.layer_stride;
    for (int64_t r = 0; r < args.n_rows; ++r) {
      half[r] = 0.5f * c[args.rows[r]];
      c[args.rows[r]] = half[r];
    }
    parallel_for(panels, grain, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * cpu::kColumns, last = std::min(end * cpu::kColumns, args.n_keys);
      for (int64_t r = 0; r < args.n_rows; ++r)
        axpy(half[r], mean + r * args.ld + first, false, last - first, c + first);
    });
  }
}

}  // namespace dllm::ops
