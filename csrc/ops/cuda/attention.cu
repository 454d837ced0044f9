// Attention and its head means on the device (attention.h).
//
// bf16 and fp16. A "unit" is a (row, head) pair whose head reads kv head z. Units of a sequence are numbered
// row * group + head in group, so that the heads of a group share what a block loads. A block takes 16, 32 or 64 units of
// one sequence, 16 a warp, and one chunk of 256 keys:
//   q     to shared memory once
//   K, V  tiles of 64 keys by cp.async, two stages of (K, V)
//   softmax in powers of 2 over the tiles of the chunk, sums in fp32; P is rounded to T for P V, as is usual.
// Shared memory at head_dim 128: 68, 72, 80 KiB; at 64 half of it. 16-byte pieces are swizzled, which leaves copies and
// reads without bank conflicts. K and V are read once per tile of units, from L2 but for the first.
// What a chunk gives (max, sum, unscaled output, fp32) goes to scratch, 4 * (head_dim + 2) bytes a unit and chunk, and
// attention_combine merges it in order. Two cases need no scratch and one launch:
//   - max_keys is at most a chunk: the block writes `out`;
//   - units are so many that uncut sequences fill the device: a block goes through all chunks of its units.
// The arithmetic of a unit is the same in all of them, whatever the tile height: the same tiles, the same chunks, merged by
// the same operations (written as fmaf, lest the compiler choose).
//
// fp32. A warp per (row, head), lanes over keys and then over head_dim, the same chunks, all in one launch.
//
// head_mean. A block owns 16 or 32 rows and 64 keys, and goes through the heads: K (once per group) and q by cp.async, two
// stages, 40 or 48 KiB at head_dim 128; the means stay in registers. Reads K once per tile of rows, q once per tile of keys.
#include "ops/cuda/attention.h"

#include <algorithm>

#include "ops/cuda/attention_rows.h"
#include "ops/cuda/kernel.h"

