#include "ops/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "ops/cpu/kernels.h"
#include "ops/linear.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace dllm::ops {
namespace {

constexpr int64_t kChunk = 512;     // most keys of a chunk
constexpr int64_t kTile = 32;       // most query rows (times heads of a group) of a tile
constexpr int64_t kMeanRows = 128;  // most of these per task that computes means: enough to use K and V while in cache

// How work is split, in multiply-adds of Q K^T. No task need be more than a thread's share / kSlack, so that the last to
// finish is not far behind the first, nor is anything split below kLeast, about 5 microseconds. Reading a key from memory
// takes as long as kReadRows rows' work on it. Hence rows are split down to kShort, which still hides the reading as long
// as neighbouring tasks find in a cache what one of them has read; then keys; then rows down to kShorter.
constexpr int64_t kLeast = 1 << 18, kSlack = 4, kReadRows = 8, kShort = 16, kShorter = 8;

constexpr float kLog2E = 1.44269504088896f;  // the kernels take powers of 2

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Equal chunks of whole panels (the last may be shorter): a function of n_keys alone.
struct Chunks {
  int64_t n_keys, count, size;

  explicit Chunks(int64_t keys)
      : n_keys(keys), count(divide_up(keys, kChunk)), size(divide_up(divide_up(keys, count), kPanel) * kPanel) {}
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t keys(int64_t chunk) const { return std::min(size, n_keys - begin(chunk)); }
};

// What a tile's chunks contribute: a_c, m_c (replaced by w_c when all are there) and s_c of ops/attention.h.
struct Partials {
  float* acc;  // [chunks, rows, hd_pad]
  float *max, *sum;  // [chunks, kTile]

  static int64_t floats(int64_t chunks, int64_t rows, int64_t hd_pad) { return chunks * (rows * hd_pad + 2 * kTile); }
  static Partials at(float* p, int64_t chunks, int64_t rows, int64_t hd_pad) {
    return {p, p + chunks * rows * hd_pad, p + chunks * (rows * hd_pad + kTile)};
  }
};

// Query rows [begin, end) of one sequence and KV head; with grouped heads, "row" counts (row, head of the group).
struct Tile {
  const AttentionSequence* sequence;
  int kv_head;
  int64_t begin, end;
  int64_t tasks;  // that share the tile
  int64_t partials;  // their offset in shared memory, if there are several

  int64_t rows() const { return end - begin; }
};

struct Task {
  int64_t tile, chunk_begin, chunk_end;
};

// A thread's working set for one task.
struct Scratch {
  void* q;  // [rows, hd] as the kernel reads A
  float* scores;  // [rows, ld_scores]: the chunks of a pass side by side, or all chunks
  uint16_t* bf16;  // [rows, ld_bf16], exponentials where the kernel reads A as bf16
  float* partials;  // of a tile that has but one task

  // Rows are an odd number of cache lines apart, so that they do not compete for the same places in a cache.
  static int64_t ld_scores(int64_t keys) { return divide_up(keys, kPanel) * kPanel + 16; }
  static int64_t ld_bf16(int64_t keys) { return divide_up(keys, kPanel) * kPanel + 32; }
};

// Every thread's Scratch. It belongs to the thread that calls attention(): were it the workers' own, one of them might
// need memory long after the others because it never had a task before.
class Scratches {
 public:
  // chunks: most of a sequence; kept_keys: most of one whose scores are kept.
  void reserve(int64_t hd_pad, int64_t chunks, int64_t kept_keys) {
    q_bytes_ = size_t(kTile * hd_pad) * 4;
    score_bytes_ = size_t(kTile * Scratch::ld_scores(std::max(kChunk, kept_keys))) * 4;
    bf16_bytes_ = size_t(kTile * Scratch::ld_bf16(kChunk)) * 2;
    bytes_ = q_bytes_ + score_bytes_ + bf16_bytes_ + size_t(Partials::floats(chunks, kTile, hd_pad)) * 4;
    memory_.reserve(checked_bytes("attention scratch", size_t(num_threads()), bytes_), "attention scratch");
  }
  Scratch mine() const {
    char* q = memory_.as<char>() + size_t(thread_index()) * bytes_;
    char *scores = q + q_bytes_, *bf16 = scores + score_bytes_, *partials = bf16 + bf16_bytes_;
    return {q, reinterpret_cast<float*>(scores), reinterpret_cast<uint16_t*>(bf16), reinterpret_cast<float*>(partials)};
  }

 private:
  Buffer memory_;
  size_t q_bytes_ = 0, score_bytes_ = 0, bf16_bytes_ = 0, bytes_ = 0;  // of a thread; all are multiples of 64
};

// Where a tile's rows are in q and out.
struct HeadRows {
  int64_t row, group, head, hd;

