// Activations to 8 bits (linear.h), and groups of weights to 4 (quantize.h).
#pragma once

#include "ops/cpu/gemm_i8_impl.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

// q = x * 127 / max|x| rounded to nearest, ties to even.
template <class Load>
DLLM_INLINE void quantize_activations(const QuantizeArgs& args, const Load& at) {
  quantized* out = static_cast<quantized*>(args.out);
  vi most = {};  // bits of magnitudes order as the magnitudes do, infinity and NaN above them
  for (int64_t i = 0; i < args.n; i += W) {
    const vi bits = reinterpret_cast<vi>(as_bits(at(i)) & 0x7fffffffu);
    most = bits > most ? bits : most;
  }
  int32_t highest_bits = 0;
  for (int j = 0; j < W; ++j) highest_bits = highest_bits > most[j] ? highest_bits : most[j];
  const float highest = as_float(uint32_t(highest_bits));
  const bool finite = highest < kInf;
  *args.scale = finite ? highest / 127.0f : __builtin_nanf("");
  float inverse = finite ? 127.0f / highest : 0.0f;
  if (inverse == kInf) inverse = 0;  // of zeros, and of numbers so small that they are taken for zeros
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  int32_t total = 0;
  for (int64_t i = 0; i < args.n_padded; i += kGroup) {
    vi sums = {};
    for (int64_t j = i; j < i + kGroup; j += W) {
      const vf x = inverse > 0 && j < args.n ? at(j) * inverse : vf{};
      const vi q = reinterpret_cast<vi>(as_bits(x + magic)) - reinterpret_cast<vi>(as_bits(magic));
      *reinterpret_cast<quantized_mem*>(out + j) = __builtin_convertvector(q, quantized_mem);
      sums += q;
    }
    int32_t sum = 0;
    for (int l = 0; l < W; ++l) sum += sums[l];
    args.group_offsets[i / kGroup] = -128 * sum;
    total += sum;
  }
  *args.offset = -128 * total;
}

void quantize_row(const QuantizeArgs& args) {
  const int64_t n = args.n;
  const auto tail = [&](int64_t i, auto element) {
    vf v = {};
    for (int l = 0; l < W && i + l < n; ++l) v[l] = element(i + l);
    return v;
  };
  if (args.bf16) {
    const uint16_t* x = static_cast<const uint16_t*>(args.x);
    quantize_activations(args, [&](int64_t i) {
      return i + W <= n ? widen(x + i) : tail(i, [&](int64_t j) { return as_float(uint32_t(x[j]) << 16); });
    });
  } else {
    const float* x = static_cast<const float*>(args.x);
    quantize_activations(
        args, [&](int64_t i) { return i + W <= n ? load(x + i) : tail(i, [&](int64_t j) { return x[j]; }); });
  }
}

// Steps[0] + the steps 1 to 15 that x lies beyond: of I4 values the nearest to x, the smaller of two equally near.
DLLM_INLINE vf climb(vf x, const float (&steps)[16]) {
  vf q = splat(steps[0]);
  DLLM_UNROLL
  for (int j = 1; j < 16; ++j) {
    const float middle = 0.5f * (kI4Values[j - 1] + kI4Values[j]);
    q = x > splat(middle) ? q + steps[j] : q;
  }
  return q;
}

struct I4Steps {
  float value[16], index[16];
  constexpr I4Steps() : value{kI4Values[0]}, index{0} {
    for (int j = 1; j < 16; ++j) {
      value[j] = kI4Values[j] - kI4Values[j - 1];
      index[j] = 1;
    }
  }
};
constexpr I4Steps kSteps;

// Squared errors are added in kPartials chains, whatever the width of a vector is, and not contracted: every instruction set
// chooses the same scale.
float group_error(const float* w, float scale) {
  constexpr int kPartials = 16;
  const vf inverse = splat(1.0f / scale);
  alignas(64) float partial[kPartials] = {};
  for (int64_t i = 0; i < kGroup; i += kPartials)
    for (int j = 0; j < kPartials; j += W) {
      const vf x = load(w + i + j), error = x - climb(x * inverse, kSteps.value) * scale;
      store(partial + j, load(partial + j) + error * error);
    }
  for (int h = kPartials / 2; h > 0; h /= 2)
    for (int j = 0; j < h; ++j) partial[j] += partial[j + h];
  return partial[0];
}

typedef uint8_t index_mem __attribute__((vector_size(W), aligned(1), may_alias));

bool quantize_group(const float* w, uint8_t* index, uint16_t* scale) {
  float extreme = 0, finite = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    if (__builtin_fabsf(w[i]) > __builtin_fabsf(extreme)) extreme = w[i];
    finite += w[i] - w[i];  // NaN for NaN and infinity
  }
  // Powers of two that bring the extreme to [2, 4) and back, where squared errors neither overflow nor vanish. Below 2^-118
  // scales could be subnormal: such a group counts as zeros.
  const uint32_t exponent = as_bits(extreme) >> 23 & 0xffu;
  const bool zero = finite != 0 || exponent < 127 - 118;
  const float down = zero ? 0.0f : as_float((255 - exponent) << 23), up = zero ? 0.0f : as_float((exponent - 1) << 23);
  alignas(64) float unit[kGroup];
  for (int64_t i = 0; i < kGroup; i += W) store(unit + i, zero ? vf{} : load(w + i) * down);

  float best = 0, least = kInf;
  for (const float stretch : kI4Stretches) {
    if (zero) break;
    const float candidate = as_float(uint32_t(to_bf16(extreme * down / (kI4Values[0] * stretch))) << 16);
    const float error = group_error(unit, candidate);
    if (!(error < least)) continue;
    least = error;
    best = candidate;
  }
  *scale = to_bf16(finite == 0 ? best * up : __builtin_nanf(""));
  const float inverse = zero ? 0.0f : 1.0f / best;
  for (int64_t i = 0; i < kGroup; i += W)
    *reinterpret_cast<index_mem*>(index + i) =
        __builtin_convertvector(climb(load(unit + i) * inverse, kSteps.index), index_mem);
  return finite == 0;
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