namespace dllm::ops::cuda {
namespace {

using namespace dllm::cu;

constexpr int kTileKeys = 64;
constexpr int kChunkKeys = 256;  // results depend on it
constexpr int kSplitUnits = 8192;  // up to here, (row, head) pairs are too few to fill a device unless keys are cut
constexpr int kFill = 96;  // as many blocks fill a device, more or less
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// --- Tiles in shared memory ------------------------------------------------------------------------------------------
// Where [row][column] of a tile in shared memory lies. Pieces of 8 elements trade places such that the 8 rows of an
// ldmatrix, and 2 neighbouring rows x 4 pieces (scores), fall on different banks.
template <int Dim>
DLLM_DEVICE int swizzle(int row, int column) {
  return row * Dim + (column & ~63) + ((column & 63) ^ ((row & 1) << 5 | (row >> 1 & 3) << 3));
}

// Starts to copy Rows x Dim elements of each of N matrices; rows from `valid` on become zeros and are not read.
template <int Dim, int Rows, int Threads, class T, int N>
DLLM_DEVICE void copy_tiles(T* const (&shared)[N], const T* const (&global)[N], size_t ld, int32_t valid) {
  constexpr int kPieces = Dim / 8, kStep = Threads / kPieces;
  const int first = int(threadIdx.x) / kPieces, column = int(threadIdx.x) % kPieces * 8;
  const size_t offset = first * ld + column;
  const int32_t left = valid - first;
  for (int i = 0; i < Rows; i += kStep) {
    const int to = swizzle<Dim>(first + i % 8, column) + i / 8 * 8 * Dim;  // repeats after 8 rows
    DLLM_UNROLL
    for (int m = 0; m < N; ++m) copy_async16(shared[m] + to, global[m] + offset + i * ld, i < left);
  }
}

// --- Q K^T ------------------------------------------------------------------------------------------------------------
// s[j] = q k^T of 16 rows and keys 8 j, ..., 8 j + 7; both are tiles in shared memory. Which of the Dim products an mma adds
// up does not matter, as long as q and k agree: lane (g, t) reads the 16 bytes [32 i + 8 t, + 8) of its rows, and these are
// its fragments of two mma.
template <class T, int Dim, int N>
DLLM_DEVICE void scores(float (&s)[N][4], const T* q, const T* keys) {
  const int g = (threadIdx.x & 31) / 4, t = threadIdx.x % 4;
  DLLM_UNROLL
  for (int j = 0; j < N; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
  DLLM_UNROLL
  for (int i = 0; i < Dim / 32; ++i) {
    const uint4 low = cu::load128(q + swizzle<Dim>(g, 32 * i + 8 * t));
    const uint4 high = cu::load128(q + swizzle<Dim>(g + 8, 32 * i + 8 * t));
    DLLM_UNROLL
    for (int j = 0; j < N; ++j) {
      const uint4 k = cu::load128(keys + swizzle<Dim>(8 * j + g, 32 * i + 8 * t));
      mma_m16n8k16<T>(s[j], {low.x, high.x, low.y, high.y}, {k.x, k.y});
      mma_m16n8k16<T>(s[j], {low.z, high.z, low.w, high.w}, {k.z, k.w});
    }
  }
}

// --- Softmax in parts -------------------------------------------------------------------------------------------------
// A part: sum = sum_j 2^(x_j - max), output = sum_j 2^(x_j - max) V[j]. Two parts together:
struct Merge {
  float max, total, part;  // the common maximum, the weights
  DLLM_DEVICE Merge(float max_total, float max_part) {
    max = fmaxf(max_total, max_part);
    total = exp2_fast(max_total - max);
    part = exp2_fast(max_part - max);
  }
  DLLM_DEVICE float operator()(float of_total, float of_part) const { return fmaf(of_part, part, of_total * total); }
};
DLLM_DEVICE float log_sum_exp(float max, float sum) { return (max + log2f(sum)) * kLn2; }

// Scratch: outputs [chunk][row][head][head_dim], then {max, sum} [chunk][row][head].
struct Parts {
  float* output;
  float* max_sum;
  size_t units;
  DLLM_DEVICE explicit Parts(const AttentionArgs& a) {
    units = size_t(a.max_rows) * a.n_heads;
    output = static_cast<float*>(a.scratch);
    max_sum = output + units * ceil_div(a.max_keys, kChunkKeys) * a.head_dim;
  }
};

// A warp's 16 units: what a lane holds of rows g and g + 8, as mma lays it out.
template <class T, int Dim>
struct WarpPart {
  float max[2], sum[2], output[Dim / 8][4];  // `sum` is the lane's own until finish()

  DLLM_DEVICE void clear() {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0;
    DLLM_UNROLL
    for (int n = 0; n < Dim / 8; ++n) output[n][0] = output[n][1] = output[n][2] = output[n][3] = 0;
  }

  // A tile of keys, of which the first n_keys (at least one) count. scale includes log2(e).
  DLLM_DEVICE void add(const T* q, const T* keys, const T* values, int32_t n_keys, float scale) {
    const int lane = threadIdx.x & 31;
    float s[kTileKeys / 8][4];
    scores<T, Dim>(s, q, keys);
    if (n_keys < kTileKeys) {
      DLLM_UNROLL
      for (int j = 0; j < kTileKeys / 8; ++j) DLLM_UNROLL
      for (int e = 0; e < 4; ++e)
        if (8 * j + 2 * (lane % 4) + (e & 1) >= n_keys) s[j][e] = -INFINITY;
    }
    float rescale[2];
    DLLM_UNROLL
    for (int r = 0; r < 2; ++r) {
      float m = -INFINITY;
      DLLM_UNROLL
      for (int j = 0; j < kTileKeys / 8; ++j) m = fmaxf(m, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
      m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
      m = fmaxf(max[r], m * scale);
      rescale[r] = exp2_fast(max[r] - m);
      max[r] = m;
      float tile_sum = 0;
      DLLM_UNROLL
      for (int j = 0; j < kTileKeys / 8; ++j) DLLM_UNROLL
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        s[j][e] = exp2_fast(fmaf(s[j][e], scale, -m));
        tile_sum += s[j][e];
      }
      sum[r] = fmaf(sum[r], rescale[r], tile_sum);
    }
    DLLM_UNROLL
    for (int n = 0; n < Dim / 8; ++n) DLLM_UNROLL
    for (int e = 0; e < 4; ++e) output[n][e] *= rescale[e / 2];

    // A lane's address: keys 0..7 and 8..15 of the step, then the same of the next 8 columns.
    const int key = lane & 15, column = lane / 16 * 8;
    DLLM_UNROLL
    for (int i = 0; i < kTileKeys / 16; ++i) {
      const float (&a)[4] = s[2 * i], (&b)[4] = s[2 * i + 1];
      const uint32_t p[4] = {pack<T>(a[0], a[1]), pack<T>(a[2], a[3]), pack<T>(b[0], b[1]), pack<T>(b[2], b[3])};
      DLLM_UNROLL
      for (int n = 0; n < Dim / 8; n += 2) {
        uint32_t v[4];
        load_matrix_x4<true>(v, values + swizzle<Dim>(16 * i + key, 8 * n + column));
        mma_m16n8k16<T>(output[n], p, {v[0], v[1]});
        mma_m16n8k16<T>(output[n + 1], p, {v[2], v[3]});
      }
    }
  }

  // Sums of the four lanes of a row.
  DLLM_DEVICE void finish() {
    DLLM_UNROLL
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
    }
  }

  // Both finished.
  DLLM_DEVICE void merge(const WarpPart& part) {
    const Merge rows[2] = {{max[0], part.max[0]}, {max[1], part.max[1]}};
    DLLM_UNROLL
    for (int r = 0; r < 2; ++r) {
      max[r] = rows[r].max;
      sum[r] = rows[r](sum[r], part.sum[r]);
    }
    DLLM_UNROLL
    for (int n = 0; n < Dim / 8; ++n) DLLM_UNROLL
    for (int e = 0; e < 4; ++e) output[n][e] = rows[e / 2](output[n][e], part.output[n][e]);
  }
};

struct Unit {
  int32_t row, head;
  bool inside;  // of the sequence
};

DLLM_DEVICE void store_pair(float* to, float x, float y) {
  cu::store64(to, make_uint2(__float_as_uint(x), __float_as_uint(y)));
}

// Word i of lane t of four becomes word t of lane i.
DLLM_DEVICE void transpose_quad(uint32_t (&w)[4]) {
  DLLM_UNROLL
  for (int step = 1; step <= 2; step *= 2) {
    const bool high = threadIdx.x & step;
    DLLM_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t got = __shfl_xor_sync(kAllLanes, high ? w[i] : w[i + step], step);
      (high ? w[i] : w[i + step]) = got;
    }
  }
}

// --- bf16, fp16 -------------------------------------------------------------------------------------------------------
// Grid: tiles of units, chunks, kv heads. AllChunks: one block for all chunks.
template <class T, int Dim, int Warps, bool AllChunks>
DLLM_KERNEL_OCCUPANCY(Warps * 32, 8 / Warps)
attention_tile(AttentionArgs a) {
  const int32_t group = a.n_heads / a.n_kv, kv = int(blockIdx.z), chunk = int(blockIdx.y);
  const Tile tile = find_tile(a, group, Warps * 16, int(blockIdx.x));
  const int32_t key_begin = chunk * kChunkKeys;
  if (tile.sequence < 0 || key_begin >= tile.rows.n_keys) return;
  const int32_t n_keys = AllChunks ? tile.rows.n_keys : min(tile.rows.n_keys - key_begin, kChunkKeys);
  const int32_t n_tiles = ceil_div(n_keys, kTileKeys);

  const KvView slab = a.slabs[tile.sequence];
  const size_t offset = (size_t(kv) * slab.capacity + key_begin) * Dim;
  const T* k = static_cast<const T*>(slab.k) + offset;
  const T* v = static_cast<const T*>(slab.v) + offset;
  constexpr int kHeight = Warps * 16, kThreads = Warps * 32, kTile = kTileKeys * Dim;
  DLLM_DYNAMIC_SHARED(T, shared);  // [stage][K, V][kTileKeys][Dim], then q [kHeight][Dim]
  T* const shared_q = shared + 4 * kTile;
  int32_t n_copied = 0;
  const auto copy_next = [&] {  // tile of keys, if there is one
    if (n_copied < n_tiles) {
      T* stage = shared + (n_copied & 1) * 2 * kTile;
      copy_tiles<Dim, kTileKeys, kThreads, T>({stage, stage + kTile}, {k, v}, Dim, n_keys - n_copied * kTileKeys);
      k += kTile, v += kTile, ++n_copied;
    }
    copy_async_commit();
  };
  const int32_t n_units = (tile.rows.end - tile.rows.begin) * group;
  const auto unit = [&](int i) {  // i-th of the tile
    const int32_t u = tile.first + i;
    return Unit{tile.rows.begin + u / group, kv * group + u % group, u < n_units};
  };
  const T* const global_q = static_cast<const T*>(a.q);
  for (int i = threadIdx.x; i < kHeight * (Dim / 8); i += kThreads) {
    const int m = i / (Dim / 8), column = i % (Dim / 8) * 8;
    const Unit u = unit(m);
    copy_async16(shared_q + swizzle<Dim>(m, column),
                 u.inside ? global_q + size_t(u.row) * a.ldq + u.head * Dim + column : global_q, u.inside);
  }
  copy_next();
  copy_next();

  const int warp = threadIdx.x / 32, g = (threadIdx.x & 31) / 4, t = threadIdx.x % 4;
  const bool idle = tile.first + warp * 16 >= n_units;
  WarpPart<T, Dim> part, total;
  part.clear();
  total.clear();
  for (int32_t i = 0; i < n_tiles; ++i) {
    copy_async_wait<1>();
    __syncthreads();
    if (!idle) {
      const T* stage = shared + (i & 1) * 2 * kTile;
      part.add(shared_q + warp * 16 * Dim, stage, stage + kTile, n_keys - i * kTileKeys, a.scale * kLog2e);
      constexpr int kTiles = kChunkKeys / kTileKeys;
      if (AllChunks && (i % kTiles == kTiles - 1 || i + 1 == n_tiles)) {
        part.finish();
        total.merge(part);
        part.clear();
      }
    }
    __syncthreads();  // the stage is free
    copy_next();
  }
  if (idle) return;

  if (!AllChunks) {
    part.finish();
    if (gridDim.y > 1) {  // attention_combine goes on
      const Parts parts(a);
      DLLM_UNROLL
      for (int r = 0; r < 2; ++r) {
        const Unit u = unit(warp * 16 + g + 8 * r);
        if (!u.inside) continue;
        const size_t index = chunk * parts.units + size_t(u.row) * a.n_heads + u.head;
        float* to = parts.output + index * Dim + 2 * t;
        DLLM_UNROLL
        for (int n = 0; n < Dim / 8; ++n) store_pair(to + 8 * n, part.output[n][2 * r], part.output[n][2 * r + 1]);
        if (t == 0) store_pair(parts.max_sum + 2 * index, part.max[r], part.sum[r]);
      }
      return;
    }
    total.merge(part);
  }
  DLLM_UNROLL
  for (int r = 0; r < 2; ++r) {
    const Unit u = unit(warp * 16 + g + 8 * r);
    const float inverse = 1.0f / total.sum[r];
    T* to = static_cast<T*>(a.out) + size_t(u.row) * a.ldo + u.head * Dim + 8 * t;
    DLLM_UNROLL
    for (int n = 0; n < Dim / 8; n += 4) {
      uint32_t words[4];
      DLLM_UNROLL
      for (int i = 0; i < 4; ++i)
        words[i] = pack<T>(total.output[n + i][2 * r] * inverse, total.output[n + i][2 * r + 1] * inverse);
      transpose_quad(words);  // 16 bytes of consecutive columns a lane
      if (u.inside) cu::store128(to + 8 * n, make_uint4(words[0], words[1], words[2], words[3]));
    }
    if (a.lse && u.inside && t == 0)
      a.lse[size_t(u.row) * a.n_heads + u.head] = log_sum_exp(total.max[r], total.sum[r]);
  }
}

// Merges the parts of the chunks, in order. A thread per (row, head, 4 columns).
template <class T>
DLLM_KERNEL(128)
attention_combine(AttentionArgs a) {
  const int32_t pieces = a.head_dim / 4, thread = int(blockIdx.x * 128 + threadIdx.x);
  const int32_t unit = thread / pieces, column = thread % pieces * 4, row = unit / a.n_heads;
  const int32_t sequence = row < a.max_rows ? find_sequence(a, row) : -1;
  if (sequence < 0) return;
  const int32_t n_chunks = ceil_div(a.sequences[sequence].n_keys, kChunkKeys);
  if (n_chunks == 0) return;
  const Parts parts(a);
  float max = -INFINITY, sum = 0, output[4] = {};
  for (int32_t c = 0; c < n_chunks; ++c) {
    const size_t index = c * parts.units + unit;
    const uint2 bits = cu::load64(parts.max_sum + 2 * index);
    const Merge merge(max, __uint_as_float(bits.x));
    max = merge.max, sum = merge(sum, __uint_as_float(bits.y));
    float part[4];
    load_elements<4>(parts.output + index * a.head_dim + column, part);
    DLLM_UNROLL
    for (int i = 0; i < 4; ++i) output[i] = merge(output[i], part[i]);
  }
  const float inverse = 1.0f / sum;
  DLLM_UNROLL
  for (int i = 0; i < 4; ++i) output[i] *= inverse;
  store_elements<4>(static_cast<T*>(a.out) + size_t(row) * a.ldo + unit % a.n_heads * a.head_dim + column, output);
  if (a.lse && column == 0) a.lse[unit] = log_sum_exp(max, sum);
}

// A block's rows x 64 keys, heads one after the other. Grid: tiles of rows, tiles of keys.
template <class T, int Dim, int Height>
DLLM_KERNEL(128)
head_mean_tile(HeadMeanArgs args) {
  const AttentionArgs& a = args.attention;
  const int32_t group = a.n_heads / a.n_kv, key_begin = int(blockIdx.y) * kTileKeys;
  const Tile tile = find_tile(a, 1, Height, int(blockIdx.x));
  if (tile.sequence < 0 || key_begin >= tile.rows.n_keys) return;
  const int32_t n_keys = tile.rows.n_keys - key_begin, first_row = tile.rows.begin + tile.first;

  const KvView slab = a.slabs[tile.sequence];
  const T* k = static_cast<const T*>(slab.k) + size_t(key_begin) * Dim;
  const T* q = static_cast<const T*>(a.q) + size_t(first_row) * a.ldq;
  DLLM_DYNAMIC_SHARED(T, shared);  // K [stage][kTileKeys][Dim], q [stage][Height][Dim]
  T* const shared_q = shared + 2 * kTileKeys * Dim;
  const auto copy = [&](int32_t head) {
    const int32_t kv = head / group;
    if (head % group == 0)
      copy_tiles<Dim, kTileKeys, 128, T>({shared + (kv & 1) * kTileKeys * Dim}, {k + size_t(kv) * slab.capacity * Dim},
                                         Dim, n_keys);
    copy_tiles<Dim, Height, 128, T>({shared_q + (head & 1) * Height * Dim}, {q + head * Dim}, a.ldq,
                                    tile.rows.end - first_row);
  };
  copy(0);
  copy_async_commit();
  if (a.n_heads > 1) copy(1);
  copy_async_commit();

  // Warps side by side cover the rows first, then the keys.
  constexpr int kKeyWarps = 4 / (Height / 16), kKeys = kTileKeys / kKeyWarps;
  const int warp = threadIdx.x / 32, g = (threadIdx.x & 31) / 4, t = threadIdx.x % 4;
  const int warp_row = warp / kKeyWarps * 16, warp_key = warp % kKeyWarps * kKeys;
  const bool idle = first_row + warp_row >= tile.rows.end || warp_key >= n_keys;
  float mean[kKeys / 8][4] = {};
  for (int32_t head = 0; head < a.n_heads; ++head) {
    float minus_lse[2];
    DLLM_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int32_t row = first_row + warp_row + g + 8 * r;
      minus_lse[r] = row < tile.rows.end ? a.lse[size_t(row) * a.n_heads + head] * -kLog2e : 0;
    }
    copy_async_wait<1>();
    __syncthreads();
    if (!idle) {
      float s[kKeys / 8][4];
      scores<T, Dim>(s, shared_q + ((head & 1) * Height + warp_row) * Dim,
                     shared + ((head / group & 1) * kTileKeys + warp_key) * Dim);
      DLLM_UNROLL
      for (int j = 0; j < kKeys / 8; ++j) DLLM_UNROLL
      for (int e = 0; e < 4; ++e) mean[j][e] += exp2_fast(fmaf(s[j][e], a.scale * kLog2e, minus_lse[e / 2]));
    }
    __syncthreads();  // the head's stage is free
    if (head + 2 < a.n_heads) copy(head + 2);
    copy_async_commit();
  }
  const float inverse = 1.0f / float(a.n_heads);
  DLLM_UNROLL
  for (int j = 0; j < kKeys / 8; ++j) DLLM_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int32_t row = first_row + warp_row + g + e / 2 * 8, key = warp_key + 8 * j + 2 * t + (e & 1);
    if (row < tile.rows.end && key < n_keys) args.mean[row * args.ld + key_begin + key] = mean[j][e] * inverse;
  }
}

