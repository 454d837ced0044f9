// Sums for the cosine similarity of two rows of values.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

constexpr int D = W / 2;  // doubles per vector
constexpr int kLanes = 8;  // partial sums: element i of a panel belongs to number i % 8, whatever D is

typedef double vd __attribute__((vector_size(D * 8)));
typedef float vf_half __attribute__((vector_size(D * 4)));
typedef float vf_half_mem __attribute__((vector_size(D * 4), aligned(4), may_alias));

DLLM_INLINE vd load_double(const float* p) {
  return __builtin_convertvector(vf_half(*reinterpret_cast<const vf_half_mem*>(p)), vd);
}

// bf16 and back.
DLLM_INLINE vf round_bf16(vf v) {
  const vu u = as_bits(v);
  const vf rounded = as_float((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
  return v == v ? rounded : v;
}

// Products of two fp32 values are exact in fp64: a fused multiply-add would round the same.
void compare_values(const CompareArgs& args, CompareSums* out) {
  constexpr int kPartials = kLanes / D;
  vd dot[kPartials] = {}, v_square[kPartials] = {}, cached_square[kPartials] = {};
  const char* panel = static_cast<const char*>(args.cached);
  for (int64_t head = 0; head < args.n_kv; ++head)
    for (int64_t i = 0; i < args.head_dim; i += kColumns, panel += args.panel_stride * (args.bf16 ? 2 : 4)) {
      alignas(64) float a[kColumns], b[kColumns];
      const float* v = args.v + head * args.head_dim + i;
      const int64_t n = args.head_dim - i < kColumns ? args.head_dim - i : kColumns;
      if (n < kColumns) {
        for (int64_t j = 0; j < kColumns; ++j) a[j] = j < n ? v[j] : 0.0f;
        v = a;
      }
      const float* cached = reinterpret_cast<const float*>(panel);
      if (args.bf16) {
        for (int j = 0; j < kColumns; j += W) {
          const vu pair = load_bits(reinterpret_cast<const uint16_t*>(panel) + 2 * j);
          store(a + j, round_bf16(load(v + j)));
          store(b + j, as_float(args.odd ? pair & 0xffff0000u : pair << 16));
        }
        v = a;
        cached = b;
      }
      for (int j = 0; j < kColumns; j += kLanes)
        for (int u = 0; u < kPartials; ++u) {
          const vd x = load_double(v + j + u * D), y = load_double(cached + j + u * D);
          dot[u] += x * y;
          v_square[u] += x * x;
          cached_square[u] += y * y;
        }
    }
  const auto sum8 = [](const vd* partial) {
    double lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = partial[i / D][i % D];
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
  };
  *out = {sum8(dot), sum8(v_square), sum8(cached_square)};
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
