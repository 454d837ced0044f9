#include "ops/cpu/source_rows.h"

#include <cstring>

namespace dllm::ops::cpu {

void read_row(const WeightSource& source, int64_t index, float* out) {
  if (source.format == WeightFormat::F32) {
    std::memcpy(out, static_cast<const float*>(source.data) + index * source.ld, size_t(source.k) * 4);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(source.data) + index * source.ld;
    for (int64_t i = 0; i < source.k; ++i) out[i] = bf16_to_float(from[i]);
  }
}

void read_quantized_row(const WeightSource& source, int64_t index, WeightFormat format, float* scratch, uint8_t* q,
                        void* scales) {
  if (!is_quantized(source.format)) {
    read_row(source, index, scratch);
    quantize_row(scratch, source.k, format, q, scales);
    return;
  }
  const int64_t row_bytes = quantized_row_bytes(format, source.k),
                scale_bytes = quantized_scale_bytes(format, source.k);
  const uint8_t* from = static_cast<const uint8_t*>(source.data) + index * row_bytes;
  std::memcpy(scales, static_cast<const char*>(source.scales) + index * scale_bytes, size_t(scale_bytes));
  if (format == WeightFormat::I8)
    std::memcpy(q, from, size_t(source.k));
  else
    for (int64_t i = 0; i < source.k; ++i) q[i] = i % 2 ? from[i / 2] >> 4 : from[i / 2] & 15;
}

}  // namespace dllm::ops::cpu
