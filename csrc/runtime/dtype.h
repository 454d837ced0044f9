// Element types of weights, activations and KV slabs, and bf16 <-> fp32 for scalar code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dllm {

enum class DType : uint8_t { F32, BF16 };

constexpr size_t size_of(DType t) { return t == DType::F32 ? 4 : 2; }
constexpr const char* name_of(DType t) { return t == DType::F32 ? "float32" : "bfloat16"; }

inline float bf16_to_float(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

}  // namespace dllm
