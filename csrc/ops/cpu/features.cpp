#include "ops/features.h"

#include "ops/cpu/activations.h"
#include "ops/cpu/kernels.h"
#include "runtime/parallel.h"

namespace dllm::ops {
namespace {

char* row_of(const FeatureSlab& slab, int64_t position) {
  return static_cast<char*>(slab.data) + position * slab.ld * int64_t(size_of(slab.dtype));
}

}  // namespace

void store_and_add(const StoreAndAddArgs& args) {
  const auto& kernels = cpu::kernels();
  parallel_for(args.rows, cpu::row_grain(args.d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* y = args.y + i * args.ldy;
      kernels.scale_row(y, 1.0f, args.d, row_of(args.slab, args.positions[i]), args.slab.dtype == DType::BF16);
      kernels.axpy(1.0f, y, false, args.d, args.x + args.x_rows[i] * args.ldx);
    }
  });
}

void add_kept(const AddKeptArgs& args) {
  const auto axpy = cpu::kernels().axpy;
  parallel_for(args.rows, cpu::row_grain(2 * args.d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* x = args.x + args.x_rows[i] * args.ldx;
      axpy(1.0f, row_of(args.a, args.positions[i]), args.a.dtype == DType::BF16, args.d, x);
      axpy(1.0f, row_of(args.f, args.positions[i]), args.f.dtype == DType::BF16, args.d, x);
    }
  });
}

}  // namespace dllm::ops