// --- fp32 -------------------------------------------------------------------------------------------------------------
DLLM_DEVICE float dot(const float* x, const float* y, int32_t n) {
  float sum = 0;
  for (int32_t i = 0; i < n; i += 4) {
    float a[4], b[4];
    load_elements<4>(x + i, a);
    load_elements<4>(y + i, b);
    DLLM_UNROLL
    for (int e = 0; e < 4; ++e) sum = fmaf(a[e], b[e], sum);
  }
  return sum;
}

DLLM_KERNEL_OCCUPANCY(128, 2) attention_f32(AttentionArgs a) {
  DLLM_SHARED(float, all_weights, [4][kChunkKeys]);
  const int32_t lane = threadIdx.x & 31, unit = int(blockIdx.x * 4 + threadIdx.x / 32), row = unit / a.n_heads;
  const int32_t sequence = row < a.max_rows ? find_sequence(a, row) : -1;
  if (sequence < 0) return;
  const int32_t head = unit % a.n_heads, kv = head / (a.n_heads / a.n_kv), n_keys = a.sequences[sequence].n_keys;
  const KvView slab = a.slabs[sequence];
  const float* q = static_cast<const float*>(a.q) + size_t(row) * a.ldq + head * a.head_dim;
  float* weights = all_weights[threadIdx.x / 32];
  constexpr int kColumns = 256 / 32;  // a lane's, at most: lane, lane + 32, ...
  float max = -INFINITY, sum = 0, output[kColumns] = {};
  for (int32_t begin = 0; begin < n_keys; begin += kChunkKeys) {
    const int32_t n = min(n_keys - begin, kChunkKeys);
    const size_t offset = (size_t(kv) * slab.capacity + begin) * a.head_dim;
    const float* k = static_cast<const float*>(slab.k) + offset;
    const float* v = static_cast<const float*>(slab.v) + offset;
    float part_max = -INFINITY, part_sum = 0;
    for (int32_t j = lane; j < n; j += 32) {
      weights[j] = dot(q, k + size_t(j) * a.head_dim, a.head_dim) * (a.scale * kLog2e);
      part_max = fmaxf(part_max, weights[j]);
    }
    part_max = max_warp(part_max);
    for (int32_t j = lane; j < n; j += 32) {
      weights[j] = exp2_fast(weights[j] - part_max);
      part_sum += weights[j];
    }
    part_sum = sum_warp(part_sum);
    __syncwarp();
    const Merge merge(max, part_max);
    max = merge.max, sum = merge(sum, part_sum);
    float part[kColumns] = {};
    for (int32_t j = 0; j < n; ++j) {
      const float* v_row = v + size_t(j) * a.head_dim + lane;
      DLLM_UNROLL
      for (int i = 0; i < kColumns; ++i)
        if (lane + 32 * i < a.head_dim) part[i] = fmaf(weights[j], v_row[32 * i], part[i]);
    }
    DLLM_UNROLL
    for (int i = 0; i < kColumns; ++i) output[i] = merge(output[i], part[i]);
    __syncwarp();  // before the next chunk's weights
  }
  if (n_keys == 0) return;
  const float inverse = 1.0f / sum;
  float* out = static_cast<float*>(a.out) + size_t(row) * a.ldo + head * a.head_dim;
  DLLM_UNROLL
  for (int i = 0; i < kColumns; ++i)
    if (lane + 32 * i < a.head_dim) out[lane + 32 * i] = output[i] * inverse;
  if (a.lse && lane == 0) a.lse[unit] = log_sum_exp(max, sum);
}