  HeadRows(const AttentionArgs& args, const Tile& tile)
      : row(tile.sequence->row_begin), group(args.n_heads / args.n_kv), head(tile.kv_head * group), hd(args.head_dim) {}
  int64_t offset(int64_t r, int64_t ld) const { return (row + r / group) * ld + (head + r % group) * hd; }
};

// Partials of chunks [chunk_begin, chunk_end). With `keep`, s.scores holds all their exponentials afterwards, key j of
// the sequence in column j.
void attend(const AttentionArgs& args, const Tile& tile, int64_t chunk_begin, int64_t chunk_end, const Partials& out,
            bool keep, const Scratch& s) {
  const cpu::Kernels& kernels = cpu::kernels();
  const KvSlab& slab = tile.sequence->slab;
  const Chunks chunks(tile.sequence->n_keys);
  const int64_t hd = args.head_dim, hd_pad = slab.hd_pad(), rows = tile.rows();
  const bool bf16 = args.dtype == DType::BF16, bf16_a = bf16 && kernels.bf16_a;
  const int64_t size = int64_t(size_of(args.dtype)), a_size = bf16_a ? 2 : 4;
  const auto gemm = bf16 ? kernels.gemm_bf16 : kernels.gemm_f32;

  const HeadRows head(args, tile);
  for (int64_t r = 0; r < rows; ++r) {
    const char* q = static_cast<const char*>(args.q) + head.offset(tile.begin + r, args.ldq) * size;
    if (bf16 && !bf16_a)
      kernels.widen(reinterpret_cast<const uint16_t*>(q), hd, static_cast<float*>(s.q) + r * hd);
    else
      std::memcpy(static_cast<char*>(s.q) + r * hd * a_size, q, size_t(hd * a_size));
  }

  // A pass takes as many chunks as the scratch holds scores of: the fewer the rows, the longer the runs of K and V that
  // are read without a break.
  const int64_t pass = std::max<int64_t>(1, kTile / rows);
  const char* k = static_cast<const char*>(slab.k) + slab.k_offset(0, tile.kv_head, 0) * size;
  const char* v = static_cast<const char*>(slab.v) + slab.v_offset(0, tile.kv_head, 0) * size;
  for (int64_t first = chunk_begin; first < chunk_end; first += pass) {
    const int64_t last = std::min(first + pass, chunk_end), origin = chunks.begin(first);
    const int64_t lds = Scratch::ld_scores(keep ? chunks.n_keys : pass * chunks.size);
    const int64_t ldb = Scratch::ld_bf16(pass * chunks.size);
    float* scores = s.scores + (keep ? origin : 0);
    for (int64_t c = first; c < last; ++c) {
      const int64_t key = chunks.begin(c), n = chunks.keys(c);
      float* x = scores + key - origin;
      for (int64_t j = 0; j < n; j += kPanel) gemm(rows, hd, s.q, hd, k + (key + j) * hd * size, x + j, lds, false);
      kernels.softmax_chunk({rows, n, x, lds, bf16_a ? s.bf16 + key - origin : nullptr, ldb, keep, args.scale * kLog2E,
                             out.max + c * kTile, out.sum + c * kTile});
    }
    for (int64_t i = 0; i < hd; i += kPanel)
      for (int64_t c = first; c < last; ++c) {
        const int64_t key = chunks.begin(c);
        const void* e = bf16_a ? static_cast<const void*>(s.bf16 + key - origin) : scores + key - origin;
        gemm(rows, chunks.keys(c), e, bf16_a ? ldb : lds, v + (i * slab.capacity + key * kPanel) * size,
             out.acc + c * rows * hd_pad + i, hd_pad, false);
      }
  }
}

// The tile's rows of `out`, from the partials of all its chunks, whose maxima become the weights.
void finish(const AttentionArgs& args, const Tile& tile, const Partials& partials) {
  const cpu::Kernels& kernels = cpu::kernels();
  const int64_t count = Chunks(tile.sequence->n_keys).count, rows = tile.rows(), hd_pad = tile.sequence->slab.hd_pad();
  const HeadRows head(args, tile);
  kernels.softmax_weights(rows, count, args.scale * kLog2E, partials.max, partials.sum, kTile);
  for (int64_t r = 0; r < rows; ++r)
    kernels.weighted_sum(
        {partials.acc + r * hd_pad, rows * hd_pad, partials.max + r, kTile, count, args.head_dim,
         static_cast<char*>(args.out) + head.offset(tile.begin + r, args.ldo) * int64_t(size_of(args.dtype)),
         args.dtype == DType::BF16});
}

// Calls f(begin, end) for equal parts of [begin, end) of at most `most`.
template <class F>
void for_tiles(int64_t begin, int64_t end, int64_t most, F&& f) {
  const int64_t n = end - begin, tiles = divide_up(n, most);
  for (int64_t t = 0; t < tiles; ++t) f(begin + n * t / tiles, begin + n * (t + 1) / tiles);
}

int64_t cost(int64_t rows, int64_t keys, int64_t hd) { return (rows + kReadRows) * keys * hd; }

// The tiles of a call and their tasks. Its memory is kept from call to call.
struct Plan {
  std::vector<Tile> tiles;
  std::vector<Task> tasks;
  int64_t grain = 1;  // tasks that are worth a thread
  Scratches scratches;
  Buffer partials;  // of tiles with several tasks
  std::vector<std::atomic<int64_t>> left;  // by tile: tasks not yet done

