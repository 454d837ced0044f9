#include "ops/row_stats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "ops/cpu/activations.h"
#include "ops/cpu/kernels.h"
#include "runtime/parallel.h"

namespace dllm::ops {
namespace {

constexpr int64_t kTile = 512;          // ids per tile: fixed, so that sums do not depend on threads or rows
constexpr int64_t kTileLd = kTile + 16; // an odd number of cache lines
constexpr int64_t kRowChunk = 128;      // rows whose tile is computed at once

struct Sample {
  double score;
  int32_t id;  // -1: none
  float logit;

  // Ties go to the lowest id, whatever the order of the candidates.
  void offer(double other, int32_t other_id, float other_logit) {
    if (id < 0 || other > score || (other == score && other_id < id)) *this = {other, other_id, other_logit};
  }
};

struct Partial {
  cpu::TileStats stats;
  Sample sample;
};

// The best of logit + noise_scale * gumbel in a tile. `floor` is a score reached elsewhere in the row (-inf: none): ids
// that cannot reach it need no draw, and no id at all is offered when none can.
//
// With M the highest logit of the tile, an id can win only if gumbel(u) >= (floor - M) / noise_scale =: g, that is, if
// u >= exp(-exp(-g)). The threshold is lowered by far more than the rounding errors of all terms, so pruning never
// changes the result; it saves the two logarithms of nearly every id.
Sample sample_tile(const float* x, int64_t n, int32_t first_id, const cpu::TileStats& stats, double noise_scale,
                   NoiseKey key, double floor) {
  Sample best{-std::numeric_limits<double>::infinity(), -1, 0.0f};
  if (stats.top1_id < 0) return best;
  double threshold = -1.0;
  const auto raise = [&](double reached) {
    floor = reached;
    const double slack = 1e-6 + 1e-14 * (std::fabs(floor) + std::fabs(double(stats.top1))) / noise_scale;
    threshold = std::exp(-std::exp(slack - (floor - double(stats.top1)) / noise_scale)) - 1e-15;
  };
  if (floor > -std::numeric_limits<double>::infinity()) raise(floor);
  const auto draw = [&](int32_t column) {
    const double u = philox_uniform(key, uint32_t(first_id + column), NoiseStream::Token);
    if (u < threshold) return;
    const double score = double(x[column]) + noise_scale * gumbel(u);
    if (score < floor) return;
    best.offer(score, first_id + column, x[column]);
    raise(score);
  };
  draw(stats.top1_id - first_id);  // most likely the best: the others then rarely need their logarithms
  // u = (bits + 1/2) 2^-52 >= threshold if bits >= threshold 2^52 - 1/2, rounded down.
  const auto least = uint64_t(std::max(0.0, std::floor(threshold * 0x1p52 - 0.5)));
  int32_t columns[kTile];
  const int64_t count =
      cpu::kernels().draws_from({key.seed, key.step, key.position, uint32_t(first_id), n, least}, columns);
  for (int64_t i = 0; i < count; ++i)
    if (x[columns[i]] > -std::numeric_limits<float>::infinity()) draw(columns[i]);
  return best;
}

// Column of `id` in a tile, or -1.
int64_t column_of(int32_t id, int64_t first, int64_t n) { return id >= first && id < first + n ? id - first : -1; }

// Statistics of one row's tile x[0, n), which is overwritten. `reached`: the best noisy score this thread has seen in
// the row.
void tile_partial(float* x, int64_t first, int64_t n, const float* bias, const RowStatsParams& params,
                  const NoiseKey* key, double& reached, Partial& out) {
  cpu::kernels().tile_stats(x, n, bias, params.temperature, column_of(params.banned_id, first, n),
                            column_of(params.mask_id, first, n), int32_t(first), &out.stats);
  out.sample.id = -1;
  if (params.noise_scale > 0 && out.stats.finite) {
    out.sample = sample_tile(x, n, int32_t(first), out.stats, params.noise_scale, *key, reached);
    if (out.sample.id >= 0) reached = std::max(reached, out.sample.score);
  }
}

// Partials of a row, in tile order. With M the maximum of all tiles, s = sum_t s_t exp(m_t - M) and
// w = sum_t (w_t + (m_t - M) s_t) exp(m_t - M):  log sum exp = M + ln s,  entropy = ln s - w / s.
RowStats merge(const Partial* tiles, int64_t count, const RowStatsParams& params) {
  RowStats out;
  float top1 = -std::numeric_limits<float>::infinity(), top2 = top1, highest = top1;
  Sample sample{0.0, -1, 0.0f};
  for (int64_t t = 0; t < count; ++t) {
    const cpu::TileStats& s = tiles[t].stats;
    out.finite = out.finite && s.finite;
    highest = std::max(highest, s.max);
    // Later tiles hold higher ids: only a strictly better logit displaces one.
    const auto offer = [&](int32_t id, float logit) {
      if (id < 0) return;
      if (out.top1_id < 0 || logit > top1) {
        out.top2_id = out.top1_id;
        top2 = top1;
        out.top1_id = id;
        top1 = logit;
      } else if (out.top2_id < 0 || logit > top2) {
        out.top2_id = id;
        top2 = logit;
      }
    };
    offer(s.top1_id, s.top1);
    offer(s.top2_id, s.top2);
    if (tiles[t].sample.id >= 0) sample.offer(tiles[t].sample.score, tiles[t].sample.id, tiles[t].sample.logit);
  }
  if (out.top1_id < 0) out.finite = false;
  if (!out.finite) return RowStats{.finite = false};

  double sum = 0, weighted = 0;
  for (int64_t t = 0; t < count; ++t) {
    const cpu::TileStats& s = tiles[t].stats;
    if (s.sum == 0) continue;
    const double difference = double(s.max) - double(highest), scale = std::exp(difference);
    sum += s.sum * scale;
    weighted += (s.weighted_sum + difference * s.sum) * scale;
  }
  out.log_sum_exp = double(highest) + std::log(sum);
  out.entropy = std::max(0.0, std::log(sum) - weighted / sum);
  out.top1_logit = top1;
  if (out.top2_id >= 0) out.top2_logit = top2;
  out.sampled_id = params.noise_scale > 0 ? sample.id : out.top1_id;
  out.sampled_logit = params.noise_scale > 0 ? sample.logit : top1;
  return out;
}

// Runs tile(thread's buffer [kRowChunk, kTileLd], first row, rows, tile index) over all tiles and merges. `partials` of
// a row lie together, in tile order.
template <class FillTile>
void statistics(int64_t rows, int64_t vocab, const float* bias, const RowStatsParams& params, const NoiseKey* keys,
                RowStats* out, Buffer& scratch, int64_t tile_grain, const FillTile& fill) {
  const int64_t tiles = (vocab + kTile - 1) / kTile;
  const size_t buffer_floats = size_t(std::min(rows, kRowChunk)) * kTileLd;
  const size_t partial_bytes = checked_bytes("row statistics", size_t(rows), size_t(tiles), sizeof(Partial));
  const size_t best_bytes = checked_bytes("row statistics", size_t(rows), sizeof(double));
  const size_t thread_bytes = (buffer_floats * 4 + best_bytes + 63) / 64 * 64;
  scratch.reserve(partial_bytes + 64 + size_t(num_threads()) * thread_bytes, "row statistics");
  Partial* partials = scratch.as<Partial>();
  char* thread_memory = scratch.as<char>() + (partial_bytes + 63) / 64 * 64;
  const auto reached_of = [&](int thread) {
    return reinterpret_cast<double*>(thread_memory + size_t(thread) * thread_bytes + buffer_floats * 4);
  };
  for (int t = 0; t < num_threads(); ++t) std::fill_n(reached_of(t), rows, -std::numeric_limits<double>::infinity());

  parallel_for(tiles, tile_grain, [&](int64_t begin, int64_t end) {
    float* x = reinterpret_cast<float*>(thread_memory + size_t(thread_index()) * thread_bytes);
    double* reached = reached_of(thread_index());
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * kTile, n = std::min(kTile, vocab - first);
      for (int64_t row = 0; row < rows; row += kRowChunk) {
        const int64_t here = std::min(kRowChunk, rows - row);
        fill(x, row, here, t);
        for (int64_t r = 0; r < here; ++r)
          tile_partial(x + r * kTileLd, first, n, bias ? bias + first : nullptr, params,
                       keys ? keys + row + r : nullptr, reached[row + r], partials[(row + r) * tiles + t]);
      }
    }
  });
  parallel_for(rows, std::max<int64_t>(1, 512 / tiles), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) out[r] = merge(partials + r * tiles, tiles, params);
  });
}

}  // namespace

