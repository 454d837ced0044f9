// Weights from the checkpoint's form (ops/quantize.h) into the CUDA kernel's tiles (quant_linear_impl.h).
#include <cstring>

#include "ops/cuda/quant_linear.h"
#include "ops/cuda/quant_linear_impl.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace dllm::ops::cuda {

size_t quant_bytes(WeightFormat format, int64_t n, int64_t k) {
  if (!is_quantized(format)) fail<ConfigError>("Weights for quant_linear must be I8 or I4, not ", name_of(format));
  if (n <= 0 || k <= 0 || n % kTileFeatures || k % kGroup)
    fail<ConfigError>("Quantised weights on CUDA: ", n, " x ", k, " is not a multiple of ", kTileFeatures, " x ",
                      kGroup);
  const size_t tiles = size_t(n / kTileFeatures) * size_t(k / kGroup);
  return format == WeightFormat::I8 ? tiles * kTileBytes<WeightFormat::I8> + size_t(n) * sizeof(float)
                                    : tiles * kTileBytes<WeightFormat::I4>;
}

void quant_pack(const WeightSource& source, void* out) {
  const int64_t n = source.n, k = source.k, groups = k / kGroup;
  const size_t bytes = quant_bytes(source.format, n, k);
  const bool i8 = source.format == WeightFormat::I8;
  const int tile_bytes = i8 ? kTileBytes<WeightFormat::I8> : kTileBytes<WeightFormat::I4>;
  uint8_t* const packed = static_cast<uint8_t*>(out);
  const uint8_t* const values = static_cast<const uint8_t*>(source.data);
  const uint8_t* const scales = static_cast<const uint8_t*>(source.scales);

  const auto pack_tile = [&](int64_t feature, int64_t group, uint8_t* tile) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      uint8_t element[32];
      for (int i = 0; i < 32; ++i) {
        const int64_t row = feature + g + 8 * (i % 2), term = group * kGroup + 32 * (i / 16) + 8 * t + i / 2 % 8;
        if (i8)
          element[i] = uint8_t(values[row * k + term] + 128);
        else
          element[i] = uint8_t(i4_code(values[row * (k / 2) + term / 2] >> term % 2 * 4 & 15));
      }
      if (i8) {
        std::memcpy(tile + lane * 16, element, 16);
        std::memcpy(tile + 512 + lane * 16, element + 16, 16);
      } else {
        for (int i = 0; i < 16; ++i) tile[lane * 16 + i] = uint8_t(element[2 * i] | element[2 * i + 1] << 4);
      }
    }
    if (i8) return;
    for (int i = 0; i < kTileFeatures; ++i)
      std::memcpy(tile + kI4Scales + 2 * (i % 8 * 2 + i / 8), scales + 2 * ((feature + i) * groups + group), 2);
  };
  parallel_for(n / kTileFeatures, 4, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t group = 0; group < groups; ++group)
        pack_tile(j * kTileFeatures, group, packed + (j * groups + group) * tile_bytes);
  });
  if (i8) std::memcpy(packed + bytes - size_t(n) * sizeof(float), scales, size_t(n) * sizeof(float));
}

}  // namespace dllm::ops::cuda