  void make(const AttentionArgs& args);

 private:
  int64_t shared_floats_ = 0;

  void add(const AttentionArgs& args, const AttentionSequence& sequence, int64_t limit);
  void reserve(int64_t threads, int64_t chunks, int64_t hd_pad);
};

void Plan::make(const AttentionArgs& args) {
  const int64_t group = args.n_heads / args.n_kv, threads = num_threads();
  int64_t all = 0, chunks = 0;
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    if (sequence.mean) continue;
    const int64_t rows = (sequence.row_end - sequence.row_begin) * group;
    all += args.n_kv * cost(rows, sequence.n_keys, args.head_dim);
    chunks = std::max(chunks, Chunks(sequence.n_keys).count);
  }
  const int64_t limit = threads == 1 ? std::numeric_limits<int64_t>::max() : std::max(kLeast, all / (threads * kSlack));

  tiles.clear();
  tasks.clear();
  shared_floats_ = 0;
  for (int64_t s = 0; s < args.n_sequences; ++s)
    if (!args.sequences[s].mean) add(args, args.sequences[s], limit);
  if (tasks.empty()) return;
  grain = std::max<int64_t>(1, kLeast * int64_t(tasks.size()) / all);
  reserve(threads, chunks, args.sequences[0].slab.hd_pad());
  for (size_t t = 0; t < tiles.size(); ++t) left[t].store(tiles[t].tasks, std::memory_order_relaxed);
}

void Plan::add(const AttentionArgs& args, const AttentionSequence& sequence, int64_t limit) {
  const int64_t hd = args.head_dim, hd_pad = sequence.slab.hd_pad(), group = args.n_heads / args.n_kv;
  const int64_t all_rows = (sequence.row_end - sequence.row_begin) * group;
  if (all_rows == 0) return;
  const Chunks chunks(sequence.n_keys);
  const auto rows_within = [&](int64_t keys, int64_t least, int64_t most) {
    return std::clamp(limit / (keys * hd) - kReadRows, std::min(least, most), most);
  };
  int64_t most = rows_within(sequence.n_keys, kShort, std::min(all_rows, kTile));
  const int64_t chunks_within = std::clamp<int64_t>(limit / cost(most, chunks.size, hd), 1, chunks.count);
  const int64_t parts = divide_up(chunks.count, chunks_within);
  most = rows_within(std::min(chunks_within * chunks.size, sequence.n_keys), kShorter, most);

  for (int h = 0; h < args.n_kv; ++h)
    for_tiles(0, all_rows, most, [&](int64_t begin, int64_t end) {
      for (int64_t p = 0; p < parts; ++p)
        tasks.push_back({int64_t(tiles.size()), chunks.count * p / parts, chunks.count * (p + 1) / parts});
      tiles.push_back({&sequence, h, begin, end, parts, shared_floats_});
      if (parts > 1) shared_floats_ += Partials::floats(chunks.count, end - begin, hd_pad);
    });
}

// Takes what any step of these sequences may need, so that a later one with other rows takes no more. Tiles with several
// tasks are at most 2 * kSlack per thread, of kShort rows or twice as many of kShorter: each is worth half of `limit`.
void Plan::reserve(int64_t threads, int64_t chunks, int64_t hd_pad) {
  const int64_t most = 2 * 2 * kSlack * threads;
  const bool split = threads > 1 && chunks > 1;
  const int64_t floats = split ? std::max(shared_floats_, most * Partials::floats(chunks, kShorter, hd_pad)) : 0;
  scratches.reserve(hd_pad, chunks, 0);
  partials.reserve(checked_bytes("attention", size_t(floats), sizeof(float)), "attention's partial sums");
  tiles.reserve(size_t(most));
  tasks.reserve(size_t(most * chunks));
  if (const size_t n = std::max(tiles.size(), size_t(most)); left.size() < n)
    left = std::vector<std::atomic<int64_t>>(n);
}

