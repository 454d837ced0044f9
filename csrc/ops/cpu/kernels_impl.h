// The body of a kernels_<isa>.cpp, which has defined DLLM_ISA_NAMESPACE, DLLM_WIDTH (floats per vector) and, where there
// are VPDPBUSD and VDPBF16PS, DLLM_DOT_I8 and DLLM_DOT_BF16. Not a header to include elsewhere.
#include "ops/cpu/compare_impl.h"
#include "ops/cpu/gemm_impl.h"
#include "ops/cpu/philox_impl.h"
#include "ops/cpu/quantize_impl.h"
#include "ops/cpu/rows_impl.h"
#include "ops/cpu/softmax_impl.h"
#include "ops/cpu/tile_stats_impl.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {

#ifdef DLLM_DOT_BF16
constexpr bool kBf16A = true;
#else
constexpr bool kBf16A = false;
#endif

extern const Kernels table;
const Kernels table = {
    .bf16_a = kBf16A,
    .gemm_f32 = gemm_f32,
    .gemm_bf16 = gemm_bf16,
    .quantized_size = int64_t(sizeof(quantized)),
    .gemm_i8 = gemm_i8,
    .gemm_i4 = gemm_i4,
    .scale_i8 = scale_i8,
    .scale_i4 = scale_i4,
    .quantize_row = quantize_row,
    .quantize_group = quantize_group,
    .write = write,
    .softmax_chunk = softmax_chunk,
    .softmax_weights = softmax_weights,
    .weighted_sum = weighted_sum,
    .scale_row = scale_row,
    .axpy = axpy,
    .rms_norm_row = rms_norm_row,
    .compare_values = compare_values,
    .rotate = rotate,
    .widen = widen_row,
    .tile_stats = tile_stats,
    .draws_from = draws_from,
};

}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
