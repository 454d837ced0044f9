// Row statistics: logits in tiles of several widths, aligned and not, against one pass in fp64 over the whole row.
#include "ops/cuda/row_stats.h"

#include <limits>

#include "cuda_emulator/case.h"

namespace dllm {
namespace {

using namespace ops::cuda;
using ops::RowStats;
using ops::RowStatsParams;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

RowStats expected_stats(const std::vector<float>& logits, const RowStatsParams& p, NoiseKey key) {
  RowStats out;
  double sum = 0, weighted = 0, best = 0;
  float max = -kInfinity;
  std::vector<float> x = logits;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = p.temperature == 1.0f ? x[i] : x[i] / p.temperature;
    if (int32_t(i) == p.banned_id) x[i] = -kInfinity;
    if (!(x[i] < kInfinity)) return {.finite = false};
    max = std::max(max, x[i]);
  }
  for (int32_t i = 0; i < int32_t(x.size()); ++i) {
    const float v = x[size_t(i)];
    if (v == -kInfinity) continue;
    const double d = double(v) - max, e = std::exp(d);
    sum += e;
    weighted += e * d;
    if (i == p.mask_id) continue;
    if (out.top1_id < 0 || v > out.top1_logit) {
      out.top2_id = out.top1_id, out.top2_logit = out.top1_logit;
      out.top1_id = i, out.top1_logit = v;
    } else if (out.top2_id < 0 || v > out.top2_logit) {
      out.top2_id = i, out.top2_logit = v;
    }
    const double noise = p.noise_scale > 0 ? gumbel(philox_uniform(key, uint32_t(i), NoiseStream::Token)) : 0;
    const double score = double(v) + p.noise_scale * noise;
    if (out.sampled_id < 0 || score > best) best = score, out.sampled_id = i, out.sampled_logit = v;
  }
  if (out.top1_id < 0) return {.finite = false};
  out.log_sum_exp = max + std::log(sum);
  out.entropy = std::max(0.0, std::log(sum) - weighted / sum);
  return out;
}

// Tiles of `width` ids, each row `ld` apart in scratch memory that every tile overwrites.
void check(emu::Case& c, const std::vector<std::vector<float>>& rows, const RowStatsParams& params, int width, int ld) {
  const int n = int(rows.size()), capacity = n + 1, vocab = n ? int(rows[0].size()) : 3;
  std::vector<NoiseKey> keys;
  for (int r = 0; r < n; ++r) keys.push_back({0x123456789abcdefull, uint32_t(3 + r / 2), uint32_t(100 + r)});
  RowStatsState* state = c.device<RowStatsState>(size_t(capacity));
  const NoiseKey* device_keys = params.noise_scale > 0 ? c.upload(keys) : nullptr;
  const int32_t* count = c.upload<int32_t>({n});
  for (int first = 0; first < vocab; first += width) {
    const int here = std::min(width, vocab - first);
    std::vector<float> tile(size_t(capacity) * size_t(ld), std::numeric_limits<float>::quiet_NaN());  // beyond the tile
    for (int r = 0; r < n; ++r) std::copy_n(rows[size_t(r)].begin() + first, here, tile.begin() + int64_t(r) * ld);
    row_stats_tile(c.stream(), {c.upload(tile), ld, first, here, first == 0, first + here == vocab, count, capacity,
                                params, device_keys, state});
  }
  std::vector<double> bits;  // without the padding, which holds anything
  const std::vector<RowStatsState> found = c.host(state, size_t(capacity));
  for (int r = 0; r < n; ++r) {
    const RowStats& s = found[size_t(r)].stats;
    const RowStats e = expected_stats(rows[size_t(r)], params, keys[size_t(r)]);
    c.expect(s.finite == e.finite, "finite");
    c.expect(s.top1_id == e.top1_id && s.top1_logit == e.top1_logit, "best id");
    c.expect(s.top2_id == e.top2_id && s.top2_logit == e.top2_logit, "second id");
    c.expect(s.sampled_id == e.sampled_id && s.sampled_logit == e.sampled_logit, "sampled id");
    c.expect_close(s.log_sum_exp, e.log_sum_exp, 4e-7 + 1e-9 * std::abs(e.log_sum_exp), "log sum exp");
    c.expect_close(s.entropy, e.entropy, 4e-7 * (1 + e.entropy), "entropy");
    for (double x : {double(s.finite), double(s.top1_id), double(s.top1_logit), double(s.top2_id), double(s.top2_logit),
                     double(s.sampled_id), double(s.sampled_logit), s.log_sum_exp, s.entropy})
      bits.push_back(x);
  }
  c.expect(std::isnan(found[size_t(n)].max), "a row beyond the count is written");
  c.output(c.upload(bits), bits.size());
}

std::vector<std::vector<float>> random_rows(emu::Case& c, int rows, int vocab, double scale) {
  std::vector<std::vector<float>> all;
  for (int r = 0; r < rows; ++r) {
    all.emplace_back();
    for (int i = 0; i < vocab; ++i) all.back().push_back(float(scale * (2 * c.uniform() - 1)));
  }
  return all;
}

void row_stats_tiles(emu::Case& c) {
  auto wide = random_rows(c, 2, 9001, 9);  // two parts
  check(c, wide, {.mask_id = 17}, 9001, 9004);
  wide[0][3] = wide[1][9000] = std::numeric_limits<float>::quiet_NaN();
  check(c, wide, {}, 9001, 9004);
  check(c, random_rows(c, 3, 300, 9), {.mask_id = 299, .banned_id = 4}, 128, 128);
  check(c, random_rows(c, 2, 301, 4), {.temperature = 0.7f}, 100, 131);  // rows not aligned
  check(c, random_rows(c, 1, 5, 1), {}, 1, 4);
  check(c, {}, {}, 3, 4);
}

void row_stats_noise(emu::Case& c) {
  for (double scale : {0.1, 1.0, 30.0, 1e300, 1e-300}) {
    check(c, random_rows(c, 2, 2000, 6), {.mask_id = 3, .noise_scale = scale}, 800, 800);
    check(c, random_rows(c, 1, 900, 0), {.temperature = 1.3f, .noise_scale = scale}, 640, 641);
  }
  check(c, random_rows(c, 2, 9100, 3), {.banned_id = 8500, .noise_scale = 1.0}, 9100, 9100);
  auto low = random_rows(c, 2, 700, 3);
  for (auto& row : low)
    for (float& x : row) x -= 1e5f;
  check(c, low, {.noise_scale = 0.5}, 256, 256);
}

void row_stats_accesses(emu::Case& c) {  // whole quads, nothing but the floor
  check(c, random_rows(c, 6, 2048, 5), {.noise_scale = 1.0}, 1024, 1024);
  c.budget("sectors", 1.2);
  c.budget("banks", 1.01);
}

void row_stats_special(emu::Case& c) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  auto rows = random_rows(c, 13, 400, 5);
  rows[0][399] = nan;
  rows[1][0] = kInfinity;
  rows[2].assign(400, -kInfinity);  // nothing to propose
  rows[3].assign(400, -kInfinity), rows[3][7] = 2;  // nothing but the mask
  rows[4].assign(400, -kInfinity), rows[4][250] = -3;  // one id
  rows[5].assign(400, 1.5f);  // all equal: the lowest ids
  rows[6].assign(400, 0.0f), rows[6][5] = -0.0f, rows[6][0] = -0.0f;
  rows[7][5] = nan;  // banned
  rows[8].assign(400, -200.0f), rows[8][398] = 100;  // exponentials that vanish, the maximum in the last tile
  rows[9].assign(400, -1e30f), rows[9][1] = 1e30f;
  rows[10][7] = 50;  // the mask is the highest
  rows[11][100] = rows[11][300] = rows[11][20] = 9;  // a tie across tiles
  for (int i = 100; i < 200; ++i) rows[12][size_t(i)] = -kInfinity;  // a tile without any
  for (double scale : {0.0, 1.0}) check(c, rows, {.mask_id = 7, .banned_id = 5, .noise_scale = scale}, 100, 100);
}

// 24 warps keep 48 KiB of logits, beside the static arrays: more than a kernel has unless it asks.
void row_stats_shared_memory(emu::Case& c) {
  for (int width : {5888, 6144, 6145}) check(c, random_rows(c, 1, width, 3), {.noise_scale = 1.0}, width, width);
}

void row_stats_many_rows(emu::Case& c) {  // more than blocks
  check(c, random_rows(c, 194, 6, 3), {.noise_scale = 1.0}, 6, 8);
}

const emu::Registered r1("row_stats/tiles", row_stats_tiles);
const emu::Registered r2("row_stats/noise", row_stats_noise);
const emu::Registered r3("row_stats/special", row_stats_special);
const emu::Registered r4("row_stats/many_rows", row_stats_many_rows);
const emu::Registered r5("row_stats/accesses", row_stats_accesses);
const emu::Registered r6("row_stats/shared_memory", row_stats_shared_memory);

}  // namespace
}  // namespace dllm
