// Weights in 8 and 4 bits: what the numbers mean, and how a matrix comes to them. linear.h says how they are multiplied.
//
//   I8   w[j, i] ~ q[j, i] * s[j]        q in -127..127, s fp32 = max_i |w[j, i]| / 127
//   I4   w[j, i] ~ v[q[j, i]] * s[j, g]  q in 0..15, s bf16 per group g of 64 terms along K: 4.25 bits per weight
// I8: q is w * (127 / max) rounded to nearest, ties to even; where 127 / max overflows, q and s are 0.
// I4: v are 16 values (kI4Values in cpu/kernels.h) that lie closer together near zero, as weights do: the fixed point of
// Lloyd's algorithm on normal numbers in groups of 64. v[q] is the nearest to w / s, the smaller of two; s = m / (-127 t), m the
// group's element of largest magnitude, with the t of {0.8, 0.85, ..., 1.3} that leaves the least squared error, the first of
// equals. A group with |m| < 2^-118 has scale 0.
// On normal numbers the error (root mean square, relative) is 8.2 %; evenly spaced values, groups of 32 and the scale m / -8
// give 8.6 % in 4.5 bits.
#pragma once

#include <cstdint>

#include "runtime/dtype.h"

namespace dllm::ops {

enum class WeightFormat { F32, BF16, I8, I4 };
const char* name_of(WeightFormat format);
WeightFormat format_of(DType dtype);
inline bool is_quantized(WeightFormat f) { return f == WeightFormat::I8 || f == WeightFormat::I4; }

inline constexpr int kGroup = 64;  // terms along K that share an I4 scale

inline constexpr int kI4GroupBytes = 2 * 32 + kGroup * 32 / 2;  // of a group of 32 columns, scales included

// A matrix [n, k], row-major, as a checkpoint has it.
//   F32, BF16   data [n, ld] elements
//   I8          data int8 [n, k], scales fp32 [n]
//   I4          data uint8 [n, ceil(k / 2)] of q, even terms in the low halves; scales bf16 [n, ceil(k / 64)]
struct WeightSource {
  const void* data;
  WeightFormat format;
  int64_t n, k, ld;  // ld: elements from one row to the next, F32 and BF16 only
  const void* scales = nullptr;
};

// Bytes of a row's values and scales in the form above.
int64_t quantized_row_bytes(WeightFormat format, int64_t k);
int64_t quantized_scale_bytes(WeightFormat format, int64_t k);

// One row of k weights: q [k padded to a multiple of 64], one per byte (I8: two's complement), and its scales as above. Where a weight is not finite,
// its scale is NaN and the result is false.
bool quantize_row(const float* w, int64_t k, WeightFormat format, uint8_t* q, void* scales);

// A matrix in F32 or BF16 to I8 or I4, in the form above. CheckpointError where a weight of `name` is not finite.
void quantize_matrix(const WeightSource& source, WeightFormat format, void* values, void* scales, const char* name);

}  // namespace dllm::ops
