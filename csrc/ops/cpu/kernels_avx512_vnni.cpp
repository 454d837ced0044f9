// AVX-512 with VPDPBUSD.
#define DLLM_ISA_NAMESPACE avx512_vnni
#define DLLM_WIDTH 16
#define DLLM_DOT_I8 1
#include "ops/cpu/kernels_impl.h"