// A thread per (row, key).
DLLM_KERNEL(128) head_mean_f32(HeadMeanArgs args) {
  const AttentionArgs& a = args.attention;
  const int32_t row = int(blockIdx.x), key = int(blockIdx.y * 128 + threadIdx.x), group = a.n_heads / a.n_kv;
  const int32_t sequence = find_sequence(a, row);
  if (sequence < 0 || key >= a.sequences[sequence].n_keys) return;
  const KvView slab = a.slabs[sequence];
  float mean = 0;
  for (int32_t head = 0; head < a.n_heads; ++head) {
    const float* q = static_cast<const float*>(a.q) + size_t(row) * a.ldq + head * a.head_dim;
    const float* k = static_cast<const float*>(slab.k) + (size_t(head / group) * slab.capacity + key) * a.head_dim;
    const float lse = a.lse[size_t(row) * a.n_heads + head];
    mean += exp2_fast(fmaf(dot(q, k, a.head_dim), a.scale * kLog2e, lse * -kLog2e));
  }
  args.mean[row * args.ld + key] = mean * (1.0f / float(a.n_heads));
}

// --- Launches ---------------------------------------------------------------------------------------------------------
enum class Chunks { One, Split, All };  // a block's: the only one; one of several; all of several
Chunks chunks_per_block(DType type, int32_t n_heads, int32_t max_rows, int32_t max_keys) {
  if (type == DType::F32) return Chunks::All;
  if (max_keys <= kChunkKeys) return Chunks::One;
  return int64_t(max_rows) * n_heads <= kSplitUnits ? Chunks::Split : Chunks::All;
}

