// AVX-512 F, BW, VL, DQ.
#define DLLM_ISA_NAMESPACE avx512
#define DLLM_WIDTH 16
#include "ops/cpu/kernels_impl.h"
