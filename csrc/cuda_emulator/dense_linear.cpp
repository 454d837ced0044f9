// The emulator's stand-in for cuBLAS: products and sums in fp32, terms in order.
#include "ops/cuda/dense_linear.h"

#include <vector>

#include "cuda_emulator/stream.h"

namespace dllm::ops::cuda {

namespace {

float element(const void* p, DType type, int64_t i) {
  if (type == DType::F32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return type == DType::BF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

void multiply(DType type, const DenseLinearArgs& a) {
  constexpr int64_t kLanes = 16;  // partial sums, so that the compiler can use vectors
  std::vector<float> x(size_t(a.rows * a.k)), w(static_cast<size_t>(a.k));
  for (int64_t i = 0; i < a.rows * a.k; ++i) x[size_t(i)] = element(a.x, type, i);
  for (int64_t j = 0; j < a.n; ++j) {
    for (int64_t i = 0; i < a.k; ++i) w[size_t(i)] = element(a.w, type, j * a.k + i);
    for (int64_t r = 0; r < a.rows; ++r) {
      const float* row = x.data() + r * a.k;
      float sums[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= a.k; i += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += row[i + lane] * w[size_t(i + lane)];
      float sum = 0;
      for (float s : sums) sum += s;
      for (; i < a.k; ++i) sum += row[i] * w[size_t(i)];
      float& out = a.out[r * a.ldo + j];
      out = a.accumulate ? out + sum : sum;
    }
  }
  for (int64_t r = 0; r < a.rows; ++r) emu::mark_written(a.out + r * a.ldo, size_t(a.n) * sizeof(float));
}

}  // namespace

void dense_linear(Stream stream, DType type, const DenseLinearArgs& args) {
  if (args.rows == 0) return;
  static_cast<emu::Queue*>(stream)->push("dense_linear", emu::Kind::Gemm, [=] { multiply(type, args); });
}

}  // namespace dllm::ops::cuda