void row_stats(const float* logits, int64_t rows, int64_t vocab, int64_t ld, const RowStatsParams& params,
               const NoiseKey* keys, RowStats* out) {
  if (rows == 0) return;
  thread_local Buffer scratch;
  const int64_t grain = std::max<int64_t>(1, 32 / rows);
  statistics(rows, vocab, nullptr, params, keys, out, scratch, grain,
             [&](float* x, int64_t row, int64_t count, int64_t tile) {
               const int64_t first = tile * kTile, n = std::min(kTile, vocab - first);
               for (int64_t r = 0; r < count; ++r)
                 std::memcpy(x + r * kTileLd, logits + (row + r) * ld + first, size_t(n) * 4);
             });
}

void lm_head_stats(const PackedLinear& head, const void* x, DType x_dtype, int64_t rows, int64_t ldx,
                   const RowStatsParams& params, const NoiseKey* keys, RowStats* out, Buffer& scratch) {
  if (rows == 0) return;
  thread_local Buffer prepared;
  const cpu::Activations a = cpu::prepare_activations(head, x, x_dtype, rows, ldx, prepared);
  constexpr int64_t kTilePanels = kTile / kPanel;
  const int64_t grain = (cpu::panel_grain(rows, head) + kTilePanels - 1) / kTilePanels;
  statistics(rows, head.n, head.bias.bytes() ? head.bias.as<float>() : nullptr, params, keys, out, scratch, grain,
             [&](float* tile_x, int64_t row, int64_t count, int64_t tile) {
               const int64_t first = tile * kTilePanels, panels = std::min(kTilePanels, head.panels() - first);
               for (int64_t p = 0; p < panels; ++p)
                 cpu::gemm_panel(a, head, first + p, row, count, tile_x + p * kPanel, kTileLd);
             });
}

}  // namespace dllm::ops
