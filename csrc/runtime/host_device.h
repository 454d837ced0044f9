// DLLM_HD marks small functions that CUDA kernels call too.
#pragma once

#if defined(__CUDACC__)
#define DLLM_HD __host__ __device__
#else
#define DLLM_HD
#endif
