// One layer's K and V of one sequence, addressed by position. K is stored rotated. The CPU layout is the one the GEMM
// kernel reads as its right-hand side, so that attention is two small GEMMs and nothing is ever copied or transposed:
//   K  F32 [n_kv][capacity/32][head_dim][32]         BF16 [n_kv][capacity/32][head_dim/2][32][2]
//   V  F32 [n_kv][hd_pad/32][capacity][32]           BF16 [n_kv][hd_pad/32][capacity/2][32][2]
// capacity is a multiple of 32, hd_pad = head_dim rounded up to 32; head_dim is even. All padding is zero.
#pragma once

#include <cstdint>

#include "runtime/dtype.h"

namespace dllm::ops {

struct KvSlab {
  void* k = nullptr;
  void* v = nullptr;
  int64_t capacity = 0;
  int n_kv = 0, head_dim = 0;
  DType dtype = DType::F32;

  int64_t hd_pad() const { return (head_dim + 31) / 32 * 32; }
  int64_t k_elements() const { return int64_t(n_kv) * capacity * head_dim; }
  int64_t v_elements() const { return int64_t(n_kv) * capacity * hd_pad(); }

  // Element offsets of K[position][kv head][i] and V[position][kv head][i].
  int64_t k_offset(int64_t pos, int head, int i) const {
    const int64_t panel = (int64_t(head) * (capacity / 32) + pos / 32) * head_dim * 32;
    return dtype == DType::F32 ? panel + int64_t(i) * 32 + pos % 32
                               : panel + int64_t(i / 2) * 64 + (pos % 32) * 2 + i % 2;
  }
  int64_t v_offset(int64_t pos, int head, int i) const {
    const int64_t panel = (int64_t(head) * (hd_pad() / 32) + i / 32) * capacity * 32;
    return dtype == DType::F32 ? panel + pos * 32 + i % 32 : panel + (pos / 2) * 64 + (i % 32) * 2 + pos % 2;
  }
};

// Copies K and V of `positions` out as fp32 [n][n_kv][head_dim] (tests, and policies that look at cached values).
void read_kv(const KvSlab& slab, const int32_t* positions, int64_t n, float* k_out, float* v_out);

}  // namespace dllm::ops
