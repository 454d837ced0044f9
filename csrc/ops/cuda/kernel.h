// What a CUDA kernel file includes, and all it includes beside its own header: element types, launches, shared memory, and
// wrappers for the PTX that C++ has no words for. The same source compiles under nvcc and, for the emulator
// (cuda_emulator/emulator.h), under any C++ compiler. Inline PTX stands nowhere else.
//
//   DLLM_KERNEL(256) void scale(ScaleArgs a) { ... threadIdx, __syncthreads(), __shfl_xor_sync ... }
//   void scale(cu::Stream stream, const ScaleArgs& a) { cu::launch(stream, "scale", scale_kernel, grid, 256, 0, a); }
//
// Kernels take one POD by value. Shared memory is declared with DLLM_SHARED or DLLM_DYNAMIC_SHARED, never bare, so that the
// emulator can fill and watch it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#include "runtime/error.h"
#define DLLM_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads)
// Blocks that are to fit a multiprocessor. With 1, no register is given up, and spilled, for the sake of a second one.
#define DLLM_KERNEL_OCCUPANCY(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define DLLM_DEVICE __device__ __forceinline__
// A pointer to the block's dynamic shared memory.
#define DLLM_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char dllm_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(dllm_dynamic_shared)
// DLLM_SHARED(float, sums, [8]);
#define DLLM_SHARED(T, name, dimensions) __shared__ __align__(16) T name dimensions
#define DLLM_UNROLL _Pragma("unroll")
#else
#include "cuda_emulator/emulator.h"
#define DLLM_KERNEL(max_threads) static void
#define DLLM_KERNEL_OCCUPANCY(max_threads, min_blocks) static void
#define DLLM_DEVICE inline
#define DLLM_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::dllm::emu::dynamic_shared())
#define DLLM_SHARED(T, name, dimensions) \
  static char name##_key;                \
  typedef T name##_type dimensions;      \
  name##_type& name = *reinterpret_cast<name##_type*>(::dllm::emu::static_shared(&name##_key, sizeof(name##_type), 16))
#define DLLM_UNROLL
#endif

namespace dllm::cu {

#if defined(__CUDACC__)
using bf16 = __nv_bfloat16;
using half = __half;
using Stream = void*;  // a cudaStream_t
#else
using bf16 = emu::bf16;
using half = emu::half;
using Stream = void*;  // an emu::Queue*; null: run at once
#endif

inline constexpr unsigned kAllLanes = 0xffffffffu;

// --- Launch -----------------------------------------------------------------------------------------------------------
#if defined(__CUDACC__)
// Without it a kernel has 48 KiB, static and dynamic together. It gets all that a block of the current device can have, once:
// the limit is the kernel's, not the launch's, and a lower one set later would hit launches of other threads, and nodes of
// a graph that is being captured.
inline void allow_shared(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  cudaFuncAttributes attributes{};
  cudaError_t e = cudaGetDevice(&device);
  const std::lock_guard lock(mutex);
  if (e == cudaSuccess && allowed.contains({kernel, device})) return;
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (e == cudaSuccess) e = cudaFuncGetAttributes(&attributes, kernel);
  if (e == cudaSuccess)
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - int(attributes.sharedSizeBytes));
  if (e != cudaSuccess) {
    (void)cudaGetLastError();
    fail<Error>("CUDA kernel ", name, ": no more than 48 KiB of shared memory: ", cudaGetErrorString(e));
  }
  allowed.insert({kernel, device});
}
#endif

// `name` is what traces and error messages call it. dynamic_shared in bytes; beyond 48 KiB is asked for here.
template <class... P, class... A>
void launch(Stream stream, const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared,
            const A&... args) {
  const bool more = dynamic_shared > 0;  // with the static memory it may be
#if defined(__CUDACC__)
  if (more) allow_shared(reinterpret_cast<const void*>(kernel), name);
  kernel<<<grid, block, dynamic_shared, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t e = cudaGetLastError();
  if (e != cudaSuccess) fail<Error>("CUDA kernel ", name, " could not be launched: ", cudaGetErrorString(e));
#else
  emu::enqueue(stream, name, grid, block, {dynamic_shared, more}, [kernel, args...] { kernel(args...); });
#endif
}

// --- Elements ---------------------------------------------------------------------------------------------------------
DLLM_DEVICE float to_float(float x) { return x; }
#if defined(__CUDACC__)
DLLM_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
DLLM_DEVICE float to_float(half x) { return __half2float(x); }
#else
using emu::to_float;  // not a second function, which would be ambiguous
#endif

// Rounds to nearest, ties to even.
template <class T>
DLLM_DEVICE T from_float(float x);
template <>
DLLM_DEVICE float from_float<float>(float x) {
  return x;
}
#if defined(__CUDACC__)
template <>
DLLM_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
DLLM_DEVICE half from_float<half>(float x) {
  return __float2half_rn(x);
}
#else
template <>
DLLM_DEVICE bf16 from_float<bf16>(float x) {
  return emu::to_bf16(x);
}
template <>
DLLM_DEVICE half from_float<half>(float x) {
  return emu::to_half(x);
}
#endif

// Two 16-bit elements in a register, `low` in the low half.
template <class T>
DLLM_DEVICE uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t r;
  memcpy(&r, pair, 4);
  return r;
}
template <class T>
DLLM_DEVICE float2 unpack(uint32_t r) {
  T pair[2];
  memcpy(pair, &r, 4);
  return make_float2(cu::to_float(pair[0]), cu::to_float(pair[1]));
}

