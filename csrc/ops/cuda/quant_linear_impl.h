// The packed form of quant_linear.h's weights: what the host writes and the kernels read.
//
// A tile is 16 output features by 64 terms along K, in the order in which the lanes of a warp hold it as the A operand
// of mma.m16n8k16 (cuda/kernel.h). Tiles follow one another along K, then along N. Lane 4 g + t has 32 elements of a
// tile; element i is of feature g + 8 (i % 2) and term 32 (i / 16) + 8 t + i / 2 % 8. So the terms of a lane are eight
// in a row, and so are those of its B operand: 16 bytes of an activation row serve two mma. (Which term an mma calls
// its n-th is free, as long as both operands agree.)
//   I8   1024 bytes: two pieces of 512, in which each lane has 16 bytes, elements 0..15 and 16..31, as q + 128.
//        Behind all tiles the scales, fp32 [n].
//   I4   544 bytes: each lane has 16 bytes, even elements in the low halves, as i4_code(q); then 16 scales in bf16,
//        that of feature g + 8 j at 2 g + j.
#pragma once

#include <cstdint>

#include "ops/cpu/kernels.h"
#include "ops/quantize.h"

namespace dllm::ops::cuda {

inline constexpr int kTileFeatures = 16;
inline constexpr int kI4Scales = 512;  // where a tile's scales begin

template <WeightFormat Format>
inline constexpr int kTileBytes = Format == WeightFormat::I8 ? 1024 : kI4Scales + 2 * kTileFeatures;

// The 4-bit code of an index into kI4Values: bits 2 and 3 trade places. Then the values of codes c and c + 8 have the
// same sign, which the lookup needs (I4Table).
constexpr int i4_code(int index) { return (index & 3) | (index & 4) << 1 | (index & 8) >> 1; }

// Bytes v + 128 of the 16 values, for a lookup by two byte permutes that read eight bytes each:
//   v + 128 = upper[code % 8] ^ (code < 8 ? change[code % 8] : 0)
// A permute whose selector has bit 3 set gives copies of the byte's top bit, and the top bit of every `change` is 0.
struct I4Table {
  uint32_t upper[2] = {}, change[2] = {};
  constexpr I4Table() {
    for (int i = 0; i < 16; ++i) {
      const uint32_t byte = uint32_t(cpu::kI4Values[i] + 128) & 0xff;
      const int code = i4_code(i), word = code % 8 / 4, shift = code % 4 * 8;
      if (code >= 8) upper[word] |= byte << shift;
      change[word] ^= byte << shift;
    }
  }
};
static_assert(((I4Table().change[0] | I4Table().change[1]) & 0x80808080u) == 0);

}  // namespace dllm::ops::cuda
