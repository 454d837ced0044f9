// Loops over one row: GEMM epilogues, RMSNorm, rotary embedding, scaling and widening.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

// Writes n floats from `from` as fp32 or bf16; n may be anything.
DLLM_INLINE void write_values(const float* from, int64_t n, void* out, int64_t offset, bool bf16) {
  int64_t i = 0;
  if (bf16) {
    uint16_t* p = static_cast<uint16_t*>(out) + offset;
    for (; i + W <= n; i += W) store_bf16(p + i, load(from + i));
    for (; i < n; ++i) p[i] = to_bf16(from[i]);
  } else {
    float* p = static_cast<float*>(out) + offset;
    for (; i + W <= n; i += W) store(p + i, load(from + i));
    for (; i < n; ++i) p[i] = from[i];
  }
}

void write(const WriteArgs& args) {
  constexpr int kHalf = int(kColumns) / 2;
  alignas(64) float y[kColumns];
  for (int64_t r = 0; r < args.rows; ++r) {
    const float* c = args.c + r * kColumns;
    const int64_t to = (args.out_rows ? args.out_rows[r] : r) * args.ldo;
    for (int j = 0; j < kColumns; j += W) {
      const vf v = load(c + j);
      store(y + j, args.bias ? v + load(args.bias + j) : v);
    }
    if (args.what == Write::SiluMul)  // silu(g) u = g / (1 + exp(-g)) u
      for (int j = 0; j < kHalf; j += W) {
        const vf gate = load(y + j), up = load(y + kHalf + j);
        store(y + j, gate / (1.0f + exp(-gate)) * up);
      }
    if (args.what == Write::AddTo) {
      float* out = static_cast<float*>(args.out) + to;
      int64_t j = 0;
      for (; j + W <= args.columns; j += W) store(out + j, load(out + j) + load(y + j));
      for (; j < args.columns; ++j) out[j] += y[j];
    } else {
      write_values(y, args.columns, args.out, to, args.bf16);
    }
  }
}

void scale_row(const float* x, float scale, int64_t n, void* out, bool bf16) {
  alignas(64) float y[W];
  const vf s = splat(scale);
  for (int64_t i = 0; i < n; i += W) {
    const int64_t here = n - i < W ? n - i : W;
    if (here == W) {
      store(y, load(x + i) * s);
    } else {
      for (int64_t j = 0; j < here; ++j) y[j] = x[i + j] * scale;
    }
    write_values(y, here, out, i, bf16);
  }
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

  alignas(64) float y[W];
  for (i = 0; i < n; i += W) {
    const int64_t here = n - i < W ? n - i : W;
    if (here == W) {
      store(y, load(x + i) * splat(inverse) * load(weight + i));
    } else {
      for (int64_t j = 0; j < here; ++j) y[j] = x[i + j] * inverse * weight[i + j];
    }
    write_values(y, here, out, i, bf16);
  }
}

// Rotates a head's two halves: (lo, hi) -> (lo cos - hi sin, hi cos + lo sin).
void rotate(const RotateArgs& args) {
  const float *lo = args.x, *hi = args.x + args.half;
  float *out_lo = args.out, *out_hi = args.out + args.half;
  int64_t i = 0;
  for (; i + W <= args.half; i += W) {
    const vf c = load(args.cos + i), s = load(args.sin + i), a = load(lo + i), b = load(hi + i);
    store(out_lo + i, a * c - b * s);
    store(out_hi + i, b * c + a * s);
  }
  for (; i < args.half; ++i) {
    const float c = args.cos[i], s = args.sin[i], a = lo[i], b = hi[i];
    out_lo[i] = a * c - b * s;
    out_hi[i] = b * c + a * s;
  }
}

void widen_row(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, widen(x + i));
  for (; i < n; ++i) out[i] = as_float(uint32_t(x[i]) << 16);
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
