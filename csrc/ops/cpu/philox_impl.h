// Philox4x32-10 (philox.h) for many token ids at once: finds the few draws large enough to matter.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

constexpr int Q = W / 2;
typedef uint64_t vq __attribute__((vector_size(Q * 8)));
typedef int64_t vq_mask __attribute__((vector_size(Q * 8)));

// The 64-bit products of the lanes' lower halves.
DLLM_INLINE vq multiply_low(vq a, vq b) {
#if DLLM_WIDTH == 16
  return reinterpret_cast<vq>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif DLLM_WIDTH == 8
  return reinterpret_cast<vq>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<vq>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

DLLM_INLINE vq splat(uint64_t x) { return x + vq{}; }

// A lane holds one id; words are in the lower halves, and what the upper halves hold never reaches a lower one.
int64_t draws_from(const DrawArgs& args, int32_t* columns) {
  vq lane = {};
  for (int j = 0; j < Q; ++j) lane[j] = uint64_t(j);
  const vq m0 = splat(uint64_t(0xD2511F53u)), m1 = splat(uint64_t(0xCD9E8D57u));
  int64_t count = 0;
  for (int64_t i = 0; i < args.n; i += Q) {
    vq c0 = lane + uint64_t(args.first_id + i), c1 = splat(uint64_t(args.position));
    vq c2 = splat(uint64_t(args.step)), c3 = {};
    uint32_t k0 = uint32_t(args.seed), k1 = uint32_t(args.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const vq p0 = multiply_low(m0, c0), p1 = multiply_low(m1, c2);
      c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0);
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1);
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const vq bits = ((c0 & 0xffffffffu) >> 6) << 26 | (c1 & 0xffffffffu) >> 6;
    const vq_mask hit = bits >= splat(args.least);
    if (!any(reinterpret_cast<vi>(hit))) continue;
    for (int j = 0; j < Q && i + j < args.n; ++j)
      if (hit[j]) columns[count++] = int32_t(i + j);
  }
  return count;
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
