#include "ops/attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/cpu/kernels.h"
#include "ops/linear.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace dllm::ops {
namespace {

constexpr int64_t kChunk = 256;  // keys per step of the online softmax: fixed, so that a row's result is too
constexpr int64_t kTile = 32;    // query rows (times heads of a group) per task

// Query rows [begin, end) of one sequence and KV head; with grouped heads, "row" counts (row, head of the group).
struct Task {
  const AttentionSequence* sequence;
  int kv_head;
  int64_t begin, end;
};

std::vector<Task> split(const AttentionArgs& args) {
  const int64_t group = args.n_heads / args.n_kv;
  std::vector<Task> tasks;
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    const int64_t rows = (sequence.row_end - sequence.row_begin) * group;
    if (rows == 0) continue;
    const int64_t tiles = (rows + kTile - 1) / kTile;
    for (int h = 0; h < args.n_kv; ++h)
      for (int64_t t = 0; t < tiles; ++t) tasks.push_back({&sequence, h, rows * t / tiles, rows * (t + 1) / tiles});
  }
  return tasks;
}

// A thread's working set for one task.
struct Scratch {
  Buffer memory;
  void* q;           // [kTile, hd] as the kernel reads A
  float* scores;     // [kTile, ld_scores]
  uint16_t* bf16;    // [kTile, ld_bf16], probabilities where the kernel reads A as bf16
  float* acc;        // [kTile, hd_pad]
  float *max, *sum;  // [kTile]
  static constexpr int64_t ld_scores = kChunk + 16, ld_bf16 = kChunk + 32;  // an odd number of cache lines

  void prepare(int64_t hd_pad) {
    const size_t q_bytes = size_t(kTile * hd_pad) * 4, score_bytes = size_t(kTile * ld_scores) * 4;
    const size_t bf16_bytes = size_t(kTile * ld_bf16) * 2, row_bytes = size_t(kTile) * 4;
    memory.reserve(2 * q_bytes + score_bytes + bf16_bytes + 2 * row_bytes, "attention scratch");
    char* p = memory.as<char>();
    const auto take = [&](size_t bytes) { return std::exchange(p, p + bytes); };
    q = take(q_bytes);
    scores = reinterpret_cast<float*>(take(score_bytes));
    bf16 = reinterpret_cast<uint16_t*>(take(bf16_bytes));
    acc = reinterpret_cast<float*>(take(q_bytes));
    max = reinterpret_cast<float*>(take(row_bytes));
    sum = reinterpret_cast<float*>(take(row_bytes));
  }
};

void run(const AttentionArgs& args, const Task& task, Scratch& s) {
  const cpu::Kernels& kernels = cpu::kernels();
  const KvSlab& slab = task.sequence->slab;
  const int64_t hd = args.head_dim, hd_pad = slab.hd_pad(), group = args.n_heads / args.n_kv;
  const int64_t n_keys = task.sequence->n_keys, rows = task.end - task.begin;
  const bool bf16 = args.dtype == DType::BF16, bf16_a = bf16 && kernels.bf16_a;
  const int64_t size = int64_t(size_of(args.dtype)), a_size = bf16_a ? 2 : 4;
  const auto gemm = bf16 ? kernels.gemm_bf16 : kernels.gemm_f32;
  // Element offset of a row's head in q and out.
  const auto at = [&](int64_t row, int64_t ld) {
    return (task.sequence->row_begin + row / group) * ld + (task.kv_head * group + row % group) * hd;
  };

  for (int64_t r = 0; r < rows; ++r) {
    const char* q = static_cast<const char*>(args.q) + at(task.begin + r, args.ldq) * size;
    if (bf16 && !bf16_a)
      kernels.widen(reinterpret_cast<const uint16_t*>(q), hd, static_cast<float*>(s.q) + r * hd);
    else
      std::memcpy(static_cast<char*>(s.q) + r * hd * a_size, q, size_t(hd * a_size));
  }

  const char* k = static_cast<const char*>(slab.k) + slab.k_offset(0, task.kv_head, 0) * size;
  const char* v = static_cast<const char*>(slab.v) + slab.v_offset(0, task.kv_head, 0) * size;
  for (int64_t key = 0; key < n_keys; key += kChunk) {
    const int64_t n = std::min(kChunk, n_keys - key);
    for (int64_t j = 0; j < n; j += kPanel)
      gemm(rows, hd, s.q, hd, k + (key + j) * hd * size, s.scores + j, Scratch::ld_scores, false);
    kernels.softmax_chunk({rows, n, s.scores, Scratch::ld_scores, bf16_a ? s.bf16 : nullptr, Scratch::ld_bf16,
                           args.scale, key == 0, s.max, s.sum, s.acc, hd_pad, hd_pad});
    const void* p = bf16_a ? static_cast<const void*>(s.bf16) : s.scores;
    const int64_t ldp = bf16_a ? Scratch::ld_bf16 : Scratch::ld_scores;
    for (int64_t i = 0; i < hd; i += kPanel)
      gemm(rows, n, p, ldp, v + (i * slab.capacity + key * kPanel) * size, s.acc + i, hd_pad, key > 0);
  }

  for (int64_t r = 0; r < rows; ++r)
    kernels.scale_row(s.acc + r * hd_pad, 1.0f / s.sum[r], hd,
                      static_cast<char*>(args.out) + at(task.begin + r, args.ldo) * size, bf16);
}

}  // namespace

void attention(const AttentionArgs& args) {
  if (!(args.scale > 0)) fail<UsageError>("attention: scale = ", args.scale, " is not positive");
  const std::vector<Task> tasks = split(args);
  parallel_for(int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    scratch.prepare((args.head_dim + kPanel - 1) / kPanel * kPanel);
    for (int64_t t = begin; t < end; ++t) run(args, tasks[size_t(t)], scratch);
  });
}

}  // namespace dllm::ops
