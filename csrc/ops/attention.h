// Attention of the step's query rows over every cached position of their own sequence (bidirectional, no mask):
//   out[r, h, :] = softmax(scale * q[r, h, :] K[:, h / group, :]^T) V[:, h / group, :]
// Query rows are scattered positions; sequences of a batch are ragged and packed one after the other, without padding.
//
// The keys of a sequence are cut into equal chunks c of at most 512, whose number depends on n_keys alone. With x_j a
// row's scaled scores in a head,
//   m_c = max x_j    e_j = exp(x_j - m_c)    s_c = sum e_j    a_c = sum e_j V[j]       over the keys j of chunk c
//   M = max m_c      w_c = exp(m_c - M) / sum_c exp(m_c - M) s_c                       over the chunks, in order
//   out = sum_c w_c a_c
// in fp32. It is always computed so, whether one thread takes all chunks of a row or several threads share them, and a
// row's result therefore does not depend on the threads or on the rows beside it.
//
// A sequence may ask for the mean over heads of its rows' probabilities as well:
//   mean[r, j] = sum over h = 0, 1, ... of e_j w_c / n_heads                           c the chunk of key j
// It comes from the exponentials that the output is made of: no second Q K^T, and `out` has the same bits either way.
#pragma once

#include <cstdint>

#include "ops/kv_layout.h"
#include "runtime/dtype.h"

namespace dllm::ops {

struct AttentionSequence {
  int64_t row_begin, row_end;  // packed rows of this sequence
  int64_t n_keys;  // positions [0, n_keys) are attended
  KvSlab slab;
  float* mean = nullptr;  // [row_end - row_begin, >= n_keys]: columns [0, n_keys) are written; or null
  int64_t ld_mean = 0;
};

struct AttentionArgs {
  const void* q;  // [rows, n_heads * head_dim] of `dtype`, rotated
  int64_t ldq;
  DType dtype;
  int n_heads, n_kv, head_dim;
  float scale;
  const AttentionSequence* sequences;
  int64_t n_sequences;
  void* out;  // [rows, n_heads * head_dim] of `dtype`
  int64_t ldo;
};
void attention(const AttentionArgs& args);

}  // namespace dllm::ops
