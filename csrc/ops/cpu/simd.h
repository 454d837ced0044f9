// A vector of DLLM_WIDTH floats on the compiler's vector extensions, with intrinsics where those say it better. Included
// by one translation unit per instruction set; all of it has internal linkage (see kernels.h).
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DLLM_INLINE inline __attribute__((always_inline))

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

constexpr int W = DLLM_WIDTH;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
// The same types in memory: any alignment, any declared type.
typedef float vf_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu_mem __attribute__((vector_size(W * 4), aligned(2), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef uint32_t u32_mem __attribute__((aligned(2), may_alias));

constexpr float kInf = __builtin_inff();

DLLM_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
DLLM_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_mem*>(p) = v; }
DLLM_INLINE vu load_bits(const uint16_t* p) { return *reinterpret_cast<const vu_mem*>(p); }
DLLM_INLINE vf splat(float x) { return x - vf{}; }  // x - 0 is x for every x, -0 and NaN included
DLLM_INLINE vf as_float(vu v) { return reinterpret_cast<vf>(v); }
DLLM_INLINE vu as_bits(vf v) { return reinterpret_cast<vu>(v); }
DLLM_INLINE float as_float(uint32_t u) { return __builtin_bit_cast(float, u); }
DLLM_INLINE uint32_t as_bits(float f) { return __builtin_bit_cast(uint32_t, f); }

// a * b + c, in one rounding where the CPU can.
DLLM_INLINE vf fma(vf a, vf b, vf c) {
#if DLLM_WIDTH == 16
  return _mm512_fmadd_ps(a, b, c);
#elif DLLM_WIDTH == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Where b is NaN the result is b: pass the value that may be NaN second, and NaN survives.
// (With AVX-512 the zero-masking forms: the plain ones make GCC 12 warn of an uninitialised operand.)
DLLM_INLINE vf max(vf a, vf b) {
#if DLLM_WIDTH == 16
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif DLLM_WIDTH == 8
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

DLLM_INLINE vf min(vf a, vf b) {
#if DLLM_WIDTH == 16
  return _mm512_maskz_min_ps(0xffff, a, b);
#elif DLLM_WIDTH == 8
  return _mm256_min_ps(a, b);
#elif defined(__x86_64__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Reductions take halves together, so their order is the same whatever the compiler makes of them.
template <class Combine>
DLLM_INLINE float reduce(vf v, const Combine& combine) {
#if DLLM_WIDTH >= 8
#if DLLM_WIDTH == 16
  const __m256 h = combine(_mm512_maskz_extractf32x8_ps(0xff, v, 0), _mm512_maskz_extractf32x8_ps(0xff, v, 1));
#else
  const __m256 h = v;
#endif
  __m128 q = combine(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = combine(q, _mm_movehl_ps(q, q));
  q = combine(q, _mm_movehdup_ps(q));
  return q[0];
#else
  const vf w = combine(v, vf{v[2], v[3], v[2], v[3]});
  return combine(w, vf{w[1], w[1], w[1], w[1]})[0];
#endif
}
DLLM_INLINE float sum(vf v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
DLLM_INLINE float max_of(vf v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Lanes are 0 or -1, as comparisons give them.
DLLM_INLINE bool any(vi m) {
#if DLLM_WIDTH == 16
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(m)) != 0;
#elif DLLM_WIDTH == 8
  return _mm256_movemask_ps(reinterpret_cast<__m256>(m)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(m)) != 0;
#else
  int32_t r = 0;
  for (int i = 0; i < W; ++i) r |= m[i];
  return r != 0;
#endif
}

// bf16 is the upper half of an fp32. Rounding is to nearest, ties to even; NaN stays NaN.
DLLM_INLINE vf widen(const uint16_t* p) {
  return as_float(__builtin_convertvector(*reinterpret_cast<const vh_mem*>(p), vu) << 16);
}

DLLM_INLINE void store_bf16(uint16_t* p, vf v) {
#ifdef DLLM_DOT_BF16
  // Values below 2^-126 become 0 here.
  *reinterpret_cast<vh_mem*>(p) = (vh)_mm512_maskz_cvtneps_pbh(0xffff, v);
#else
  const vu u = as_bits(v);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  *reinterpret_cast<vh_mem*>(p) = __builtin_convertvector(v == v ? rounded : quiet, vh);
#endif
}

DLLM_INLINE uint16_t to_bf16(float f) {
  const uint32_t u = as_bits(f);
  return uint16_t(f == f ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : (u >> 16) | 0x40u);
}

// exp(x) for x <= 88: with n = round(x / ln 2) and r = x - n ln 2 (ln 2 in two parts, the first exact in the product),
// exp(x) = 2^n (1 + r + r^2 p(r)), p minimax of degree 4 on |r| <= ln(2) / 2 (relative error 1e-8). Results below
// 2^-126 are 0; NaN stays NaN.
constexpr float kExpLow = -87.33654f;
constexpr float kExpHigh = 88.0f;

DLLM_INLINE vf exp(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const vf y = min(splat(kExpHigh), max(splat(kExpLow), x));
  const vf shifted = fma(y, splat(1.44269504088896f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), y);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(0.0013926213f);
  p = fma(p, r, splat(0.008363203f));
  p = fma(p, r, splat(0.041666556f));
  p = fma(p, r, splat(0.16666576f));
  p = fma(p, r, splat(0.5f));
  const vf e = fma(p, r * r, r) + 1.0f;
  const vf power = as_float((as_bits(shifted) + 127u) << 23);
  const vf result = e * power;
  return x < splat(kExpLow) ? vf{} : result;
}

// 2^x for x <= 127: with n = round(x) and r = x - n, 2^n p(r), p minimax of degree 6 on |r| <= 1/2 (relative error 3e-9).
// Results below 2^-126 are 0 or rounded as such numbers are; NaN stays NaN.
DLLM_INLINE vf exp2(vf x) {
#if DLLM_WIDTH == 16
  const vf r = _mm512_maskz_reduce_ps(0xffff, x, 0);  // 0 where x is -inf
  const vf n = x - r;
#else
  constexpr float kLow = -126.0f;
  const vf magic = splat(12582912.0f);
  const vf y = max(splat(kLow), x);
  const vf shifted = y + magic, n = shifted - magic, r = y - n;
#endif
  vf p = splat(0.000155946778f);
  p = fma(p, r, splat(0.00134066434f));
  p = fma(p, r, splat(0.00961769279f));
  p = fma(p, r, splat(0.0555031039f));
  p = fma(p, r, splat(0.240226522f));
  p = fma(p, r, splat(0.693147242f));
  p = fma(p, r, splat(1.0f));
#if DLLM_WIDTH == 16
  return _mm512_maskz_scalef_ps(0xffff, p, n);
#else
  const vf result = p * as_float((as_bits(shifted) + 127u) << 23);
  return x < splat(kLow) ? vf{} : result;
#endif
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
