// Weights from a checkpoint's row-major matrices into the kernel's panels (linear.h).
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "ops/linear.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace dllm::ops {
namespace {

// Row `index` of sources stacked along N.
struct SourceRow {
  const void* data;
  DType dtype;
};

SourceRow stacked_row(const WeightSource* sources, int count, int64_t index) {
  for (int s = 0; s < count; ++s) {
    if (index < sources[s].n)
      return {static_cast<const char*>(sources[s].data) + size_t(index * sources[s].ld) * size_of(sources[s].dtype),
              sources[s].dtype};
    index -= sources[s].n;
  }
  return {nullptr, DType::F32};
}

template <class To, class From>
To convert(From x) {
  if constexpr (std::is_same_v<To, From>)
    return x;
  else if constexpr (std::is_same_v<To, float>)
    return bf16_to_float(x);
  else
    return float_to_bf16(x);
}

// Terms [begin, end) of one source row into column `column` of a panel. In bf16 pairs along K lie side by side; `begin`
// is even.
template <class To, class From>
void pack_column(const void* row, int64_t begin, int64_t end, int column, To* panel) {
  const From* from = static_cast<const From*>(row);
  if constexpr (sizeof(To) == 4) {
    To* to = panel + column;
    for (int64_t i = begin; i < end; ++i) to[i * kPanel] = convert<To>(from[i]);
  } else {
    To* to = panel + column * 2;
    int64_t i = begin;
    for (; i + 2 <= end; i += 2) {
      const To pair[2] = {convert<To>(from[i]), convert<To>(from[i + 1])};
      std::memcpy(to + i * kPanel, pair, sizeof pair);
    }
    if (i < end) to[i * kPanel] = convert<To>(from[i]);
  }
}

template <class To>
void pack_column(SourceRow row, int64_t begin, int64_t end, int column, To* panel) {
  if (row.dtype == DType::F32)
    pack_column<To, float>(row.data, begin, end, column, panel);
  else
    pack_column<To, uint16_t>(row.data, begin, end, column, panel);
}

// row_of(panel, column) names the source row of a panel's column; its data is null in the padding.
template <class RowOf>
PackedLinear pack(int64_t n, int64_t k, DType dtype, const RowOf& row_of) {
  PackedLinear w;
  w.n = n;
  w.k = k;
  w.dtype = dtype;
  const int64_t panel_elements = w.k_padded() * kPanel;
  w.weight = Buffer(checked_bytes("packed weights", size_t(w.panels()), size_t(panel_elements), size_of(dtype)),
                    "packed weights");
  constexpr int64_t kBlock = 128;  // along K: what is written stays in L1 until all 32 columns are there
  parallel_for(w.panels(), std::max<int64_t>(1, 65536 / std::max<int64_t>(1, panel_elements)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t p = begin; p < end; ++p)
                   for (int64_t i = 0; i < k; i += kBlock)
                     for (int c = 0; c < kPanel; ++c) {
                       const SourceRow row = row_of(p, c);
                       if (!row.data) continue;
                       const int64_t stop = std::min(k, i + kBlock);
                       if (dtype == DType::F32)
                         pack_column(row, i, stop, c, w.weight.as<float>() + p * panel_elements);
                       else
                         pack_column(row, i, stop, c, w.weight.as<uint16_t>() + p * panel_elements);
                     }
               });
  return w;
}

}  // namespace

PackedLinear pack_linear(const WeightSource* sources, int count, DType dtype) {
  if (count < 1) fail<UsageError>("pack_linear: no source");
  int64_t n = 0;
  for (int s = 0; s < count; ++s) {
    if (sources[s].k != sources[0].k)
      fail<UsageError>("pack_linear: sources have ", sources[0].k, " and ", sources[s].k, " input columns");
    n += sources[s].n;
  }
  return pack(n, sources[0].k, dtype, [&](int64_t panel, int column) {
    const int64_t row = panel * kPanel + column;
    return row < n ? stacked_row(sources, count, row) : SourceRow{nullptr, DType::F32};
  });
}

PackedLinear pack_gate_up(const WeightSource& gate, const WeightSource& up, DType dtype) {
  if (gate.n != up.n || gate.k != up.k)
    fail<UsageError>("pack_gate_up: gate is [", gate.n, ", ", gate.k, "] but up is [", up.n, ", ", up.k, "]");
  constexpr int kHalf = kPanel / 2;
  PackedLinear w = pack(2 * gate.n, gate.k, dtype, [&](int64_t panel, int column) {
    const int64_t row = panel * kHalf + column % kHalf;
    return row < gate.n ? stacked_row(column < kHalf ? &gate : &up, 1, row) : SourceRow{nullptr, DType::F32};
  });
  w.gate_up = true;
  return w;
}

}  // namespace dllm::ops
