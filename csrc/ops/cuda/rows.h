// Kernels over [rows, columns] whose elements do not need each other. A thread keeps its columns and goes from row to row,
// gridDim.x apart: four columns, 16 bytes of fp32 in one access, where the width allows it (neighbouring lanes have
// neighbouring quads), else one. The grid is capped, so that blocks without a row cost little where the number of rows is
// far below the capacity.
//
//   template <class T, int N>
//   DLLM_KERNEL(kRowThreads) scale_kernel(ScaleArgs a) {
//     const int i = first_column<N>(), rows = *a.n_rows;
//     if (i >= a.columns) return;
//     for (int r = first_row(); r < rows; r += row_stride()) ...
//   }
#pragma once

#include "ops/cuda/kernel.h"
#include "runtime/dtype.h"

namespace dllm::ops::cuda {

constexpr int kRowThreads = 256;
constexpr int kMaxBlocks = 1056;  // eight of these on each of 132 SMs: as many as run at once

inline dim3 row_grid(int32_t capacity, int32_t columns, int columns_per_thread) {
  const int per_block = columns_per_thread * kRowThreads;
  const int chunks = (columns + per_block - 1) / per_block;
  const int rows = kMaxBlocks / chunks > 0 ? kMaxBlocks / chunks : 1;
  return dim3(unsigned(capacity < rows ? capacity : rows), unsigned(chunks));
}

template <int N>
DLLM_DEVICE int first_column() {
  return int(blockIdx.y * kRowThreads + threadIdx.x) * N;
}
DLLM_DEVICE int first_row() { return int(blockIdx.x); }
DLLM_DEVICE int row_stride() { return int(gridDim.x); }

// f.operator()<T, N>(): T of the type, N columns per thread, 4 or 1.
template <class F>
void dispatch_rows(DType type, bool by_four, F&& f) {
  const auto of = [&]<class T>() { by_four ? f.template operator()<T, 4>() : f.template operator()<T, 1>(); };
  switch (type) {
    case DType::F32:
      return of.template operator()<float>();
    case DType::BF16:
      return of.template operator()<cu::bf16>();
    case DType::F16:
      return of.template operator()<cu::half>();
  }
}

}  // namespace dllm::ops::cuda
