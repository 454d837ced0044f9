#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ops/cpu/kernels.h"
#include "ops/linear.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace dllm::ops {
namespace {

constexpr int64_t kChunk = 256;     // keys per step of the online softmax: fixed, so that a row's result is too
constexpr int64_t kTile = 32;       // query rows (times heads of a group) per tile
constexpr int64_t kMeanRows = 128;  // most of these per task that computes means: enough to use K and V while in cache

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Query rows [begin, end) of one sequence and KV head; with grouped heads, "row" counts (row, head of the group).
struct Tile {
  const AttentionSequence* sequence;
  int kv_head;
  int64_t begin, end;
};

// A thread's working set for one tile.
struct Scratch {
  Buffer memory;
  void* q;  // [kTile, hd] as the kernel reads A
  float* scores;  // [kTile, ld_scores]: one chunk, or all chunks side by side
  uint16_t* bf16;  // [kTile, ld_bf16], probabilities where the kernel reads A as bf16
  float* acc;  // [kTile, hd_pad]
  float *max, *sum;  // [kTile]
  float* chunk_max;  // [chunks, kTile]: the maximum that a chunk's exponentials are relative to
  int64_t ld_scores;
  static constexpr int64_t ld_bf16 = kChunk + 32;  // an odd number of cache lines, as ld_scores

  void prepare(int64_t head_dim, int64_t keys) {
    const int64_t hd_pad = divide_up(head_dim, kPanel) * kPanel, chunks = divide_up(keys, kChunk);
    ld_scores = divide_up(keys, kPanel) * kPanel + 16;
    const size_t q_bytes = size_t(kTile * hd_pad) * 4, score_bytes = size_t(kTile * ld_scores) * 4;
    const size_t bf16_bytes = size_t(kTile * ld_bf16) * 2, row_bytes = size_t(kTile) * 4;
    memory.reserve(2 * q_bytes + score_bytes + bf16_bytes + size_t(2 + chunks) * row_bytes, "attention scratch");
    char* p = memory.as<char>();
    const auto take = [&](size_t bytes) { return std::exchange(p, p + bytes); };
    q = take(q_bytes);
    scores = reinterpret_cast<float*>(take(score_bytes));
    bf16 = reinterpret_cast<uint16_t*>(take(bf16_bytes));
    acc = reinterpret_cast<float*>(take(q_bytes));
    max = reinterpret_cast<float*>(take(row_bytes));
    sum = reinterpret_cast<float*>(take(row_bytes));
    chunk_max = reinterpret_cast<float*>(take(size_t(chunks) * row_bytes));
  }
};

// Writes the tile's rows of `out`. For a sequence with `mean`, the exponentials of every chunk and their maximum stay in
// the scratch; otherwise each chunk overwrites the one before.
void attend(const AttentionArgs& args, const Tile& tile, Scratch& s) {
  const cpu::Kernels& kernels = cpu::kernels();
  const KvSlab& slab = tile.sequence->slab;
  const int64_t hd = args.head_dim, hd_pad = slab.hd_pad(), group = args.n_heads / args.n_kv;
  const int64_t n_keys = tile.sequence->n_keys, rows = tile.end - tile.begin;
  const bool bf16 = args.dtype == DType::BF16, bf16_a = bf16 && kernels.bf16_a, keep = tile.sequence->mean != nullptr;
  const int64_t size = int64_t(size_of(args.dtype)), a_size = bf16_a ? 2 : 4;
  const auto gemm = bf16 ? kernels.gemm_bf16 : kernels.gemm_f32;
  // Element offset of a row's head in q and out.
  const auto at = [&](int64_t row, int64_t ld) {
    return (tile.sequence->row_begin + row / group) * ld + (tile.kv_head * group + row % group) * hd;
  };

  for (int64_t r = 0; r < rows; ++r) {
    const char* q = static_cast<const char*>(args.q) + at(tile.begin + r, args.ldq) * size;
    if (bf16 && !bf16_a)
      kernels.widen(reinterpret_cast<const uint16_t*>(q), hd, static_cast<float*>(s.q) + r * hd);
    else
      std::memcpy(static_cast<char*>(s.q) + r * hd * a_size, q, size_t(hd * a_size));
  }

  const char* k = static_cast<const char*>(slab.k) + slab.k_offset(0, tile.kv_head, 0) * size;
  const char* v = static_cast<const char*>(slab.v) + slab.v_offset(0, tile.kv_head, 0) * size;
  for (int64_t key = 0; key < n_keys; key += kChunk) {
    const int64_t n = std::min(kChunk, n_keys - key);
    float* scores = s.scores + (keep ? key : 0);
    for (int64_t j = 0; j < n; j += kPanel)
      gemm(rows, hd, s.q, hd, k + (key + j) * hd * size, scores + j, s.ld_scores, false);
    kernels.softmax_chunk({rows, n, scores, s.ld_scores, bf16_a ? s.bf16 : nullptr, Scratch::ld_bf16, args.scale,
                           key == 0, s.max, s.sum, s.acc, hd_pad, hd_pad});
    if (keep) std::copy_n(s.max, rows, s.chunk_max + key / kChunk * kTile);
    const void* p = bf16_a ? static_cast<const void*>(s.bf16) : scores;
    const int64_t ldp = bf16_a ? Scratch::ld_bf16 : s.ld_scores;
    for (int64_t i = 0; i < hd; i += kPanel)
      gemm(rows, n, p, ldp, v + (i * slab.capacity + key * kPanel) * size, s.acc + i, hd_pad, key > 0);
  }

  for (int64_t r = 0; r < rows; ++r)
    kernels.scale_row(s.acc + r * hd_pad, 1.0f / s.sum[r], hd,
                      static_cast<char*>(args.out) + at(tile.begin + r, args.ldo) * size, bf16);
}

// What attend() kept, added to the means: with m_c the maximum at chunk c, m and sum the final ones,
//   p_j = exp(x_j - m) / sum = exp(x_j - m_c) * exp(m_c - m) / sum     for the keys j of chunk c.
void add_to_mean(const AttentionArgs& args, const Tile& tile, const Scratch& s) {
  const auto axpy = cpu::kernels().axpy;
  const AttentionSequence& sequence = *tile.sequence;
  const int64_t group = args.n_heads / args.n_kv;
  for (int64_t r = 0; r < tile.end - tile.begin; ++r) {
    float* mean = sequence.mean + (tile.begin + r) / group * sequence.ld_mean;
    for (int64_t key = 0; key < sequence.n_keys; key += kChunk) {
      const float shrink = std::exp(s.chunk_max[key / kChunk * kTile + r] - s.max[r]);
      axpy(shrink / (s.sum[r] * float(args.n_heads)), s.scores + r * s.ld_scores + key, false,
           std::min(kChunk, sequence.n_keys - key), mean + key);
    }
  }
}

// Calls f(begin, end) for equal parts of [begin, end) of at most kTile.
template <class F>
void for_tiles(int64_t begin, int64_t end, F&& f) {
  const int64_t n = end - begin, tiles = divide_up(n, kTile);
  for (int64_t t = 0; t < tiles; ++t) f(begin + n * t / tiles, begin + n * (t + 1) / tiles);
}

// Sequences without a mean: a task is a tile.
void run_tiles(const AttentionArgs& args) {
  const int64_t group = args.n_heads / args.n_kv;
  std::vector<Tile> tasks;
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    if (sequence.mean) continue;
    for (int h = 0; h < args.n_kv; ++h)
      for_tiles(0, (sequence.row_end - sequence.row_begin) * group,
                [&](int64_t begin, int64_t end) { tasks.push_back({&sequence, h, begin, end}); });
  }
  parallel_for(int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    scratch.prepare(args.head_dim, kChunk);
    for (int64_t t = begin; t < end; ++t) attend(args, tasks[size_t(t)], scratch);
  });
}

