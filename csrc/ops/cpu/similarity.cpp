#include "ops/similarity.h"

#include <algorithm>
#include <cmath>

#include "ops/cpu/activations.h"
#include "ops/cpu/kernels.h"
#include "ops/cpu/kv_write.h"
#include "ops/linear.h"
#include "runtime/parallel.h"

namespace dllm::ops {

void value_similarity(const ValueSimilarityArgs& args) {
  constexpr double kLeast = 1e-16;  // (1e-8)^2
  const KvSlab& slab = args.slab;
  const auto compare_values = cpu::kernels().compare_values;
  const bool bf16 = slab.dtype == DType::BF16;
  const char* values = static_cast<const char*>(slab.v);
  parallel_for(args.rows, cpu::row_grain(slab.n_kv * slab.head_dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t position = args.positions[r];
      const bool odd = bf16 && position % 2;
      const int64_t at = slab.v_offset(position - odd, 0, 0) * int64_t(size_of(slab.dtype));
      cpu::CompareSums sums;
      compare_values({args.v + r * args.ldv, slab.n_kv, slab.head_dim, values + at, slab.capacity * kPanel, bf16, odd},
                     &sums);
      // One root of the product: for equal vectors sqrt(x * x) is x, so that rows that did not change tie at exactly 1.
      args.similarity[r] = sums.dot / std::sqrt(std::max(sums.v_square, kLeast) * std::max(sums.cached_square, kLeast));
    }
  });
}

void write_values(const WriteValuesArgs& args) {
  const KvSlab& slab = args.slab;
  parallel_for(args.rows, cpu::row_grain(slab.n_kv * slab.head_dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int head = 0; head < slab.n_kv; ++head)
        cpu::write_v(slab, args.positions[r], head, args.v + r * args.ldv + head * slab.head_dim);
  });
}

}  // namespace dllm::ops
