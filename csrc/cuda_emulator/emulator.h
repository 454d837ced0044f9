// CUDA kernels executed on the CPU, for tests: what ops/cuda/kernel.h stands on where nvcc does not compile it. A fiber per
// CUDA thread, blocks one after another, the schedule chosen by the caller. Needs nothing of NVIDIA's.
//
// Covered: built-in variables, block and warp barriers, shuffles and votes with partial masks, atomics, static and dynamic
// shared memory, cp.async, ldmatrix, mma.m16n8k16, launch limits, streams and graphs (stream.h).
// A mistake that hardware would answer with silence is an EmulatorError that names the kernel, the block and the thread:
// barriers that not all threads reach, shuffles from lanes that do not take part, misaligned vectors, deadlock. After it the
// emulator can be used again. All state is global: one thread at a time may use it.
// Not covered: weak memory (atomics are sequential), blocks that wait for each other, speed.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "cuda_emulator/races.h"
#include "runtime/dtype.h"
#include "runtime/error.h"

// --- CUDA's vector types ----------------------------------------------------------------------------------------------
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace dllm::emu {

struct EmulatorError : Error {
  using Error::Error;
};

enum class Order { Fifo, Lifo, Random };  // of the threads that can run, and of the blocks
enum class CopyAsync { Late, Early };  // when a cp.async lands: at the wait, or at once
struct Config {
  Order order = Order::Fifo;
  uint64_t seed = 1;
  CopyAsync copy_async = CopyAsync::Late;
  size_t shared_limit = 99 * 1024;  // per block: sm_86, 89 and 120, the least of what is built for
};
Config& config();

// One CUDA thread. `linear` counts within the block.
struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned lane, warp, linear;
};
extern thread_local Thread* current;

// Throws EmulatorError; inside a kernel the message also names the kernel, the block and the thread.
[[noreturn]] void stop(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A launch's shared memory, and whether the kernel is allowed more than 48 KiB, its static arrays included.
struct LaunchShared {
  size_t dynamic = 0;
  bool more = false;
};

// Runs a kernel now / puts it into a stream (an emu::Queue*; null: now). `name` must outlive the run.
void run(const char* name, dim3 grid, dim3 block, LaunchShared shared, const std::function<void()>& body);
void submit_kernel(void* stream, const char* name, dim3 grid, dim3 block, LaunchShared shared,
                   std::function<void()> body);
template <class F>
void enqueue(void* stream, const char* name, dim3 grid, dim3 block, LaunchShared shared, F body) {
  // The body holds the kernel's arguments.
  submit_kernel(stream, name, grid, block, shared, [body] {
    if constexpr (kRaces) races::parameters(&body, sizeof body);
    body();
  });
}

// Code of the emulator that is compiled with the kernels: the race detector does not watch it.
#define DLLM_EMU_UNWATCHED __attribute__((no_sanitize("thread")))

// --- What a kernel calls ----------------------------------------------------------------------------------------------
void block_barrier(const char* file, int line);
int block_vote(int predicate, const char* file, int line);  // how many threads of the block said yes
void warp_barrier(unsigned mask, const char* file, int line);
unsigned active_lanes();
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t align);
void copy_async(void* shared, const void* global, size_t bytes, size_t source_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);

// Every lane of `mask` posts n <= 64 bytes and waits for the others; gives 32 slots of 64 bytes, and in `posted` the lanes
// that did post. Followed by exchange_done(). `kind` tells different warp operations apart.
enum class WarpOp {
  Barrier,
  Shuffle,
  ShuffleXor,
  ShuffleDown,
  ShuffleUp,
  Vote,
  Match,
  Reduce,
  Mma,
  LoadMatrix,
  LoadMatrixTransposed
};
const unsigned char* exchange(unsigned mask, const void* in, size_t n, WarpOp kind, const char* file, int line,
                              unsigned* posted);
void exchange_done();

template <class T>
DLLM_EMU_UNWATCHED T shuffle(unsigned mask, T value, int source, bool own, WarpOp kind, const char* file, int line) {
  static_assert(sizeof(T) <= 64 && std::is_trivially_copyable_v<T>);
  unsigned posted;
  const unsigned char* slots = exchange(mask, &value, sizeof(T), kind, file, line, &posted);
  T result = value;
  if (!own) {
    if (!(posted >> source & 1)) stop("%s:%d: shuffle reads lane %d, which does not take part", file, line, source);
    std::memcpy(&result, slots + 64 * source, sizeof(T));
  }
  exchange_done();
  return result;
}
template <class T>
T shuffle_from(unsigned mask, T value, int source, int width, const char* file, int line) {
  const int lane = int(current->lane);
  return shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), false, WarpOp::Shuffle, file, line);
}
template <class T>
T shuffle_xor(unsigned mask, T value, int bits, int width, const char* file, int line) {
  const int lane = int(current->lane), source = lane ^ bits;
  return shuffle(mask, value, source & 31, source / width > lane / width, WarpOp::ShuffleXor, file, line);
}
template <class T>
T shuffle_down(unsigned mask, T value, int by, int width, const char* file, int line) {
  const int lane = int(current->lane), source = lane + by;
  return shuffle(mask, value, source & 31, source / width != lane / width, WarpOp::ShuffleDown, file, line);
}
template <class T>
T shuffle_up(unsigned mask, T value, int by, int width, const char* file, int line) {
  const int lane = int(current->lane), source = lane - by;
  return shuffle(mask, value, source & 31, source < lane / width * width, WarpOp::ShuffleUp, file, line);
}
DLLM_EMU_UNWATCHED inline unsigned ballot(unsigned mask, bool predicate, const char* file, int line) {
  unsigned posted, result = 0;
  const unsigned char* slots = exchange(mask, &predicate, 1, WarpOp::Vote, file, line, &posted);
  for (int i = 0; i < 32; ++i)
    if (posted >> i & 1) result |= unsigned(slots[64 * i]) << i;
  exchange_done();
  return result;
}