template <class T, int Dim>
void launch_attention(Stream stream, Chunks chunks, const AttentionArgs& a) {
  const int32_t group = a.n_heads / a.n_kv, n_chunks = chunks == Chunks::Split ? ceil_div(a.max_keys, kChunkKeys) : 1;
  const auto start = [&](auto* kernel, int warps) {
    launch(stream, "attention", kernel, dim3(max_tiles(a, group, warps * 16), n_chunks, a.n_kv), warps * 32,
           (4 * kTileKeys + warps * 16) * Dim * sizeof(T), a);
  };
  if (chunks == Chunks::All) return start(attention_tile<T, Dim, 4, true>, 4);
  // The tallest tile that an average sequence fills by more than half, unless blocks are few then.
  const int32_t units = ceil_div(a.max_rows, a.n_sequences) * group;
  const auto fits = [&](int32_t height) {
    return units > height / 2 && ceil_div(units, height) * a.n_sequences * a.n_kv * n_chunks >= kFill;
  };
  if (fits(64)) return start(attention_tile<T, Dim, 4, false>, 4);
  if (fits(32)) return start(attention_tile<T, Dim, 2, false>, 2);
  start(attention_tile<T, Dim, 1, false>, 1);
}

template <class T>
void attention_16bit(Stream stream, Chunks chunks, const AttentionArgs& a) {
  a.head_dim == 64 ? launch_attention<T, 64>(stream, chunks, a) : launch_attention<T, 128>(stream, chunks, a);
  if (chunks == Chunks::Split)
    launch(stream, "attention_combine", attention_combine<T>, ceil_div(a.max_rows * a.n_heads * (a.head_dim / 4), 128),
           128, 0, a);
}

