// y = x W^T with weights in 8 and 4 bits: every conversion, instantiation and tiling, ragged K, rows below the
// capacity.
#include "ops/cuda/quant_linear.h"

#include <algorithm>

#include "cuda_emulator/case.h"
#include "ops/cpu/kernels.h"
#include "ops/cuda/kernel.h"

namespace dllm {
namespace {

using namespace ops::cuda;
using emu::bf16;
using emu::half;
using emu::type_of;
using ops::WeightFormat;

// A matrix in the checkpoint's form, packed on the device, and its meaning.
struct Matrix {
  WeightFormat format;
  int n, k;
  const void* packed;
  std::vector<double> value;
};

// index(j, i) gives I8 q or the I4 index, scale(j, g) the scale of a row or group.
template <class Index, class Scale>
Matrix matrix(emu::Case& c, WeightFormat format, int n, int k, Index&& index, Scale&& scale) {
  Matrix m{format, n, k, nullptr, std::vector<double>(size_t(n) * k)};
  std::vector<uint8_t> values(size_t(n) * k), packed(quant_bytes(format, n, k));
  std::vector<float> row_scales(n);
  std::vector<bf16> group_scales(size_t(n) * (k / ops::kGroup));
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < k; ++i) {
      const int q = index(j, i);
      const size_t at = size_t(j) * k + i;
      if (format == WeightFormat::I8) {
        values[at] = uint8_t(q);
        m.value[at] = double(q) * (row_scales[j] = scale(j, 0));
      } else {
        const bf16 s = emu::to_bf16(scale(j, i / ops::kGroup));
        values[at / 2] |= uint8_t(q << i % 2 * 4);
        group_scales[at / ops::kGroup] = s;
        m.value[at] = double(ops::cpu::kI4Values[q]) * cu::to_float(s);
      }
    }
  const void* scales = format == WeightFormat::I8 ? static_cast<const void*>(row_scales.data()) : group_scales.data();
  quant_pack({values.data(), format, n, k, k, scales}, packed.data());
  m.packed = c.upload(packed);
  return m;
}
Matrix random_matrix(emu::Case& c, WeightFormat format, int n, int k) {
  const bool i8 = format == WeightFormat::I8;
  return matrix(
      c, format, n, k, [&](int, int) { return int(c.uniform() * (i8 ? 255 : 16)) - (i8 ? 127 : 0); },
      [&](int j, int g) { return 0.01f + 0.001f * float((5 * j + 3 * g) % 7); });
}

// Runs `count` rows of a launch for `rows`, checks all of out, and gives it.
template <class T>
std::vector<float> check(emu::Case& c, const Matrix& m, int capacity, int count, bool accumulate) {
  const int ldo = m.n + 8;
  const T* x = c.random<T>(size_t(capacity) * m.k, 2.0);
  float* out = c.random<float>(size_t(capacity) * ldo);
  const std::vector<float> before = c.host(out, size_t(capacity) * ldo);
  quant_linear(c.stream(), type_of<T>(),
               {m.packed, m.format, m.n, m.k, x, c.upload<int32_t>({count}), out, ldo, accumulate, capacity});
  c.output(out, size_t(capacity) * ldo);
  const std::vector<float> y = c.host(out, size_t(capacity) * ldo);
  const std::vector<T> xs = c.host(x, size_t(capacity) * m.k);
  for (int r = 0; r < capacity; ++r)
    for (int j = 0; j < ldo; ++j) {
      const size_t at = size_t(r) * ldo + j;
      if (r >= count || j >= m.n) {
        c.expect(y[at] == before[at], "only the count's rows are written");
        continue;
      }
      double sum = accumulate ? before[at] : 0, size = std::abs(sum);
      for (int i = 0; i < m.k; ++i) {
        const double p = double(cu::to_float(xs[size_t(r) * m.k + i])) * m.value[size_t(j) * m.k + i];
        sum += p;
        size += std::abs(p);
      }
      c.expect_close(y[at], sum, 5e-7 * size, "row " + std::to_string(r) + ", feature " + std::to_string(j));
    }
  return y;
}

// Rows of the unit matrix: each output is one weight, exactly.
template <class T>
void conversion_case(emu::Case& c, WeightFormat format) {
  const bool i8 = format == WeightFormat::I8;
  const Matrix m = matrix(
      c, format, 16, 64, [&](int j, int i) { return i8 ? (j * 64 + i) % 256 - 128 : (i + 5 * j) % 16; },
      [&](int j, int) { return j % 2 ? 0.25f : -1.0f; });
  std::vector<T> unit(64 * 64);
  for (int r = 0; r < 64; ++r)
    for (int i = 0; i < 64; ++i) unit[r * 64 + i] = cu::from_float<T>(r == i);
  float* out = c.device<float>(64 * 16);
  quant_linear(c.stream(), type_of<T>(),
               {m.packed, format, 16, 64, c.upload(unit), c.upload<int32_t>({64}), out, 16, false, 64});
  c.output(out, 64 * 16);
  const std::vector<float> y = c.host(out, 64 * 16);
  for (int r = 0; r < 64; ++r)
    for (int j = 0; j < 16; ++j) c.expect_close(y[r * 16 + j], m.value[j * 64 + r], 0, "a weight");
}
void conversion(emu::Case& c) {
  for (WeightFormat format : {WeightFormat::I8, WeightFormat::I4}) {
    conversion_case<float>(c, format);
    conversion_case<bf16>(c, format);
    conversion_case<half>(c, format);
  }
}

// k = 64: one warp in four works; 448: seven groups, so that the parts differ; 1280: more steps than stages.
template <class T>
void shapes(emu::Case& c) {
  if (sizeof(T) == 2) {
    c.budget("banks", 1.01);
    c.budget("sectors", 1.3);
  }
  for (WeightFormat format : {WeightFormat::I8, WeightFormat::I4}) {
    const Matrix square = random_matrix(c, format, 64, 64), ragged = random_matrix(c, format, 48, 448),
                 deep = random_matrix(c, format, 16, 1280);
    check<T>(c, square, 1, 1, false);
    check<T>(c, square, 8, 5, true);
    check<T>(c, ragged, 7, 7, false);
    check<T>(c, ragged, 16, 13, true);
    check<T>(c, ragged, 32, 32, false);
    check<T>(c, ragged, 64, 64, false);
    check<T>(c, deep, 8, 8, false);
    check<T>(c, deep, 32, 27, true);
    check<T>(c, square, 64, 41, true);
    check<T>(c, square, 150, 131, true);
  }
}
void shapes_f32(emu::Case& c) { shapes<float>(c); }
void shapes_bf16(emu::Case& c) { shapes<bf16>(c); }
void shapes_f16(emu::Case& c) { shapes<half>(c); }

void no_rows(emu::Case& c) {
  const Matrix m = random_matrix(c, WeightFormat::I4, 16, 64);
  check<bf16>(c, m, 8, 0, false);
  check<float>(c, m, 8, 0, true);
  check<half>(c, m, 100, 0, true);
  quant_linear(c.stream(), DType::BF16, {m.packed, m.format, 16, 64, nullptr, nullptr, nullptr, 16, false, 0});
}

// Row 0 through every instantiation: the same bits, beside any number of other rows.
template <class T>
void same_bits(emu::Case& c, WeightFormat format, int n, int k, std::initializer_list<int> capacities) {
  const Matrix m = random_matrix(c, format, n, k);
  const T* x = c.random<T>(size_t(64) * k);
  std::vector<float> first;
  for (int rows : capacities) {
    float* out = c.device<float>(size_t(rows) * n);
    quant_linear(c.stream(), type_of<T>(),
                 {m.packed, format, n, k, x, c.upload<int32_t>({rows - rows / 4}), out, n, false, rows});
    c.output(out, size_t(n));
    const std::vector<float> y = c.host(out, size_t(n));
    if (first.empty()) first = y;
    c.expect(y == first, "row 0 of a launch for " + std::to_string(rows));
  }
  const std::vector<T> xs = c.host(x, size_t(k));
  for (int j = 0; j < n; j += 97) {
    double sum = 0;
    for (int i = 0; i < k; ++i) sum += double(cu::to_float(xs[i])) * m.value[size_t(j) * k + i];
    c.expect_close(first[j], sum, 1e-5, "feature " + std::to_string(j));
  }
}
void rows_beside(emu::Case& c) {
  for (WeightFormat format : {WeightFormat::I8, WeightFormat::I4}) {
    same_bits<bf16>(c, format, 80, 320, {1, 8, 9, 16, 17, 32, 33, 64});
    same_bits<half>(c, format, 16, 128, {64, 8, 16, 32});
    same_bits<float>(c, format, 16, 320, {1, 8, 20});
  }
}
// Wide enough for twice the tiles per warp: 264 blocks of 64 features for 8 rows, 96 of 128 for more.
void wide_i8(emu::Case& c) { same_bits<bf16>(c, WeightFormat::I8, 16896 + 16, 64, {1, 9}); }
void wide_i4(emu::Case& c) { same_bits<bf16>(c, WeightFormat::I4, 16896 + 16, 64, {1, 17}); }
void wide_f16(emu::Case& c) {
  same_bits<half>(c, WeightFormat::I8, 12288, 64, {16, 32});
  same_bits<half>(c, WeightFormat::I4, 12288 + 48, 64, {16, 32});
}

void refusals(emu::Case& c) {
  const auto message = [](auto&& f) -> std::string {
    try {
      f();
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "";
  };
  c.expect(message([] { quant_bytes(WeightFormat::I8, 40, 64); }).find("40 x 64") != std::string::npos, "n is checked");
  c.expect(message([] { quant_bytes(WeightFormat::I4, 16, 96); }).find("16 x 96") != std::string::npos, "k is checked");
  c.expect(!message([] { quant_bytes(WeightFormat::BF16, 16, 64); }).empty(), "the format is checked");
}

const emu::Registered r[] = {
    {"quant_linear/conversion", conversion},   {"quant_linear/shapes_f32", shapes_f32},
    {"quant_linear/shapes_bf16", shapes_bf16}, {"quant_linear/shapes_f16", shapes_f16},
    {"quant_linear/no_rows", no_rows},         {"quant_linear/rows_beside", rows_beside},
    {"quant_linear/wide_i8", wide_i8},         {"quant_linear/wide_i4", wide_i4},
    {"quant_linear/wide_f16", wide_f16},       {"quant_linear/refusals", refusals},
};

}  // namespace
}  // namespace dllm
