// What the kernels' arguments have in common, from numpy arrays, with the checks that keep kernels within their arrays.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/cuda/call.h"
#include "ops/cuda/step.h"

namespace dllm {

using Array = pybind11::array;
using Slabs = std::vector<std::pair<Array, Array>>;  // (k, v) of every sequence, [n_kv, capacity, head_dim] each
using Rows = std::tuple<Array, Array, Array>;  // row, position, sequence, int32 [count] each
using OutList = std::tuple<Array, Array, Array, Array, Array>;  // the same [capacity], sequences [n, 3], count [1]

// Of an array that is checked elsewhere.
inline int32_t size(const Array& a, int axis = 0) { return axis < a.ndim() ? int32_t(a.shape(axis)) : 0; }

// Every element of an int32 array, already checked, in [0, end).
void check_range(const Array& a, int64_t end, const char* what);
void check_capacity(int64_t rows, int64_t capacity);
// Row by row, a position that its sequence has; capacity[s] is how many there are. Both arrays already checked.
void check_positions(const Array& position, const Array& sequence, const std::vector<int32_t>& capacity);

// [n, 3]: begin, end, n_keys. Rows follow one another without gaps.
const ops::cuda::SequenceRows* sequence_rows(Call& call, const Array& a, int64_t rows, int64_t keys);

struct KvSlabs {
  int32_t n, n_kv, head_dim;
  std::vector<int32_t> capacity;
  const ops::cuda::KvView* views;

  KvSlabs(Call& call, DType t, const Slabs& slabs, bool changed);
  void check_sequences(const Array& sequences) const;  // already checked by sequence_rows
  void check_heads(int32_t n_heads) const;
};

// Slabs [positions, d] of kept features.
struct FeatureSlabs {
  std::vector<int32_t> capacity;
  void* const* views;

  FeatureSlabs(Call& call, DType t, const std::vector<Array>& slabs, int32_t d, bool changed);
};

// A list whose rows are below x_rows, and its positions in slabs of these capacities. No `sequences`.
ops::cuda::RowList row_list(Call& call, const Rows& rows, int32_t list_capacity, int64_t x_rows,
                            const std::vector<int32_t>& capacity);
ops::cuda::RowList out_list(Call& call, const OutList& lists, int32_t capacity, int32_t n_sequences);

}  // namespace dllm
