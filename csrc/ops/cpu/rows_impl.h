// Loops over one row: GEMM epilogues, RMSNorm, rotary embedding, scaling and widening.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

// Writes n elements as fp32 or bf16; n may be anything. vector(i) is elements i to i + W - 1, and rest(i, y) puts those from i
// on, fewer than W, at y.
template <class Vector, class Rest>
DLLM_INLINE void write_row(int64_t n, void* out, bool bf16, const Vector& vector, const Rest& rest) {
  float* wide = static_cast<float*>(out);
  uint16_t* narrow = static_cast<uint16_t*>(out);
  int64_t i = 0;
  if (bf16)
    for (; i + W <= n; i += W) store_bf16(narrow + i, vector(i));
  else
    for (; i + W <= n; i += W) store(wide + i, vector(i));
  if (i == n) return;
  alignas(64) float y[W];
  rest(i, y);
  for (int64_t j = 0; i < n; ++i, ++j) {
    if (bf16)
      narrow[i] = to_bf16(y[j]);
    else
      wide[i] = y[j];
  }
}

void write(const WriteArgs& args) {
  constexpr int kHalf = int(kColumns) / 2;
  for (int64_t r = 0; r < args.rows; ++r) {
    const float* c = args.c + r * kColumns;
    const int64_t to = (args.out_rows ? args.out_rows[r] : r) * args.ldo;
    void* out = static_cast<char*>(args.out) + to * (args.bf16 ? 2 : 4);
    const auto sum = [&](int64_t j) { return args.bias ? load(c + j) + load(args.bias + j) : load(c + j); };
    const auto write_all = [&](const auto& value) {
      write_row(args.columns, out, args.bf16, value, [&](int64_t j, float* y) { store(y, value(j)); });
    };
    switch (args.what) {
      case Write::Store:
        write_all(sum);
        break;
      case Write::SiluMul:  // silu(g) u = g / (1 + exp(-g)) u
        write_all([&](int64_t j) {
          const vf gate = sum(j), up = sum(kHalf + j);
          return gate / (1.0f + exp(-gate)) * up;
        });
        break;
      case Write::AddTo: {
        const float* before = static_cast<const float*>(out);
        write_row(
            args.columns, out, false, [&](int64_t j) { return load(before + j) + sum(j); },
            [&](int64_t j, float* y) {
              store(y, sum(j));
              for (int64_t i = 0; j + i < args.columns; ++i) y[i] += before[j + i];
            });
        break;
      }
    }
  }
}

void scale_row(const float* x, float scale, int64_t n, void* out, bool bf16) {
  write_row(
      n, out, bf16, [&](int64_t i) { return load(x + i) * scale; },
      [&](int64_t i, float* y) {
        for (int64_t j = 0; i + j < n; ++j) y[j] = x[i + j] * scale;
      });
}

void axpy(float factor, const void* x, bool bf16, int64_t n, float* out) {
  const vf f = splat(factor);
  int64_t i = 0;
  if (bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(x);
    for (; i + W <= n; i += W) store(out + i, fma(widen(p + i), f, load(out + i)));
    for (; i < n; ++i) out[i] += as_float(uint32_t(p[i]) << 16) * factor;
  } else {
    const float* p = static_cast<const float*>(x);
    for (; i + W <= n; i += W) store(out + i, fma(load(p + i), f, load(out + i)));
    for (; i < n; ++i) out[i] += p[i] * factor;
  }
}

void rms_norm_row(const float* x, const float* weight, float eps, int64_t n, void* out, bool bf16) {
  // Four vectors of partial sums: shorter chains of additions are faster and more accurate.
  vf squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int u = 0; u < 4; ++u) {
      const vf v = load(x + i + u * W);
      squares[u] = fma(v, v, squares[u]);
    }
  for (; i + W <= n; i += W) {
    const vf v = load(x + i);
    squares[0] = fma(v, v, squares[0]);
  }
  float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < n; ++i) total += x[i] * x[i];
  const float inverse = 1.0f / __builtin_sqrtf(total / float(n) + eps);

  write_row(
      n, out, bf16, [&](int64_t at) { return load(x + at) * splat(inverse) * load(weight + at); },
      [&](int64_t at, float* y) {
        for (int64_t j = 0; at + j < n; ++j) y[j] = x[at + j] * inverse * weight[at + j];
      });
}

// Rotates a head's two halves: (lo, hi) -> (lo cos - hi sin, hi cos + lo sin).
void rotate(const RotateArgs& args) {
  const float *lo = args.x, *hi = args.x + args.half, *cos = args.cos, *sin = args.sin;
  const int64_t half = args.half;
  const auto halves = [&](const float* a, const float* b, auto&& combine, void* out) {
    write_row(
        half, out, args.bf16,
        [&](int64_t i) { return combine(load(a + i) * load(cos + i), load(b + i) * load(sin + i)); },
        [&](int64_t i, float* y) {
          for (int64_t j = 0; i + j < half; ++j) y[j] = combine(a[i + j] * cos[i + j], b[i + j] * sin[i + j]);
        });
  };
  halves(lo, hi, [](auto x, auto y) { return x - y; }, args.out);
  halves(hi, lo, [](auto x, auto y) { return x + y; }, static_cast<char*>(args.out) + half * (args.bf16 ? 2 : 4));
}

void widen_row(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, widen(x + i));
  for (; i < n; ++i) out[i] = as_float(uint32_t(x[i]) << 16);
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
