// Weights from a checkpoint's row-major matrices into the kernel's panels (linear.h).
#include <algorithm>

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

template <class To>
To convert(SourceRow row, int64_t i) {
  if constexpr (sizeof(To) == 2) {
    return row.dtype == DType::BF16 ? static_cast<const uint16_t*>(row.data)[i]
                                    : float_to_bf16(static_cast<const float*>(row.data)[i]);
  } else {
    return row.dtype == DType::BF16 ? bf16_to_float(static_cast<const uint16_t*>(row.data)[i])
                                    : static_cast<const float*>(row.data)[i];
  }
}

// One source row into column `column` of a panel. `pair` terms along K lie side by side.
template <class To, int kPair>
void pack_column(SourceRow row, int64_t begin, int64_t end, int column, To* panel) {
  for (int64_t i = begin; i < end; ++i)
    panel[i / kPair * kPair * kPanel + column * kPair + i % kPair] = convert<To>(row, i);
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
                         pack_column<float, 1>(row, i, stop, c, w.weight.as<float>() + p * panel_elements);
                       else
                         pack_column<uint16_t, 2>(row, i, stop, c, w.weight.as<uint16_t>() + p * panel_elements);
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
