// Softmax statistics and the two best ids of one tile of a row's logits.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

constexpr int H = W / 2;
typedef float hf_mem __attribute__((vector_size(H * 4), aligned(4), may_alias));
typedef double vd __attribute__((vector_size(H * 8)));

DLLM_INLINE vd to_double(const float* p) { return __builtin_convertvector(*reinterpret_cast<const hf_mem*>(p), vd); }

DLLM_INLINE double sum(vd v) {
  double total = 0;
  for (int i = 0; i < H; ++i) total += v[i];
  return total;
}

// The lowest index other than `skip` that holds `value`, or -1.
DLLM_INLINE int32_t find(const float* x, int64_t n, float value, int32_t skip) {
  for (int64_t i = 0; i < n; i += W) {
    if (!any(load(x + i) == splat(value))) continue;
    for (int64_t j = i; j < i + W; ++j)
      if (x[j] == value && j != skip) return int32_t(j);
  }
  return -1;
}

// Per lane the two highest values, then the two highest of those: ties appear as equal values, and find() gives them
// their ids, lowest first.
DLLM_INLINE void top_two(const float* x, int64_t n, int32_t first_id, TileStats* out) {
  vf first = splat(-kInf), second = splat(-kInf);
  for (int64_t i = 0; i < n; i += W) {
    const vf v = load(x + i);
    second = max(second, min(first, v));
    first = max(first, v);
  }
  alignas(64) float lanes[2 * W];
  store(lanes, first);
  store(lanes + W, second);
  float best = -kInf, next = -kInf;
  for (float v : lanes) {
    next = v > best ? best : (v > next ? v : next);
    best = v > best ? v : best;
  }
  if (best == -kInf) return;
  const int32_t id = find(x, n, best, -1);
  out->top1 = best;
  out->top1_id = first_id + id;
  if (next == -kInf) return;
  out->top2 = next;
  out->top2_id = first_id + find(x, n, next, id);
}

void tile_stats(float* x, int64_t n, const float* bias, float temperature, int64_t banned, int64_t masked,
                int32_t first_id, TileStats* out) {
  const int64_t padded = (n + kColumns - 1) / kColumns * kColumns;
  if (bias)
    for (int64_t i = 0; i < n; ++i) x[i] += bias[i];
  if (temperature != 1.0f)
    for (int64_t i = 0; i < n; ++i) x[i] /= temperature;
  for (int64_t i = n; i < padded; ++i) x[i] = -kInf;
  if (banned >= 0) x[banned] = -kInf;

  *out = {-kInf, true, -1, -1, -kInf, -kInf, 0.0, 0.0};
  vf highest = splat(-kInf);
  vi bad = {};
  for (int64_t i = 0; i < padded; i += W) {
    const vf v = load(x + i);
    bad |= ~(v < splat(kInf));  // NaN or +inf
    highest = max(highest, v);
  }
  out->finite = !any(bad);
  if (!out->finite) return;
  out->max = max_of(highest);
  if (out->max == -kInf) return;

  const vf m = splat(out->max);
  vd sums[2] = {}, weighted[2] = {};
  for (int64_t i = 0; i < padded; i += W) {
    alignas(64) float d[W], e[W];
    const vf difference = max(splat(-128.0f), load(x + i) - m);  // finite: 0 * -inf would be NaN
    store(d, difference);
    store(e, exp(difference));
    for (int h = 0; h < 2; ++h) {
      const vd weight = to_double(e + h * H);
      sums[h] += weight;
      weighted[h] += weight * to_double(d + h * H);
    }
  }
  out->sum = sum(sums[0]) + sum(sums[1]);
  out->weighted_sum = sum(weighted[0]) + sum(weighted[1]);

  if (masked >= 0) x[masked] = -kInf;
  top_two(x, padded, first_id, out);
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