// Sequences with a mean: a task owns some rows and takes their heads one after the other, so that nobody else adds to
// its rows of the mean and the heads are added in ascending order.
void run_rows_with_mean(const AttentionArgs& args) {
  struct Task {
    const AttentionSequence* sequence;
    int64_t begin, end;  // rows, counted from row_begin
  };
  const int64_t group = args.n_heads / args.n_kv, most = std::max<int64_t>(1, kMeanRows / group);
  int64_t all_rows = 0;
  for (int64_t s = 0; s < args.n_sequences; ++s)
    if (args.sequences[s].mean) all_rows += args.sequences[s].row_end - args.sequences[s].row_begin;
  if (all_rows == 0) return;

  // Few long tasks: their number, where there is but one sequence, is a multiple of the number of threads.
  const int64_t threads = num_threads(), wanted = divide_up(divide_up(all_rows, most), threads) * threads;
  std::vector<Task> tasks;
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    const int64_t rows = sequence.row_end - sequence.row_begin;
    if (!sequence.mean) continue;
    const int64_t n = std::min(rows, divide_up(rows * wanted, all_rows));
    for (int64_t t = 0; t < n; ++t) tasks.push_back({&sequence, rows * t / n, rows * (t + 1) / n});
  }
  parallel_for(int64_t(tasks.size()), 1, [&](int64_t first, int64_t last) {
    thread_local Scratch scratch;
    for (int64_t t = first; t < last; ++t) {
      const Task& task = tasks[size_t(t)];
      const AttentionSequence& sequence = *task.sequence;
      scratch.prepare(args.head_dim, sequence.n_keys);
      for (int64_t r = task.begin; r < task.end; ++r)
        std::fill_n(sequence.mean + r * sequence.ld_mean, sequence.n_keys, 0.0f);
      for (int h = 0; h < args.n_kv; ++h)
        for_tiles(task.begin * group, task.end * group, [&](int64_t begin, int64_t end) {
          attend(args, {&sequence, h, begin, end}, scratch);
          add_to_mean(args, {&sequence, h, begin, end}, scratch);
        });
    }
  });
}

}  // namespace

void attention(const AttentionArgs& args) {
  if (!(args.scale > 0)) fail<UsageError>("attention: scale = ", args.scale, " is not positive");
  run_tiles(args);
  run_rows_with_mean(args);
}

}  // namespace dllm::ops
