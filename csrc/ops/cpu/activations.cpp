#include "ops/cpu/activations.h"

#include <algorithm>

#include "ops/cpu/kernels.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace dllm::ops {

static_assert(kGroup == cpu::kGroup && kPanel == cpu::kColumns);

int64_t activation_stride(int64_t cols, DType dtype) {
  const int64_t line = 64 / int64_t(size_of(dtype));
  const int64_t lines = (cols + line - 1) / line;
  return (lines % 2 ? lines : lines + 1) * line;  // an odd number of lines visits every cache set
}

namespace cpu {
namespace {

Activations widen(const uint16_t* x, int64_t rows, int64_t k, int64_t ldx, Buffer& scratch) {
  const int64_t ld = activation_stride(k, DType::F32);
  scratch.reserve(checked_bytes("widened activations", size_t(rows), size_t(ld), 4), "widened activations");
  float* out = scratch.as<float>();
  parallel_for(rows, std::max<int64_t>(1, 32768 / k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernels().widen(x + r * ldx, k, out + r * ld);
  });
  return {out, ld, 4};
}

Activations quantize(const PackedLinear& w, const void* x, DType dtype, int64_t rows, int64_t ldx, Buffer& scratch) {
  const int64_t size = kernels().quantized_size, k = w.k_padded(), groups = k / kGroup;
  const int64_t lines = (k * size + 63) / 64, ld = (lines | 1) * 64 / size;  // an odd number of lines, as above
  const size_t row_bytes = size_t(ld * size) + size_t(groups + 2) * 4;
  scratch.reserve(checked_bytes("quantised activations", size_t(rows), row_bytes), "quantised activations");
  char* data = scratch.as<char>();
  int32_t* group_offsets = reinterpret_cast<int32_t*>(data + rows * ld * size);
  int32_t* offsets = group_offsets + rows * groups;
  float* scale = reinterpret_cast<float*>(offsets + rows);
  parallel_for(rows, std::max<int64_t>(1, 32768 / k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernels().quantize_row({static_cast<const char*>(x) + r * ldx * int64_t(size_of(dtype)), dtype == DType::BF16,
                              w.k, k, data + r * ld * size, scale + r, offsets + r, group_offsets + r * groups});
  });
  return {data, ld, size, scale, offsets, group_offsets, groups};
}

}  // namespace

Activations prepare_activations(const PackedLinear& w, const void* x, DType dtype, int64_t rows, int64_t ldx,
                                Buffer& scratch) {
  if (is_quantized(w.format)) return quantize(w, x, dtype, rows, ldx, scratch);
  if (w.format != format_of(dtype))
    fail<UsageError>("linear: ", name_of(w.format), " weights do not take ", name_of(dtype), " activations");
  if (dtype == DType::F32) return {x, ldx, 4};
  if (kernels().bf16_a) return {x, ldx, 2};
  return widen(static_cast<const uint16_t*>(x), rows, w.k, ldx, scratch);
}

void gemm_panel(const Activations& a, const PackedLinear& w, int64_t panel, int64_t row, int64_t rows, float* c,
                int64_t ldc) {
  const Kernels& kernel = kernels();
  const char* x = static_cast<const char*>(a.data) + row * a.ld * a.size;
  const char* b = w.panel(panel);
  const int64_t k = is_quantized(w.format) ? w.k_padded() : w.k;
  const int64_t block = w.format == WeightFormat::F32 ? kBlockBytes / 4 : kBlockBytes / 2;
  for (int64_t i = 0; i < k; i += block) {
    const int64_t terms = std::min(block, k - i);
    const char* from = x + i * a.size;
    switch (w.format) {
      case WeightFormat::F32:
        kernel.gemm_f32(rows, terms, from, a.ld, b + i * kPanel * 4, c, ldc, i > 0);
        break;
      case WeightFormat::BF16:
        kernel.gemm_bf16(rows, terms, from, a.ld, b + i * kPanel * 2, c, ldc, i > 0);
        break;
      case WeightFormat::I8:
        kernel.gemm_i8(rows, terms, from, a.ld, a.offsets + row, b + i * kPanel, reinterpret_cast<int32_t*>(c), ldc,
                       i > 0);
        break;
      case WeightFormat::I4:
        kernel.gemm_i4(rows, terms / kGroup, from, a.ld, a.group_offsets + row * a.groups + i / kGroup, a.groups,
                       b + i / kGroup * kI4GroupBytes, c, ldc, i > 0);
        break;
    }
  }
  if (w.format == WeightFormat::I8) kernel.scale_i8(rows, c, ldc, a.scale + row, w.scale.as<float>() + panel * kPanel);
  if (w.format == WeightFormat::I4) kernel.scale_i4(rows, c, ldc, a.scale + row);
}

int64_t panel_grain(int64_t rows, const PackedLinear& w) {
  const double terms = double(rows) * double(w.k) * kPanel;
  const double seconds = std::max(double(w.panel_bytes()) / 40e9, terms / (is_quantized(w.format) ? 120e9 : 60e9));
  return std::max<int64_t>(1, int64_t(4e-6 / std::max(seconds, 1e-12)));
}

int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns)); }

}  // namespace cpu
}  // namespace dllm::ops
