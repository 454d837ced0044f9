#include "bindings/cuda/arguments.h"

namespace py = pybind11;

namespace dllm {

using namespace ops::cuda;

void check_range(const Array& a, int64_t end, const char* what) {
  const int32_t* v = static_cast<const int32_t*>(a.data());
  for (py::ssize_t i = 0; i < a.size(); ++i)
    if (v[i] < 0 || v[i] >= end) fail<UsageError>(what, "[", i, "] = ", v[i], " is not in [0, ", end, ")");
}

void check_capacity(int64_t rows, int64_t capacity) {
  if (rows > capacity) fail<UsageError>(rows, " rows are more than the capacity ", capacity);
}

void check_positions(const Array& position, const Array& sequence, const std::vector<int32_t>& capacity) {
  check_range(sequence, int64_t(capacity.size()), "sequence");
  const int32_t *p = static_cast<const int32_t*>(position.data()), *s = static_cast<const int32_t*>(sequence.data());
  for (py::ssize_t i = 0; i < position.size(); ++i)
    if (p[i] < 0 || p[i] >= capacity[size_t(s[i])])
      fail<UsageError>("position[", i, "] = ", p[i], " is not in [0, ", capacity[size_t(s[i])], ")");
}

const SequenceRows* sequence_rows(Call& call, const Array& a, int64_t rows, int64_t keys) {
  static_assert(sizeof(SequenceRows) == 3 * sizeof(int32_t));
  const int32_t* to = call.in<int32_t>(a, "sequences", {-1, 3});
  const SequenceRows* s = static_cast<const SequenceRows*>(a.data());
  for (int32_t i = 0; i < size(a); ++i) {
    if (s[i].begin != (i ? s[i - 1].end : 0) || s[i].end < s[i].begin || s[i].end > rows)
      fail<UsageError>("sequences[", i, "]: rows [", s[i].begin, ", ", s[i].end, ") of ", rows);
    if (s[i].n_keys < 0 || s[i].n_keys > keys) fail<UsageError>("sequences[", i, "]: ", s[i].n_keys, " keys of ", keys);
  }
  return reinterpret_cast<const SequenceRows*>(to);
}

KvSlabs::KvSlabs(Call& call, DType t, const Slabs& slabs, bool changed) : n(int32_t(slabs.size())) {
  if (slabs.empty()) fail<UsageError>("no slab");
  n_kv = size(slabs[0].first), head_dim = size(slabs[0].first, 2);
  std::vector<KvView> list;
  for (const auto& [k, v] : slabs) {
    capacity.push_back(size(k, 1));
    const Call::Shape shape{n_kv, capacity.back(), head_dim};
    const auto upload = [&](const Array& a, const char* what) {
      return changed ? call.out(t, a, what, shape) : const_cast<void*>(call.in(t, a, what, shape));
    };
    void* const keys = upload(k, "k");
    list.push_back({keys, upload(v, "v"), capacity.back()});
  }
  if (n_kv < 1 || head_dim < 1) fail<UsageError>("k: is empty");
  views = call.values(list, "slabs");
}

void KvSlabs::check_sequences(const Array& sequences) const {
  if (size(sequences) != n) fail<UsageError>("sequences: expected ", n, ", got ", size(sequences));
  const SequenceRows* s = static_cast<const SequenceRows*>(sequences.data());
  for (int32_t i = 0; i < n; ++i)
    if (s[i].n_keys > capacity[size_t(i)])
      fail<UsageError>("sequences[", i, "]: ", s[i].n_keys, " keys of ", capacity[size_t(i)]);
}

void KvSlabs::check_heads(int32_t n_heads) const {
  if (n_heads < 1 || n_heads % n_kv) fail<UsageError>("n_heads = ", n_heads, " over n_kv = ", n_kv);
}

FeatureSlabs::FeatureSlabs(Call& call, DType t, const std::vector<Array>& slabs, int32_t d, bool changed) {
  std::vector<void*> list;
  for (const Array& a : slabs) {
    capacity.push_back(size(a));
    list.push_back(changed ? call.out(t, a, "slab", {-1, d}) : const_cast<void*>(call.in(t, a, "slab", {-1, d})));
  }
  views = call.values(list, "slabs");
}

RowList row_list(Call& call, const Rows& rows, int32_t list_capacity, int64_t x_rows,
                 const std::vector<int32_t>& capacity) {
  const auto& [row, position, sequence] = rows;
  const int32_t n = size(row);
  check_capacity(n, list_capacity);
  RowList list{};
  list.row = const_cast<int32_t*>(call.in<int32_t>(row, "row", {n}));
  list.position = const_cast<int32_t*>(call.in<int32_t>(position, "position", {n}));
  list.sequence = const_cast<int32_t*>(call.in<int32_t>(sequence, "sequence", {n}));
  list.count = call.count(n);
  list.capacity = list_capacity;
  check_range(row, x_rows, "row");
  check_positions(position, sequence, capacity);
  return list;
}

RowList out_list(Call& call, const OutList& lists, int32_t capacity, int32_t n_sequences) {
  const auto& [row, position, sequence, sequences, count] = lists;
  return {call.out<int32_t>(row, "row", {capacity}),
          call.out<int32_t>(position, "position", {capacity}),
          call.out<int32_t>(sequence, "sequence", {capacity}),
          reinterpret_cast<SequenceRows*>(call.out<int32_t>(sequences, "sequences", {n_sequences, 3})),
          call.out<int32_t>(count, "count", {1}),
          capacity};
}

}  // namespace dllm
