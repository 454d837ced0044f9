// AVX2 and FMA.
#define DLLM_ISA_NAMESPACE avx2
#define DLLM_WIDTH 8
#include "ops/cpu/kernels_impl.h"