template <class T, int Dim>
void launch_head_mean(Stream stream, const HeadMeanArgs& args) {
  const AttentionArgs& a = args.attention;
  const int32_t key_tiles = ceil_div(a.max_keys, kTileKeys);
  const auto start = [&](auto* kernel, int height) {
    launch(stream, "head_mean", kernel, dim3(max_tiles(a, 1, height), key_tiles), 128,
           2 * (kTileKeys + height) * Dim * sizeof(T), args);
  };
  const int32_t rows = ceil_div(a.max_rows, a.n_sequences);
  if (rows > 16 && ceil_div(rows, 32) * a.n_sequences * key_tiles >= kFill)
    return start(head_mean_tile<T, Dim, 32>, 32);
  start(head_mean_tile<T, Dim, 16>, 16);
}

template <class T>
void head_mean_16bit(Stream stream, const HeadMeanArgs& args) {
  args.attention.head_dim == 64 ? launch_head_mean<T, 64>(stream, args) : launch_head_mean<T, 128>(stream, args);
}

// Whether there is anything to do.
bool check(DType type, const AttentionArgs& a) {
  const bool known =
      type == DType::F32 ? a.head_dim % 8 == 0 && a.head_dim <= 256 : a.head_dim == 64 || a.head_dim == 128;
  if (!known) fail<ConfigError>("CUDA attention has no kernel for head_dim ", a.head_dim, " in ", name_of(type));
  return a.max_rows > 0 && a.max_keys > 0 && a.n_sequences > 0;
}

}  // namespace

