// Weights from a checkpoint's row-major matrices into the kernel's panels (linear.h).
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "ops/cpu/source_rows.h"
#include "ops/linear.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace dllm::ops {
namespace {

constexpr int64_t kMaxTerms = 65536;  // of a sum of I8 products: 65536 * 255 * 127 < 2^31

// A row of one of the matrices; null in the padding.
struct SourceRow {
  const WeightSource* source;
  int64_t index;
};

SourceRow stacked_row(const WeightSource* sources, int count, int64_t index) {
  for (int s = 0; s < count; ++s) {
    if (index < sources[s].n) return {&sources[s], index};
    index -= sources[s].n;
  }
  return {nullptr, 0};
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
void pack_column(const SourceRow& row, int64_t begin, int64_t end, int column, To* panel) {
  const WeightSource& s = *row.source;
  if (s.format == WeightFormat::F32)
    pack_column<To, float>(static_cast<const float*>(s.data) + row.index * s.ld, begin, end, column, panel);
  else
    pack_column<To, uint16_t>(static_cast<const uint16_t*>(s.data) + row.index * s.ld, begin, end, column, panel);
}

template <class To, class RowOf>
void pack_panel(int64_t panel, int64_t k, To* out, const RowOf& row_of) {
  constexpr int64_t kBlock = 128;  // along K: what is written stays in L1 until all 32 columns are there
  for (int64_t i = 0; i < k; i += kBlock)
    for (int c = 0; c < kPanel; ++c)
      if (const SourceRow row = row_of(panel, c); row.source) pack_column(row, i, std::min(k, i + kBlock), c, out);
}

// One row's quantised terms [k padded] and scales, a thread's own.
struct QuantizedRow {
  std::vector<float> scratch;
  std::vector<uint8_t> q;
  std::vector<uint16_t> group_scales;
  float scale = 0;

  explicit QuantizedRow(const PackedLinear& w)
      : scratch(size_t(w.k)), q(size_t(w.k_padded())), group_scales(size_t(w.k_padded() / kGroup)) {}

  void read(const SourceRow& row, WeightFormat format) {
    std::fill(q.begin(), q.end(), uint8_t(0));
    std::fill(group_scales.begin(), group_scales.end(), uint16_t(0));
    scale = 0;
    void* scales = format == WeightFormat::I8 ? static_cast<void*>(&scale) : group_scales.data();
    if (row.source) cpu::read_quantized_row(*row.source, row.index, format, scratch.data(), q.data(), scales);
  }
};

void pack_i8_column(const QuantizedRow& row, int column, uint8_t* panel) {
  for (size_t i = 0; i < row.q.size(); i += 4) {
    uint8_t four[4];
    for (size_t j = 0; j < 4; ++j) four[j] = uint8_t(row.q[i + j] ^ 0x80);
    std::memcpy(panel + i * kPanel + size_t(column) * 4, four, 4);
  }
}

// `panel` is zero-filled; a column adds its halves.
void pack_i4_column(const QuantizedRow& row, int column, uint8_t* panel) {
  constexpr size_t kScales = 2 * kPanel;
  const int shift = column < kPanel / 2 ? 0 : 4;
  for (size_t g = 0; g < row.group_scales.size(); ++g, panel += kI4GroupBytes) {
    std::memcpy(panel + 2 * column, &row.group_scales[g], 2);
    for (size_t i = 0; i < kGroup; ++i)
      panel[kScales + i / 4 * 64 + size_t(column % (kPanel / 2)) * 4 + i % 4] |=
          uint8_t(row.q[g * kGroup + i] << shift);
  }
}

// row_of(panel, column) names the source row of a panel's column.
template <class RowOf>
PackedLinear pack(int64_t n, int64_t k, WeightFormat format, const RowOf& row_of) {
  PackedLinear w;
  w.n = n;
  w.k = k;
  w.format = format;
  if (format == WeightFormat::I8 && k > kMaxTerms)
    fail<ConfigError>("int8 weights have at most ", kMaxTerms, " input columns; there is a layer with ", k);
  const int64_t panel_bytes = w.panel_bytes();
  w.weight = Buffer(checked_bytes("packed weights", size_t(w.panels()), size_t(panel_bytes)), "packed weights");
  if (format == WeightFormat::I8) w.scale = Buffer(size_t(w.panels() * kPanel) * 4, "weight scales");
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, k * kPanel));
  parallel_for(w.panels(), grain, [&](int64_t begin, int64_t end) {
    if (!is_quantized(format)) {
      for (int64_t p = begin; p < end; ++p) {
        if (format == WeightFormat::F32)
          pack_panel(p, k, w.weight.as<float>() + p * panel_bytes / 4, row_of);
        else
          pack_panel(p, k, w.weight.as<uint16_t>() + p * panel_bytes / 2, row_of);
      }
      return;
    }
    QuantizedRow row(w);
    for (int64_t p = begin; p < end; ++p)
      for (int c = 0; c < kPanel; ++c) {
        uint8_t* panel = w.weight.as<uint8_t>() + p * panel_bytes;
        row.read(row_of(p, c), format);
        if (format == WeightFormat::I8) {
          pack_i8_column(row, c, panel);
          w.scale.as<float>()[p * kPanel + c] = row.scale;
        } else {
          pack_i4_column(row, c, panel);
        }
      }
  });
  return w;
}

void check_source(const WeightSource& source, int64_t k, WeightFormat format) {
  if (source.k != k) fail<UsageError>("pack: sources have ", k, " and ", source.k, " input columns");
  if (is_quantized(source.format) && source.format != format)
    fail<UsageError>("pack: ", name_of(source.format), " weights cannot become ", name_of(format));
}

}  // namespace

int64_t PackedLinear::k_padded() const {
  switch (format) {
    case WeightFormat::F32:
      return k;
    case WeightFormat::BF16:
      return (k + 1) / 2 * 2;
    case WeightFormat::I8:
    case WeightFormat::I4:
      return (k + kGroup - 1) / kGroup * kGroup;
  }
  return k;
}

int64_t PackedLinear::panel_bytes() const {
  switch (format) {
    case WeightFormat::F32:
      return k_padded() * kPanel * 4;
    case WeightFormat::BF16:
      return k_padded() * kPanel * 2;
    case WeightFormat::I8:
      return k_padded() * kPanel;
    case WeightFormat::I4:
      return k_padded() / kGroup * kI4GroupBytes;
  }
  return 0;
}

PackedLinear pack_linear(const WeightSource* sources, int count, WeightFormat format) {
  if (count < 1) fail<UsageError>("pack_linear: no source");
  int64_t n = 0;
  for (int s = 0; s < count; ++s) {
    check_source(sources[s], sources[0].k, format);
    n += sources[s].n;
  }
  return pack(n, sources[0].k, format,
              [&](int64_t panel, int column) { return stacked_row(sources, count, panel * kPanel + column); });
}

PackedLinear pack_gate_up(const WeightSource& gate, const WeightSource& up, WeightFormat format) {
  check_source(gate, gate.k, format);
  check_source(up, gate.k, format);
  if (gate.n != up.n)
    fail<UsageError>("pack_gate_up: gate is [", gate.n, ", ", gate.k, "] but up is [", up.n, ", ", up.k, "]");
  constexpr int kHalf = kPanel / 2;
  PackedLinear w = pack(2 * gate.n, gate.k, format, [&](int64_t panel, int column) {
    return stacked_row(column < kHalf ? &gate : &up, 1, panel * kHalf + column % kHalf);
  });
  w.gate_up = true;
  return w;
}

}  // namespace dllm::ops
