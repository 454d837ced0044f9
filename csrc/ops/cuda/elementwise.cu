// Embedding, RMSNorm, rotary embedding with the KV write, SiLU gating: all bound by memory, and each moves its operands
// once. Per row of width d, with elements of T bytes:
//   embedding      reads T d, writes 4 d
//   rms_norm       reads 4 d (a row stays in registers between its two passes; the weights come from L2), writes T d
//   rope_kv_write  reads 4 (n_heads + 2 n_kv) head_dim, writes T of each of these; cosines and bias come from L1 and L2
//   silu_mul       reads 8 m, writes T m
// ops/cuda/rows.h says how rows and columns go to threads; RMSNorm has a block per row.
#include "ops/cuda/elementwise.h"

#include "ops/cuda/kernel.h"
#include "ops/cuda/rows.h"
#include "runtime/error.h"

namespace dllm::ops::cuda {
namespace {

using namespace cu;

constexpr int kNormThreads = 512, kNormWarps = kNormThreads / 32;
constexpr int kNormElements = 16;  // of a row, in a thread's registers

template <class T, int N>
DLLM_KERNEL(kRowThreads)
embedding_kernel(EmbeddingArgs a) {
  const int i = first_column<N>(), rows = *a.n_rows;
  if (i >= a.d) return;
  for (int r = first_row(); r < rows; r += row_stride()) {
    float x[N];
    load_elements(static_cast<const T*>(a.table) + int64_t(a.tokens[r]) * a.d + i, x);
    store_elements(a.out + int64_t(r) * a.d + i, x);
  }
}

// One block per row.
template <class T, int N>
DLLM_KERNEL(kNormThreads)
rms_norm_kernel(RmsNormArgs a) {
  constexpr int kParts = kNormElements / N;
  DLLM_SHARED(float, sums, [kNormWarps]);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, rows = *a.n_rows;
  for (int r = first_row(); r < rows; r += row_stride()) {
    const float* x = a.x + int64_t(a.rows ? a.rows[r] : r) * a.d;
    float part[kParts][N];
    float square = 0;
    DLLM_UNROLL
    for (int p = 0; p < kParts; ++p) {
      const int i = (p * kNormThreads + thread) * N;
      if (i >= a.d) continue;
      load_elements(x + i, part[p]);
      DLLM_UNROLL
      for (int j = 0; j < N; ++j) square += part[p][j] * part[p][j];
    }
    square = sum_warp(square);
    if (lane == 0) sums[warp] = square;
    __syncthreads();
    const float total = sum_warp(lane < kNormWarps ? sums[lane] : 0.0f);
    __syncthreads();  // before the next row's sums
    const float inverse = 1.0f / sqrtf(total / float(a.d) + a.eps);
    T* out = static_cast<T*>(a.out) + int64_t(r) * a.d;
    DLLM_UNROLL
    for (int p = 0; p < kParts; ++p) {
      const int i = (p * kNormThreads + thread) * N;
      if (i >= a.d) continue;
      float weight[N];
      load_elements(a.weight + i, weight);
      DLLM_UNROLL
      for (int j = 0; j < N; ++j) part[p][j] = part[p][j] * inverse * weight[j];
      store_elements(out + i, part[p]);
    }
  }
}

// A thread has columns [i, i + N) of the two halves of one head: of q and k to rotate, of v to copy.
template <class T, int N>
DLLM_KERNEL(kRowThreads)
rope_kv_write_kernel(RopeKvArgs a) {
  const int half = a.head_dim / 2, heads = a.n_heads + 2 * a.n_kv;
  const int head = first_column<N>() / half, i = first_column<N>() % half, rows = *a.n_rows;
  if (head >= heads) return;
  const int64_t at = int64_t(head) * a.head_dim + i;
  float low_bias[N] = {}, high_bias[N] = {};
  if (a.bias) {
    load_elements(a.bias + at, low_bias);
    load_elements(a.bias + at + half, high_bias);
  }
  for (int r = first_row(); r < rows; r += row_stride()) {
    const float* x = a.qkv + int64_t(r) * heads * a.head_dim + at;
    const int64_t position = a.positions[r];
    float low[N], high[N];
    load_elements(x, low);
    load_elements(x + half, high);
    DLLM_UNROLL
    for (int j = 0; j < N; ++j) low[j] += low_bias[j], high[j] += high_bias[j];

    T* out;
    if (head < a.n_heads) {
      out = static_cast<T*>(a.q_out) + int64_t(r) * a.n_heads * a.head_dim + at;
    } else {
      const KvView slab = a.slabs[a.sequence[r]];
      const bool is_k = head < a.n_heads + a.n_kv;
      const int kv_head = head - a.n_heads - (is_k ? 0 : a.n_kv);
      out = static_cast<T*>(is_k ? slab.k : slab.v) + (int64_t(kv_head) * slab.capacity + position) * a.head_dim + i;
    }
    if (head < a.n_heads + a.n_kv) {
      float cosine[N], sine[N];
      load_elements(a.cos + position * half + i, cosine);
      load_elements(a.sin + position * half + i, sine);
      DLLM_UNROLL
      for (int j = 0; j < N; ++j) {
        const float l = low[j], h = high[j];
        low[j] = l * cosine[j] - h * sine[j];
        high[j] = h * cosine[j] + l * sine[j];
      }
    }
    store_elements(out, low);
    store_elements(out + half, high);
  }
}

template <class T, int N>
DLLM_KERNEL(kRowThreads)
silu_mul_kernel(SiluMulArgs a) {
  const int i = first_column<N>(), rows = *a.n_rows;
  if (i >= a.m) return;
  for (int r = first_row(); r < rows; r += row_stride()) {
    const float* from = a.gate_up + int64_t(r) * 2 * a.m + i;
    float gate[N], up[N];
    load_elements(from, gate);
    load_elements(from + a.m, up);
    DLLM_UNROLL
    for (int j = 0; j < N; ++j) gate[j] = gate[j] / (1.0f + expf(-gate[j])) * up[j];
    store_elements(static_cast<T*>(a.out) + int64_t(r) * a.m + i, gate);
  }
}

}  // namespace

void embedding(Stream stream, const EmbeddingArgs& a) {
  if (a.capacity == 0) return;
  dispatch_rows(a.type, a.d % 4 == 0, [&]<class T, int N>() {
    launch(stream, "embedding", embedding_kernel<T, N>, row_grid(a.capacity, a.d, N), kRowThreads, 0, a);
  });
}

void rms_norm(Stream stream, DType type, const RmsNormArgs& a) {
  if (a.capacity == 0) return;
  if (a.d > kNormThreads * kNormElements)
    fail<Error>("rms_norm: width ", a.d, " is above ", kNormThreads * kNormElements);
  const dim3 blocks(unsigned(min(a.capacity, kMaxBlocks * kRowThreads / kNormThreads)));
  dispatch_rows(type, a.d % 4 == 0, [&]<class T, int N>() {
    launch(stream, "rms_norm", rms_norm_kernel<T, N>, blocks, kNormThreads, 0, a);
  });
}

void rope_kv_write(Stream stream, DType type, const RopeKvArgs& a) {
  if (a.capacity == 0) return;
  const int32_t columns = (a.n_heads + 2 * a.n_kv) * (a.head_dim / 2);
  dispatch_rows(type, a.head_dim % 8 == 0, [&]<class T, int N>() {
    launch(stream, "rope_kv_write", rope_kv_write_kernel<T, N>, row_grid(a.capacity, columns, N), kRowThreads, 0, a);
  });
}

void silu_mul(Stream stream, DType type, const SiluMulArgs& a) {
  if (a.capacity == 0) return;
  dispatch_rows(type, a.m % 4 == 0, [&]<class T, int N>() {
    launch(stream, "silu_mul", silu_mul_kernel<T, N>, row_grid(a.capacity, a.m, N), kRowThreads, 0, a);
  });
}

}  // namespace dllm::ops::cuda
