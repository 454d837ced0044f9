#include "ops/cpu/activations.h"

#include <algorithm>

#include "ops/cpu/kernels.h"
#include "ops/linear.h"
#include "runtime/parallel.h"

namespace dllm::ops {

int64_t activation_stride(int64_t cols, DType dtype) {
  const int64_t line = 64 / int64_t(size_of(dtype));
  const int64_t lines = (cols + line - 1) / line;
  return (lines % 2 ? lines : lines + 1) * line;  // an odd number of lines visits every cache set
}

namespace cpu {

Activations prepare_activations(const void* x, DType dtype, int64_t rows, int64_t k, int64_t ldx, Buffer& scratch) {
  if (dtype == DType::F32) return {x, ldx, 4};
  if (kernels().bf16_a) return {x, ldx, 2};
  const int64_t ld = activation_stride(k, DType::F32);
  scratch.reserve(checked_bytes("widened activations", size_t(rows), size_t(ld), 4), "widened activations");
  float* out = scratch.as<float>();
  const auto* from = static_cast<const uint16_t*>(x);
  parallel_for(rows, std::max<int64_t>(1, 32768 / k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernels().widen(from + r * ldx, k, out + r * ld);
  });
  return {out, ld, 4};
}

void gemm_panel(const Activations& a, DType dtype, int64_t row, int64_t rows, int64_t k, const void* panel, float* c,
                int64_t ldc) {
  const auto gemm = dtype == DType::F32 ? kernels().gemm_f32 : kernels().gemm_bf16;
  const int64_t b_size = int64_t(size_of(dtype));
  const char* from = static_cast<const char*>(a.data) + row * a.ld * a.size;
  const char* b = static_cast<const char*>(panel);
  const int64_t block = kBlockBytes / b_size;
  for (int64_t i = 0; i < k; i += block)
    gemm(rows, std::min(block, k - i), from + i * a.size, a.ld, b + i * kPanel * b_size, c, ldc, i > 0);
}

int64_t panel_grain(int64_t rows, int64_t k, DType dtype) {
  const double bytes = double(k) * kPanel * double(size_of(dtype)), terms = double(rows) * double(k) * kPanel;
  const double seconds = std::max(bytes / 40e9, terms / 60e9);
  return std::max<int64_t>(1, int64_t(4e-6 / seconds));
}

int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns)); }

}  // namespace cpu
}  // namespace dllm::ops
