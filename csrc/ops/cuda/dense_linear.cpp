#include "ops/cuda/dense_linear.h"

#include <cublas_v2.h>

#include "runtime/cuda/blas.h"
#include "runtime/error.h"

namespace dllm::ops::cuda {

namespace {

cudaDataType_t cuda_type(DType type) {
  return type == DType::F32 ? CUDA_R_32F : type == DType::BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

}  // namespace

// cuBLAS thinks in columns: what is y[rows, n] = x w^T to us is y^T[n, rows] = w x^T to it.
void dense_linear(Stream stream, DType type, const DenseLinearArgs& a) {
  if (a.rows == 0) return;
  const auto workspace = dllm::cuda::blas_workspace(static_cast<cudaStream_t>(stream));
  const std::lock_guard lock(workspace->submitting);
  const auto handle = static_cast<cublasHandle_t>(workspace->handle());
  // fp32 is for parity with the CPU, so no TF32, whatever torch allows for its own products. 16-bit products may not be
  // summed in 16 bits, not even between the parts of a split sum.
  const bool fp32 = type == DType::F32;
  const cublasComputeType_t compute = fp32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;
  cublasMath_t torchs = CUBLAS_DEFAULT_MATH;
  cublasStatus_t status = cublasGetMathMode(handle, &torchs);
  if (status == CUBLAS_STATUS_SUCCESS)
    status =
        cublasSetMathMode(handle, cublasMath_t(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
  if (status == CUBLAS_STATUS_SUCCESS) {
    const float one = 1, beta = a.accumulate ? 1 : 0;
    status = cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, int(a.n), int(a.rows), int(a.k), &one, a.w, cuda_type(type),
                          int(a.k), a.x, cuda_type(type), int(a.k), &beta, a.out, CUDA_R_32F, int(a.ldo), compute,
                          CUBLAS_GEMM_DEFAULT);
    (void)cublasSetMathMode(handle, torchs);
  }
  if (status != CUBLAS_STATUS_SUCCESS)
    fail<Error>("cuBLAS, ", a.rows, " x ", a.n, " x ", a.k, " in ", name_of(type), ": ", cublasGetStatusString(status));
}

}  // namespace dllm::ops::cuda