// Sequences without a mean. The task that is the last of its tile to be done finishes it.
void run_tiles(const AttentionArgs& args) {
  thread_local Plan plan;
  plan.make(args);
  const auto run = [&args, &plan = plan](int64_t begin, int64_t end) {
    const Scratch scratch = plan.scratches.mine();
    for (int64_t t = begin; t < end; ++t) {
      const Task& task = plan.tasks[size_t(t)];
      const Tile& tile = plan.tiles[size_t(task.tile)];
      const int64_t count = Chunks(tile.sequence->n_keys).count, hd_pad = tile.sequence->slab.hd_pad();
      const bool alone = tile.tasks == 1;
      float* memory = alone ? scratch.partials : plan.partials.as<float>() + tile.partials;
      const Partials partials = Partials::at(memory, count, tile.rows(), hd_pad);
      attend(args, tile, task.chunk_begin, task.chunk_end, partials, false, scratch);
      if (alone || plan.left[size_t(task.tile)].fetch_sub(1, std::memory_order_acq_rel) == 1)
        finish(args, tile, partials);
    }
  };
  parallel_for(int64_t(plan.tasks.size()), plan.grain, run);
}

// Adds a tile's share to the means, from the exponentials that attend() kept and the weights that finish() left.
void add_to_mean(const AttentionArgs& args, const Tile& tile, const Partials& partials, const Scratch& s) {
  const auto axpy = cpu::kernels().axpy;
  const AttentionSequence& sequence = *tile.sequence;
  const Chunks chunks(sequence.n_keys);
  const int64_t group = args.n_heads / args.n_kv, lds = Scratch::ld_scores(chunks.n_keys);
  for (int64_t r = 0; r < tile.rows(); ++r) {
    float* mean = sequence.mean + (tile.begin + r) / group * sequence.ld_mean;
    for (int64_t c = 0; c < chunks.count; ++c)
      axpy(partials.max[c * kTile + r] / float(args.n_heads), s.scores + r * lds + chunks.begin(c), false,
           chunks.keys(c), mean + chunks.begin(c));
  }
}

// Sequences with a mean: a task owns some rows and takes their heads one after the other, so that nobody else adds to
// its rows of the mean and the heads are added in ascending order.
void run_rows_with_mean(const AttentionArgs& args) {
  struct RowTask {
    const AttentionSequence* sequence;
    int64_t begin, end;  // rows, counted from row_begin
  };
  const int64_t group = args.n_heads / args.n_kv, most = std::max<int64_t>(1, kMeanRows / group);
  int64_t all_rows = 0, most_keys = 0;
  for (int64_t s = 0; s < args.n_sequences; ++s)
    if (const AttentionSequence& sequence = args.sequences[s]; sequence.mean) {
      all_rows += sequence.row_end - sequence.row_begin;
      most_keys = std::max(most_keys, sequence.n_keys);
    }
  if (all_rows == 0) return;

  // Few long tasks: their number, where there is but one sequence, is a multiple of the number of threads.
  const int64_t threads = num_threads(), wanted = divide_up(divide_up(all_rows, most), threads) * threads;
  thread_local struct {
    std::vector<RowTask> tasks;
    Scratches scratches;
  } kept;
  std::vector<RowTask>& tasks = kept.tasks;
  tasks.clear();
  kept.scratches.reserve(args.sequences[0].slab.hd_pad(), Chunks(most_keys).count, most_keys);
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    const int64_t rows = sequence.row_end - sequence.row_begin;
    if (!sequence.mean) continue;
    const int64_t n = std::min(rows, divide_up(rows * wanted, all_rows));
    for (int64_t t = 0; t < n; ++t) tasks.push_back({&sequence, rows * t / n, rows * (t + 1) / n});
  }
  parallel_for(int64_t(tasks.size()), 1, [&, &scratches = kept.scratches](int64_t first, int64_t last) {
    const Scratch scratch = scratches.mine();
    for (int64_t t = first; t < last; ++t) {
      const RowTask& task = tasks[size_t(t)];
      const AttentionSequence& sequence = *task.sequence;
      const int64_t count = Chunks(sequence.n_keys).count, hd_pad = sequence.slab.hd_pad();
      for (int64_t r = task.begin; r < task.end; ++r)
        std::fill_n(sequence.mean + r * sequence.ld_mean, sequence.n_keys, 0.0f);
      for (int h = 0; h < args.n_kv; ++h)
        for_tiles(task.begin * group, task.end * group, kTile, [&](int64_t begin, int64_t end) {
          const Tile tile{&sequence, h, begin, end, 1, 0};
          const Partials partials = Partials::at(scratch.partials, count, tile.rows(), hd_pad);
          attend(args, tile, 0, count, partials, true, scratch);
          finish(args, tile, partials);
          add_to_mean(args, tile, partials, scratch);
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
