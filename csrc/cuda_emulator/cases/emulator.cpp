// The emulator itself: mistakes that it must catch, each with its message, and unusual things that are allowed.

#include <cstdint>
#include <string>
#include <vector>

#include "cuda_emulator/case.h"
#include "ops/cuda/kernel.h"

namespace dllm::cu {
namespace {

// --- Mistakes ---------------------------------------------------------------------------------------------------------

DLLM_KERNEL(64) barrier_after_return(int* x) {
  if (threadIdx.x >= 16) return;
  __syncthreads();
  x[threadIdx.x] = 1;
}
DLLM_KERNEL(64) two_barriers(int* x) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  x[threadIdx.x] = 1;
}
DLLM_KERNEL(64) lane_outside_mask(int* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_sync(0x0000ffffu, int(threadIdx.x), 20);
}
DLLM_KERNEL(64) caller_outside_mask(int* x) { x[threadIdx.x] = __shfl_sync(0x0000ffffu, int(threadIdx.x), 0); }
DLLM_KERNEL(64) different_warp_operations(int* x) {
  if (threadIdx.x & 1)
    x[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
  else
    __syncwarp();
}
DLLM_KERNEL(64) exited_lanes(int* x) {
  if (threadIdx.x & 1) return;
  x[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
}
DLLM_KERNEL(64) wait_for_each_other(int* x) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    x[0] = threadIdx.x & 1 ? __shfl_sync(kAllLanes, 1, 0) : __shfl_sync(0x55555557u, 1, 0);
}
DLLM_KERNEL(64) misaligned_load(char* x) {
  if (load128(x + 8).x == 1) __syncwarp();
}
DLLM_KERNEL(64) misaligned_store(char* x) { store128(x + 4, make_uint4(0, 0, 0, 0)); }
DLLM_KERNEL(64) misaligned_copy(char* x) {
  DLLM_SHARED(uint4, s, [2]);
  copy_async16(reinterpret_cast<char*>(s) + 8, x, true);
}
DLLM_KERNEL(64) copy_out_of_shared(char* x) { copy_async16(x, x + 16, true); }
DLLM_KERNEL(64) copy_without_wait(char* x) {
  DLLM_SHARED(uint4, s, [1]);
  copy_async16(s, x, true);
  copy_async_commit();
}
DLLM_KERNEL(64) much_static_shared(int* x) {
  DLLM_SHARED(int, s, [12 * 1024 + 1]);
  x[0] = s[0];
}
DLLM_KERNEL(64) dynamic_shared(int* x) {
  DLLM_DYNAMIC_SHARED(int, s);
  s[threadIdx.x] = int(threadIdx.x);
  x[threadIdx.x] = s[threadIdx.x];
}
DLLM_KERNEL(1024) nothing(int*) {}

void mistakes(emu::Case& c) {
  int* x = c.upload(std::vector<int>(2048, 0));
  const auto fails = [&](const char* words, auto kernel, dim3 grid, dim3 block, size_t shared) {
    c.expect_error(words, [&] { launch(c.stream(), "mistake", kernel, grid, block, shared, x); });
    // The emulator must be usable afterwards.
    launch(c.stream(), "dynamic_shared", dynamic_shared, 1, 64, 256, x);
    c.expect(c.host(x, 64)[63] == 63, "a kernel after \"" + std::string(words) + "\"");
  };
  fails("threads of the block have returned", barrier_after_return, 1, 32, 0);
  fails("while other threads wait in the one at", two_barriers, 1, 64, 0);
  fails("shuffle reads lane 20, which does not take part", lane_outside_mask, 1, 32, 0);
  fails("does not name the calling lane", caller_outside_mask, 1, 32, 0);
  fails("a warp operation other than the one", different_warp_operations, 1, 32, 0);
  fails("do not exist or have returned", exited_lanes, 1, 32, 0);
  fails("deadlock in kernel mistake, block (0,0,0)", wait_for_each_other, 1, 64, 0);
  fails("bytes of static shared memory", much_static_shared, 1, 32, 0);
  fails("launched with 0 bytes", dynamic_shared, 1, 32, 0);
  fails("bytes of dynamic shared memory", dynamic_shared, 1, 32, 99 * 1024 + 1);
  fails("a block of (1025,1,1) threads", nothing, 1, 1025, 0);
  fails("a grid of (0,1,1) blocks", nothing, 0, 32, 0);
}

void mistakes_of_alignment(emu::Case& c) {
  char* x = c.upload(std::vector<char>(64, 0));
  const auto fails = [&](const char* words, auto kernel) {
    c.expect_error(words, [&] { launch(c.stream(), "mistake", kernel, 1, 1, 0, x); });
  };
  fails("load of 16 bytes", misaligned_load);
  fails("store of 16 bytes", misaligned_store);
  fails("cp.async: destination is not aligned", misaligned_copy);
  fails("cp.async: destination is not in shared memory", copy_out_of_shared);
  fails("a cp.async has not been waited for", copy_without_wait);
}

DLLM_KERNEL(64) copy_read_too_early(const float* in, float* out) {
  DLLM_SHARED(float, s, [4]);
  copy_async16(s, in, true);
  copy_async_commit();
  out[0] = s[0];
  copy_async_wait<0>();
  out[1] = s[0];
}
void copies_land_late(emu::Case& c) {
  float* in = c.upload(std::vector<float>{1, 2, 3, 4});
  float* out = c.device<float>(2);
  launch(c.stream(), "copy_read_too_early", copy_read_too_early, 1, 1, 0, in, out);
  const std::vector<float> r = c.host(out, 2);
  const bool late = emu::config().copy_async == emu::CopyAsync::Late;
  c.expect(late ? std::isnan(r[0]) : r[0] == 1, "shared memory before the copy is waited for");
  c.expect(r[1] == 1, "shared memory after the copy is waited for");
  if (late) c.expect_report("read of uninitialised shared memory");
}

void streams(emu::Case& c) {
  for (const auto mode : {emu::Queue::Mode::Eager, emu::Queue::Mode::Lazy}) {
    const bool lazy = mode == emu::Queue::Mode::Lazy;
    emu::Queue q(mode);
    std::string log;
    const auto push = [&](char letter, emu::Kind kind) {
      q.push(std::string(1, letter), kind, [&log, letter] { log += letter; });
    };
    q.trace = true;
    push('a', emu::Kind::Kernel);
    const uint64_t event = q.submitted();
    push('b', emu::Kind::Fill);
    c.expect(log == (lazy ? "" : "ab"), "work before a synchronisation");
    q.run_until(event);
    c.expect(log == (lazy ? "a" : "ab"), "work up to an event");
    q.begin_capture();
    push('c', emu::Kind::Kernel);
    push('d', emu::Kind::Gemm);
    c.expect_error("captured", [&] { q.synchronize(); });
    const emu::Graph graph = q.end_capture();
    q.replay(graph);
    q.replay(graph);
    q.synchronize();
    c.expect(log == "abcdcd", "work of a replayed graph");
    c.expect(q.counters()[emu::Kind::Kernel] == 3 && q.counters()[emu::Kind::Gemm] == 2, "counted work");
    c.expect(q.counters().graph_launches == 2 && q.counters().synchronisations == 2,
             "counted graphs and synchronisations");
    c.expect(q.executed().size() == 6 && q.executed()[5].first == "d", "the trace");
    c.expect(q.submitted() == 4 && q.completed() == 4, "tickets");
  }
}

// --- Races: seen in the race build --------------------------------------------------------------------------------------

DLLM_KERNEL(64) race_in_warp(float* x) {
  DLLM_SHARED(float, s, [32]);
  s[threadIdx.x] = float(threadIdx.x);
  x[threadIdx.x] = s[threadIdx.x ^ 1];
}
DLLM_KERNEL(64) race_in_block(float* x) {
  DLLM_SHARED(float, s, [64]);
  s[threadIdx.x] = float(threadIdx.x);
  __syncwarp();
  x[threadIdx.x] = s[threadIdx.x ^ 32];
}
DLLM_KERNEL(64) race_on_device_memory(float* x) { x[threadIdx.x / 2] = 1; }
DLLM_KERNEL(64) race_of_blocks(float* x) { x[threadIdx.x] = 1; }
DLLM_KERNEL(64) read_of_other_block(float* x) {
  if (blockIdx.x == 0) x[threadIdx.x] = 1;
  if (blockIdx.x == 1) x[64 + threadIdx.x] = x[threadIdx.x];
}
DLLM_KERNEL(64) unwritten_shared(float* x) {
  DLLM_SHARED(float, s, [64]);
  if (threadIdx.x < 63) s[threadIdx.x] = 1;
  x[threadIdx.x] = s[threadIdx.x];
}
DLLM_KERNEL(64) add_one(float* x) { x[threadIdx.x] += 1; }

void races(emu::Case& c) {
  const auto reports = [&](const char* words, auto kernel, int grid, int block) {
    launch(c.stream(), "race", kernel, grid, block, 0, c.device<float>(128));
    c.expect_report(words);
  };
  reports("with no barrier between, of shared memory", race_in_warp, 1, 32);
  reports("with no barrier between, of shared memory", race_in_block, 1, 64);
  reports("write and write with no barrier between, of device memory", race_on_device_memory, 1, 64);
  reports("write and write by two blocks of device memory", race_of_blocks, 2, 64);
  reports("by two blocks of device memory", read_of_other_block, 2, 64);
  reports("read of uninitialised shared memory", unwritten_shared, 1, 64);
  reports("read of uninitialised device memory", add_one, 1, 64);
  static float on_host[64];
  float* host = on_host;
  launch(c.stream(), "race", add_one, 1, 64, 0, host);
  c.expect_report("host memory");
}

// --- What is allowed --------------------------------------------------------------------------------------------------

DLLM_KERNEL(64) partial_masks(int* x) {
  const int i = int(threadIdx.x);
  if (i < 16)
    x[i] = __shfl_xor_sync(0x0000ffffu, i, 1);
  else
    x[i] = __popc(__ballot_sync(0xffff0000u, i & 1));
}
DLLM_KERNEL(64) short_last_warp(int* x) {
  DLLM_SHARED(int, s, [40]);
  s[threadIdx.x] = int(threadIdx.x);
  __syncwarp();
  const int neighbour = s[threadIdx.x ^ 1];
  const int odd = __syncthreads_count(threadIdx.x & 1);
  x[threadIdx.x] = neighbour + 1000 * odd;
}
DLLM_KERNEL(64) widths(int* x) {
  const int i = int(threadIdx.x);
  x[i] = __shfl_down_sync(kAllLanes, i, 1, 8) + 100 * __shfl_up_sync(kAllLanes, i, 3) +
         10000 * __shfl_sync(kAllLanes, i, 9, 4);
}
DLLM_KERNEL(128) atomics(int* x, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  atomicAdd(x, 1);
  atomicMax(x + 1, i);
  atomicMin(x + 2, -i);
  atomicOr(x + 3, 1 << i % 31);
}
DLLM_KERNEL(64) several_shared_arrays(float* x, int rounds) {
  DLLM_SHARED(float, a, [64]);
  DLLM_DYNAMIC_SHARED(float, b);
  float sum = 0;
  for (int i = 0; i < rounds; ++i) {
    a[threadIdx.x] = float(i);
    b[threadIdx.x] = float(blockIdx.x);
    __syncthreads();
    sum += a[63 - threadIdx.x] + b[63 - threadIdx.x];
    __syncthreads();
  }
  x[blockIdx.x * 64 + threadIdx.x] = sum;
}

void allowed(emu::Case& c) {
  int* x = c.device<int>(64);
  launch(c.stream(), "partial_masks", partial_masks, 1, 32, 0, x);
  std::vector<int> r = c.host(x, 32);
  for (int i = 0; i < 32; ++i) c.expect(r[size_t(i)] == (i < 16 ? i ^ 1 : 8), "partial masks");

  launch(c.stream(), "short_last_warp", short_last_warp, 1, 40, 0, x);
  r = c.host(x, 40);
  for (int i = 0; i < 40; ++i) c.expect(r[size_t(i)] == (i ^ 1) + 20000, "a short last warp");

  launch(c.stream(), "widths", widths, 1, 32, 0, x);
  r = c.host(x, 32);
  for (int i = 0; i < 32; ++i)
    c.expect(r[size_t(i)] == (i % 8 == 7 ? i : i + 1) + 100 * (i < 3 ? i : i - 3) + 10000 * (i / 4 * 4 + 1),
             "shuffles of parts");

  int* counts = c.upload(std::vector<int>(4, 0));
  launch(c.stream(), "atomics", atomics, 7, 100, 0, counts, 650);
  c.expect(c.host(counts, 4) == std::vector<int>{650, 649, -649, 0x7fffffff}, "atomics");
  c.output(counts, 4);

  float* sums = c.device<float>(5 * 64);
  launch(c.stream(), "several_shared_arrays", several_shared_arrays, 5, 64, 64 * sizeof(float), sums, 3);
  c.expect(c.host(sums, 5 * 64)[4 * 64] == 3 + 3 * 4, "shared arrays");
  c.output(sums, 5 * 64);
}

// Fragments against plain products: ldmatrix of a, ldmatrix transposed of b.
template <class T>
DLLM_KERNEL(32)
product(const T* a, const T* b, float* out) {
  DLLM_SHARED(T, sa, [16 * 24]);
  DLLM_SHARED(T, sb, [16 * 24]);
  const int lane = int(threadIdx.x), row = lane / 2, half_row = lane % 2 * 8;
  copy_async16(sa + row * 24 + half_row, a + row * 16 + half_row, true);
  copy_async16(sb + row * 24 + half_row, b + row * 16 + half_row, true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  uint32_t fa[4], fb[4];
  load_matrix_x4<false>(fa, sa + lane % 16 * 24 + lane / 16 * 8);
  load_matrix_x4<true>(fb, sb + lane % 16 * 24 + lane / 16 * 8);
  for (int n = 0; n < 2; ++n) {
    float d[4] = {0, 0, 0, 0};
    const uint32_t pair[2] = {fb[2 * n], fb[2 * n + 1]};
    mma_m16n8k16<T>(d, fa, pair);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

template <class T>
void fragments(emu::Case& c) {
  T* a = c.random<T>(256);
  T* b = c.random<T>(256);
  float* out = c.device<float>(256);
  launch(c.stream(), "product", product<T>, 1, 32, 0, a, b, out);
  const auto ha = c.host(a, 256), hb = c.host(b, 256);
  const auto r = c.host(out, 256);
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 16; ++j) {
      double sum = 0;
      for (size_t k = 0; k < 16; ++k) sum += double(to_float(ha[i * 16 + k])) * double(to_float(hb[k * 16 + j]));
      c.expect_close(r[i * 16 + j], sum, 1e-5, "element of a product");
    }
  c.output(out, 256);
  c.budget("banks", 1.0);
}

const emu::Registered registered[] = {
    {"emulator/mistakes", mistakes},
    {"emulator/mistakes_of_alignment", mistakes_of_alignment},
    {"emulator/copies_land_late", copies_land_late},
    {"emulator/streams", streams},
    {"emulator/races", races},
    {"emulator/allowed", allowed},
    {"emulator/fragments_bf16", fragments<bf16>},
    {"emulator/fragments_half", fragments<half>},
};

}  // namespace
}  // namespace dllm::cu