// Where that many rows leave the keys uncut, fewer of them may not: the most that are cut need most.
size_t attention_scratch_bytes(DType type, int32_t n_heads, int32_t head_dim, int32_t max_rows, int32_t max_keys) {
  const int32_t rows = std::min(max_rows, kSplitUnits / n_heads);
  if (chunks_per_block(type, n_heads, rows, max_keys) != Chunks::Split) return 0;
  return size_t(rows) * n_heads * ceil_div(max_keys, kChunkKeys) * (head_dim + 2) * sizeof(float);
}

void attention(Stream stream, DType type, const AttentionArgs& args) {
  if (!check(type, args)) return;
  const Chunks chunks = chunks_per_block(type, args.n_heads, args.max_rows, args.max_keys);
  switch (type) {
    case DType::F32:
      return launch(stream, "attention", attention_f32, ceil_div(args.max_rows * args.n_heads, 4), 128, 0, args);
    case DType::BF16:
      return attention_16bit<bf16>(stream, chunks, args);
    case DType::F16:
      return attention_16bit<half>(stream, chunks, args);
  }
}

void head_mean(Stream stream, DType type, const HeadMeanArgs& args) {
  const AttentionArgs& a = args.attention;
  if (!check(type, a)) return;
  switch (type) {
    case DType::F32:
      return launch(stream, "head_mean", head_mean_f32, dim3(a.max_rows, ceil_div(a.max_keys, 128)), 128, 0, args);
    case DType::BF16:
      return head_mean_16bit<bf16>(stream, args);
    case DType::F16:
      return head_mean_16bit<half>(stream, args);
  }
}

}  // namespace dllm::ops::cuda