// a * b + c in both halves, rounded once; subnormals count (PTX ISA, fma.f16x2 and fma.bf16x2 without .ftz). The emulator
// rounds twice where fp32 does not hold the result.
template <class T>
DLLM_DEVICE uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t r;
  if constexpr (__is_same(T, bf16))
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#else
  const float2 x = unpack<T>(a), y = unpack<T>(b), z = unpack<T>(c);
  return pack<T>(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
#endif
}

// Byte i of the result is byte (selector >> 4 i) & 7 of b:a, or eight copies of its top bit where bit 3 is set. (CUDA's
// __byte_perm ignores bit 3.)
DLLM_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
#else
  return emu::permute_bytes(a, b, selector);
#endif
}

// --- Memory -----------------------------------------------------------------------------------------------------------
// 16 bytes in one access, aligned to 16. (A struct copy would be four accesses in the emulator, which counts them.)
DLLM_DEVICE uint4 load128(const void* p) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const uint4*>(p);
#else
  return emu::load128(p);
#endif
}
// Through the read-only path, first to leave the cache: for weights, which a step reads once.
DLLM_DEVICE uint4 load128_once(const void* p) {
#if defined(__CUDACC__)
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
#else
  return emu::load128(p);
#endif
}
DLLM_DEVICE void store128(void* p, uint4 x) {
#if defined(__CUDACC__)
  *reinterpret_cast<uint4*>(p) = x;
#else
  emu::store128(p, x);
#endif
}

// 8 bytes in one access, aligned to 8.
DLLM_DEVICE uint2 load64(const void* p) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const uint2*>(p);
#else
  return emu::load64(p);
#endif
}
DLLM_DEVICE void store64(void* p, uint2 x) {
#if defined(__CUDACC__)
  *reinterpret_cast<uint2*>(p) = x;
#else
  emu::store64(p, x);
#endif
}

// N neighbouring elements (1 or 4) as fp32, in one access aligned to its size.
template <int N, class T>
DLLM_DEVICE void load_elements(const T* p, float (&x)[N]) {
  static_assert(N == 1 || N == 4);
  if constexpr (N == 1) {
    x[0] = to_float(*p);
  } else if constexpr (sizeof(T) == 4) {
    const uint4 r = cu::load128(p);
    memcpy(x, &r, 16);
  } else {
    const uint2 r = cu::load64(p);
    const float2 low = unpack<T>(r.x), high = unpack<T>(r.y);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }
}
template <int N, class T>
DLLM_DEVICE void store_elements(T* p, const float (&x)[N]) {
  static_assert(N == 1 || N == 4);
  if constexpr (N == 1) {
    *p = from_float<T>(x[0]);
  } else if constexpr (sizeof(T) == 4) {
    uint4 r;
    memcpy(&r, x, 16);
    cu::store128(p, r);
  } else {
    cu::store64(p, make_uint2(pack<T>(x[0], x[1]), pack<T>(x[2], x[3])));
  }
}

// Asynchronous copy of 16 bytes to shared memory; zeros where !valid (then `global` is not read, but must be a pointer).
DLLM_DEVICE void copy_async16(void* shared, const void* global, bool valid) {
#if defined(__CUDACC__)
  const unsigned s = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(s), "l"(global), "r"(bytes) : "memory");
#else
  emu::copy_async(shared, global, 16, valid ? 16 : 0);
#endif
}
DLLM_DEVICE void copy_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  emu::copy_async_commit();
#endif
}
// Waits until at most N of this thread's committed groups are under way.
template <int N>
DLLM_DEVICE void copy_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#else
  emu::copy_async_wait(N);
#endif
}

// --- Tensor cores (PTX ISA, "Matrix fragments for mma.m16n8k16") ----------------------------------------------------------
// With g = lane / 4, t = lane % 4:
//   a[0] rows g, columns 2t 2t+1    a[1] rows g+8    a[2] rows g, columns 2t+8 2t+9    a[3] rows g+8, columns 2t+8 2t+9
//   b[0] column g, rows 2t 2t+1     b[1] column g, rows 2t+8 2t+9
//   d[0] d[1] row g, columns 2t 2t+1          d[2] d[3] row g+8
// d[16, 8] += a[16, 16] b[16, 8], T is bf16 or half, sums in fp32.
template <class T>
DLLM_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2 && __is_same(T, bf16))
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emu::mma_m16n8k16<T>(d, a, b);
#endif
}

// Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane i gives the address of row i % 8 of matrix i / 8;
// r[m] holds matrix m: row lane / 4, columns 2 (lane % 4) and the next; transposed: of the transposed matrix.
template <bool Transposed>
DLLM_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  const unsigned s = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(s)
                 : "memory");
#else
  emu::load_matrix_x4(r, row, Transposed);
#endif
}

// --- Arithmetic -------------------------------------------------------------------------------------------------------
// 2^x, to 2 units in the last place.
DLLM_DEVICE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// --- Reductions in a fixed order --------------------------------------------------------------------------------------
// f over the 32 lanes, the same tree at every call; every lane gets the result.
template <class T, class F>
DLLM_DEVICE T reduce_warp(T x, F&& f) {
  DLLM_UNROLL
  for (int offset = 16; offset; offset >>= 1) x = f(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}
DLLM_DEVICE float sum_warp(float x) {
  return reduce_warp(x, [](float a, float b) { return a + b; });
}
DLLM_DEVICE double sum_warp(double x) {
  return reduce_warp(x, [](double a, double b) { return a + b; });
}
DLLM_DEVICE float max_warp(float x) {
  return reduce_warp(x, [](float a, float b) { return a > b ? a : b; });
}

}  // namespace dllm::cu
