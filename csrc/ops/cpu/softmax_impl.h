// Softmax in chunks of keys (ops/attention.h has the formula).
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/rows_impl.h"
#include "ops/cpu/simd.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

void softmax_chunk(const SoftmaxChunk& args) {
  const int64_t padded = (args.n + kColumns - 1) / kColumns * kColumns;
  const vf scale = splat(args.scale);
  for (int64_t r = 0; r < args.rows; ++r) {
    float* x = args.scores + r * args.lds;
    for (int64_t i = args.n; i < padded; ++i) x[i] = -kInf;  // scale is positive: stays -inf

    vf highest[2] = {splat(-kInf), splat(-kInf)};
    for (int64_t i = 0; i < padded; i += 2 * W)
      for (int u = 0; u < 2; ++u) highest[u] = max(highest[u], load(x + i + u * W));
    const float m = max_of(max(highest[0], highest[1]));
    args.max[r] = m;

    const auto value = [&](int64_t i) { return exp2((load(x + i) - m) * scale); };
    vf total[2] = {};
    if (args.bf16) {
      uint16_t* p = args.bf16 + r * args.ldb;
      for (int64_t i = 0; i < padded; i += 2 * W)
        for (int u = 0; u < 2; ++u) {
          const vf e = value(i + u * W);
          total[u] += e;
          store_bf16(p + i + u * W, e);
          if (args.keep) store(x + i + u * W, e);
        }
    } else {
      for (int64_t i = 0; i < padded; i += 2 * W)
        for (int u = 0; u < 2; ++u) {
          const vf e = value(i + u * W);
          total[u] += e;
          store(x + i + u * W, e);
        }
    }
    args.sum[r] = sum(total[0] + total[1]);
  }
}

void softmax_weights(int64_t rows, int64_t chunks, float scale, float* max_in_weights_out, const float* sums,
                     int64_t ld) {
  for (int64_t r = 0; r < rows; r += W) {
    float* weights = max_in_weights_out + r;
    vf highest = load(weights);
    for (int64_t c = 1; c < chunks; ++c) highest = max(highest, load(weights + c * ld));
    vf total = {};
    for (int64_t c = 0; c < chunks; ++c) {
      const vf w = exp2((load(weights + c * ld) - highest) * splat(scale));
      store(weights + c * ld, w);
      total = fma(w, load(sums + c * ld + r), total);
    }
    const vf inverse = 1.0f / total;
    for (int64_t c = 0; c < chunks; ++c) store(weights + c * ld, load(weights + c * ld) * inverse);
  }
}

void weighted_sum(const WeightedSum& args) {
  const auto sum = [&](int64_t i) {
    const float* x = args.x + i;
    vf total = load(x) * splat(args.weights[0]);
    for (int64_t c = 1; c < args.count; ++c)
      total = fma(load(x + c * args.ldx), splat(args.weights[c * args.ldw]), total);
    return total;
  };
  write_row(args.n, args.out, args.bf16, sum, [&](int64_t i, float* y) { store(y, sum(i)); });
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
