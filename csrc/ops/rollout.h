// Attention rollout (Abnar & Zuidema, 2020), as d2Cache (arXiv 2509.23094) uses it: how much every position feeds into
// the outputs of all positions, through the attention of all layers.
//
// With A^l [rows, T] the head means of layer l (see attention.h) of the computed rows Q, E^l the T x T identity with rows
// Q replaced by those of A^l, and W^l = (E^l + I) / 2, the importance of position j is
//   c_j = sum_i R_ij,     R = W^(N-1) ... W^1 W^0,     so     c = 1^T W^(N-1) ... W^0
// The vector is carried backwards through the layers, which costs rows * T per layer instead of T^3:
//   c = 1;   for l = N-1 ... 0:   u = c[Q];   c[Q] = u / 2;   c += 1/2 u^T A^l
// Rows of A^l sum to 1, so the sum of c stays T.
#pragma once

#include <cstdint>

namespace dllm::ops {

struct RolloutArgs {
  const float* mean;  // [n_layers][n_rows, >= n_keys]
  int64_t layer_stride, ld;  // elements from one layer, one row to the next
  int n_layers;
  const int32_t* rows;  // [n_rows] positions below n_keys, ascending
  int64_t n_rows;
  int64_t n_keys;  // T
  float* importance;  // [n_keys]: c
};
// Every column adds its rows in ascending order, whatever the number of threads.
void rollout(const RolloutArgs& args);

}  // namespace dllm::ops
