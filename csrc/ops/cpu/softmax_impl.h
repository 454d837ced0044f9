// Softmax over a chunk of attention scores.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

// Online softmax (Milakov & Gimelshein, 2018). With m the maximum so far and m' the new one,
//   sum = sum exp(m - m') + sum_j exp(x_j - m') ;  acc = acc exp(m - m')   and the caller adds P V to acc.
void softmax_chunk(const SoftmaxChunk& args) {
  const int64_t padded = (args.n + kColumns - 1) / kColumns * kColumns;
  const vf scale = splat(args.scale);
  for (int64_t r = 0; r < args.rows; ++r) {
    float* x = args.scores + r * args.lds;
    for (int64_t i = args.n; i < padded; ++i) x[i] = -kInf;  // scale is positive: stays -inf

    vf highest = splat(-kInf);
    for (int64_t i = 0; i < padded; i += W) highest = max(highest, load(x + i));
    float m = max_of(highest) * args.scale;
    const float before = args.first ? m : args.max[r];
    if (before > m) m = before;

    vf total = {};
    for (int64_t i = 0; i < padded; i += W) {
      const vf e = exp(fma(load(x + i), scale, splat(-m)));
      total += e;
      store(x + i, e);
      if (args.bf16) store_bf16(args.bf16 + r * args.ldb + i, e);
    }
    const float added = sum(total);
    args.max[r] = m;
    if (args.first) {
      args.sum[r] = added;
      continue;
    }
    const float shrink = exp(splat(before - m))[0];
    args.sum[r] = args.sum[r] * shrink + added;
    float* acc = args.acc + r * args.lda;
    for (int64_t i = 0; i < args.width; i += W) store(acc + i, load(acc + i) * splat(shrink));
  }
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