// Every atomic is sequentially consistent, which is stronger than CUDA's.
template <class T, class F>
DLLM_EMU_UNWATCHED T atomic_update(T* p, F&& f) {
  if constexpr (kRaces) races::written(p, sizeof(T));
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  Bits* q = reinterpret_cast<Bits*>(p);
  Bits before = __atomic_load_n(q, __ATOMIC_SEQ_CST), after;
  T old;
  do {
    std::memcpy(&old, &before, sizeof(T));
    const T next = f(old);
    std::memcpy(&after, &next, sizeof(T));
  } while (!__atomic_compare_exchange_n(q, &before, after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}

// --- Elements ---------------------------------------------------------------------------------------------------------
struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};
inline float to_float(bf16 x) { return bf16_to_float(x.bits); }
inline bf16 to_bf16(float x) { return {float_to_bf16(x)}; }
inline float to_float(half x) { return f16_to_float(x.bits); }
inline half to_half(float x) { return {float_to_f16(x)}; }

// --- PTX --------------------------------------------------------------------------------------------------------------
uint4 load128(const void* p);
void store128(void* p, uint4 x);
uint2 load64(const void* p);
void store64(void* p, uint2 x);
void load_matrix_x4(uint32_t (&r)[4], const void* row, bool transposed);

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i, selector >>= 4) {
    const uint32_t byte = uint32_t(bytes >> (selector & 7) * 8) & 0xff;
    r |= (selector & 8 ? (byte >> 7) * 0xff : byte) << 8 * i;
  }
  return r;
}

template <class T>
DLLM_EMU_UNWATCHED void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t in[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  unsigned posted;
  const unsigned char* slots = exchange(0xffffffffu, in, sizeof in, WarpOp::Mma, __FILE__, __LINE__, &posted);
  // Rows g and g + 8 of a, columns 2t and 2t + 1 of b: lane 4 i + j holds elements 2j, 2j + 1 (and 8 on) of row i, column i.
  const int g = int(current->lane) >> 2, t = int(current->lane) & 3;
  float rows[2][16], columns[2][16];
  for (int k = 0; k < 16; k += 2) {
    const int j = k % 8 / 2, high = k / 8;
    for (int i = 0; i < 2; ++i) {
      T pair[2];
      std::memcpy(pair, slots + 64 * (4 * g + j) + 4 * (i + 2 * high), 4);
      rows[i][k] = to_float(pair[0]);
      rows[i][k + 1] = to_float(pair[1]);
      std::memcpy(pair, slots + 64 * (4 * (2 * t + i) + j) + 4 * (4 + high), 4);
      columns[i][k] = to_float(pair[0]);
      columns[i][k + 1] = to_float(pair[1]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += rows[i >> 1][k] * columns[i & 1][k];
    d[i] += sum;
  }
  exchange_done();
}

}  // namespace dllm::emu

// --- CUDA's names. Macros, where a report should say file and line. -----------------------------------------------------
#define threadIdx (::dllm::emu::current->thread)
#define blockIdx (::dllm::emu::current->block)
#define blockDim (::dllm::emu::current->block_size)
#define gridDim (::dllm::emu::current->grid_size)

#define DLLM_EMU_HERE __FILE__, __LINE__
#define DLLM_EMU_SHUFFLE(f, mask, x, lane, width, ...) ::dllm::emu::f(mask, x, lane, width, DLLM_EMU_HERE)
#define __shfl_sync(...) DLLM_EMU_SHUFFLE(shuffle_from, __VA_ARGS__, 32, )
#define __shfl_xor_sync(...) DLLM_EMU_SHUFFLE(shuffle_xor, __VA_ARGS__, 32, )
#define __shfl_down_sync(...) DLLM_EMU_SHUFFLE(shuffle_down, __VA_ARGS__, 32, )
#define __shfl_up_sync(...) DLLM_EMU_SHUFFLE(shuffle_up, __VA_ARGS__, 32, )
#define __ballot_sync(mask, p) ::dllm::emu::ballot(mask, p, DLLM_EMU_HERE)
#define __any_sync(mask, p) (::dllm::emu::ballot(mask, p, DLLM_EMU_HERE) != 0)
#define __all_sync(mask, p) (::dllm::emu::ballot(mask, !(p), DLLM_EMU_HERE) == 0)
#define __syncthreads() ::dllm::emu::block_barrier(DLLM_EMU_HERE)
#define __syncthreads_count(p) ::dllm::emu::block_vote((p) != 0, DLLM_EMU_HERE)
#define __syncthreads_or(p) int(::dllm::emu::block_vote((p) != 0, DLLM_EMU_HERE) > 0)
#define __syncthreads_and(p) int(::dllm::emu::block_vote((p) == 0, DLLM_EMU_HERE) == 0)
#define __syncwarp() ::dllm::emu::warp_barrier(0xffffffffu, DLLM_EMU_HERE)
#define __activemask() ::dllm::emu::active_lanes()

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> x) {
  return ::dllm::emu::atomic_update(p, [&](T old) { return T(old + x); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> x) {
  return ::dllm::emu::atomic_update(p, [&](T old) { return old > x ? old : x; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> x) {
  return ::dllm::emu::atomic_update(p, [&](T old) { return old < x ? old : x; });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> x) {
  return ::dllm::emu::atomic_update(p, [&](T old) { return T(old | x); });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> x) {
  return ::dllm::emu::atomic_update(p, [&](T) { return x; });
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
// Picks four of eight bytes; only the low three bits of a selector count.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return r;
}
using std::max;
using std::min;
