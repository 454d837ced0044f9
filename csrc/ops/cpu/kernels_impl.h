// The body of a kernels_<isa>.cpp, which has defined DLLM_ISA_NAMESPACE, DLLM_WIDTH (floats per vector) and, where there
// is VDPBF16PS, DLLM_DOT_BF16. Not a header to include elsewhere.
#include "ops/cpu/compare_impl.h"
#include "ops/cpu/gemm_impl.h"
#include "ops/cpu/philox_impl.h"
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
const Kernels table = {kBf16A,       gemm_f32,       gemm_bf16, write,     softmax_chunk, scale_row, axpy,
                       rms_norm_row, compare_values, rotate,    widen_row, tile_stats,    draws_from};

}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
