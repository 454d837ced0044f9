// AVX-512 with VPDPBUSD and VDPBF16PS.
#define DLLM_ISA_NAMESPACE avx512_bf16
#define DLLM_WIDTH 16
#define DLLM_DOT_I8 1
#define DLLM_DOT_BF16 1
#include "ops/cpu/kernels_impl.h"
