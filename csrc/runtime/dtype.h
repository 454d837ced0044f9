// Element types of weights, activations and KV slabs, and bf16 <-> fp32 for scalar code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dllm {

enum class DType : uint8_t { F32, BF16, F16 };  // F16: CUDA kernels only

constexpr size_t size_of(DType t) { return t == DType::F32 ? 4 : 2; }
constexpr const char* name_of(DType t) {
  return t == DType::F32 ? "float32" : t == DType::BF16 ? "bfloat16" : "float16";
}

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

// IEEE half precision; rounds to nearest, ties to even; NaN stays NaN.
inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  uint32_t u;
  if (exponent == 31) {
    u = sign | 0x7f800000u | mantissa << 13;
  } else if (exponent) {
    u = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    const float f = float(mantissa) * 0x1p-24f;  // zero and subnormal numbers, exactly
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint16_t float_to_f16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds beyond 65504
  if (u < 0x38800000u) {  // below the normal numbers: adding 2^-1 x 2^-1 aligns the last bit, and rounds
    float x;
    std::memcpy(&x, &u, 4);
    x += 0.5f;
    std::memcpy(&u, &x, 4);
    return uint16_t(sign | (u - 0x3f000000u));
  }
  return uint16_t(sign | ((u + 0xfffu + (u >> 13 & 1)) - (112u << 23)) >> 13);
}

}  // namespace dllm
