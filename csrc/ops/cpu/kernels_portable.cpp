// The baseline: SSE2 on x86-64, the compiler's 128-bit vectors elsewhere.
#define DLLM_ISA_NAMESPACE portable
#define DLLM_WIDTH 4
#include "ops/cpu/kernels_impl.h"
