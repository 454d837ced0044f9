#include "ops/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "ops/cpu/kernels.h"
#include "ops/cpu/source_rows.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace dllm::ops {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// To the nearest integer, ties to even, for |x| < 2^22; written so that the compiler makes vectors of it.
inline float round_to_integer(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

bool quantize_i8(const float* w, int64_t k, uint8_t* q, float* scale) {
  float most = 0, finite = 0;
  for (int64_t i = 0; i < k; ++i) {
    most = std::max(most, std::fabs(w[i]));
    finite += w[i] - w[i];  // NaN for NaN and infinity
  }
  const bool ok = finite == 0;
  const float inverse = ok && most > 0 ? 127.0f / most : 0.0f;
  // 127 / most overflows for the smallest of numbers: those are zero.
  const bool zero = !ok || !std::isfinite(inverse);
  *scale = ok ? (zero ? 0.0f : most / 127.0f) : kNaN;
  for (int64_t i = 0; i < k; ++i) q[i] = zero ? uint8_t(0) : uint8_t(int8_t(round_to_integer(w[i] * inverse)));
  return ok;
}

}  // namespace

const char* name_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::F32:
      return "float32";
    case WeightFormat::BF16:
      return "bfloat16";
    case WeightFormat::I8:
      return "int8";
    case WeightFormat::I4:
      return "int4";
  }
  return "unknown";
}

WeightFormat format_of(DType dtype) { return dtype == DType::F32 ? WeightFormat::F32 : WeightFormat::BF16; }

int64_t quantized_row_bytes(WeightFormat format, int64_t k) { return format == WeightFormat::I8 ? k : (k + 1) / 2; }

int64_t quantized_scale_bytes(WeightFormat format, int64_t k) {
  return format == WeightFormat::I8 ? 4 : (k + kGroup - 1) / kGroup * 2;
}

bool quantize_row(const float* w, int64_t k, WeightFormat format, uint8_t* q, void* scales) {
  if (format == WeightFormat::I8) return quantize_i8(w, k, q, static_cast<float*>(scales));
  bool finite = true;
  uint16_t* scale = static_cast<uint16_t*>(scales);
  for (int64_t i = 0; i < k; i += kGroup) {
    float group[kGroup] = {};
    std::copy_n(w + i, std::min<int64_t>(kGroup, k - i), group);
    finite &= cpu::kernels().quantize_group(group, q + i, scale++);
  }
  return finite;
}

void quantize_matrix(const WeightSource& source, WeightFormat format, void* values, void* scales, const char* name) {
  if (is_quantized(source.format) || !is_quantized(format))
    fail<UsageError>("quantize_matrix: from ", name_of(source.format), " to ", name_of(format));
  const int64_t k = source.k, row_bytes = quantized_row_bytes(format, k),
                scale_bytes = quantized_scale_bytes(format, k);
  std::atomic<int64_t> bad{-1};
  parallel_for(source.n, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, k)), [&](int64_t begin, int64_t end) {
    std::vector<float> w(static_cast<size_t>(k));
    std::vector<uint8_t> q(static_cast<size_t>((k + kGroup - 1) / kGroup * kGroup));
    for (int64_t j = begin; j < end; ++j) {
      cpu::read_row(source, j, w.data());
      if (!quantize_row(w.data(), k, format, q.data(), static_cast<char*>(scales) + j * scale_bytes)) bad = j;
      uint8_t* out = static_cast<uint8_t*>(values) + j * row_bytes;
      if (format == WeightFormat::I8) {
        std::memcpy(out, q.data(), size_t(k));
      } else {
        for (int64_t i = 0; i < row_bytes; ++i) out[i] = uint8_t(q[size_t(2 * i)] | q[size_t(2 * i + 1)] << 4);
      }
    }
  });
  if (bad >= 0) fail<CheckpointError>("tensor \"", name, "\" holds a NaN or an infinity in row ", bad.load());
}

}  // namespace dllm::ops
