// What kernels' host code takes from the rest of the engine, so that cuda_cases links neither the engine nor torch.

#include "ops/quantize.h"
#include "runtime/parallel.h"

namespace dllm {

void detail::parallel_for(int64_t n, int64_t, RangeFn fn, void* ctx) {
  if (n > 0) fn(ctx, 0, n);
}

namespace ops {
const char* name_of(WeightFormat) { return "this format"; }
}  // namespace ops

}  // namespace dllm
