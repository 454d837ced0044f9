#include <numeric>

#include "cache/policy.h"
#include "decode/config.h"
#include "decode/filters.h"
#include "decode/schedule.h"
#include "decode/transfer.h"
#include "runtime/bitmap.h"
#include "runtime/error.h"
#include "tests/check.h"

using namespace dllm;

namespace {

std::vector<Proposal> proposals_of(const std::vector<double>& confidence) {
  std::vector<Proposal> p;
  for (size_t i = 0; i < confidence.size(); ++i)
    p.push_back({int32_t(10 + i), int32_t(i), confidence[i], confidence[i]});
  return p;
}

std::string join(const std::vector<int32_t>& v) {
  std::string s;
  for (int32_t i : v) s += (s.empty() ? "" : " ") + std::to_string(i);
  return s;
}

// What is committed, as text.
std::string chosen(const GenerationConfig& config, const StepPosition& at, const std::vector<double>& confidence) {
  TransferSelector selector;
  const std::span<const int32_t> indices = selector.select(rules_of(config, {}), at, proposals_of(confidence));
  return join({indices.begin(), indices.end()});
}

std::string rows_of(CacheKind kind, int step, int shift, std::vector<int32_t> block, int32_t suffix) {
  GenerationConfig config;
  config.cache = kind;
  ModelSpec spec;
  spec.logit_shift = shift;
  const Bitmap positions(12);
  StepPlan plan;
  make_cache_policy(config, spec)->plan({suffix, 4, positions, positions, 12, {block, suffix, step}, step}, 0, plan);
  return join(plan.rows);
}

}  // namespace

TEST(llada_schedule_spreads_the_remainder_first) {
  std::vector<int32_t> counts;
  for (int t = 0; t < 4; ++t) counts.push_back(int32_t(llada_transfer_count(10, 4, t)));
  CHECK_EQ(join(counts), "3 3 2 2");
  for (int masked = 0; masked < 40; ++masked)
    for (int steps = 1; steps < 40; ++steps) {
      int64_t sum = 0;
      for (int t = 0; t < steps; ++t) sum += llada_transfer_count(masked, steps, t);
      CHECK_EQ(sum, masked);
    }
}

TEST(dream_schedule_commits_everything_by_its_last_step) {
  for (int masked : {1, 7, 64})
    for (int steps : {1, 3, 16, 64}) {
      int64_t left = masked;
      for (int t = 0; t < steps; ++t) left -= dream_transfer_count(left, 1e-3, steps, t);
      CHECK_EQ(left, 0);
    }
  CHECK_EQ(dream_transfer_count(64, 1e-3, 64, 0), 0);  // 64 (1 - eps) / 64 truncates: the published schedule waits
}

TEST(bitmap_counts_and_visits_members) {
  Bitmap b(130);
  CHECK(!b.any());
  for (int i : {0, 63, 64, 129}) b.set(i);
  b.reset(63);
  std::vector<int32_t> seen;
  b.for_each([&](int64_t i) { seen.push_back(int32_t(i)); });
  CHECK_EQ(join(seen), "0 64 129");
  CHECK_EQ(b.count(), 3);
}

TEST(threshold_commits_all_above_and_always_one) {
  GenerationConfig c;
  CHECK_EQ(chosen(c, {}, {0.95, 0.2, 0.9, 0.89}), "0 2");
  CHECK_EQ(chosen(c, {}, {0.1, 0.3, 0.3}), "1");  // a tie goes to the lowest position
  c.num_transfer_tokens = 3;
  c.threshold = 0.9;
  CHECK_EQ(chosen(c, {}, {0.1, 0.95, 0.3, 0.2}), "1 2 3");
}

TEST(factor_is_the_largest_prefix_within_the_bound) {
  GenerationConfig c;
  c.factor = 1.0;
  // k = 2: 3 (1 - .9) = .3 < 1; k = 3: 4 (1 - .8) = .8 < 1; k = 4: 5 (1 - .79) = 1.05: stop.
  CHECK_EQ(chosen(c, {}, {0.1, 0.9, 0.8, 0.79, 0.99}), "1 2 4");
  CHECK_EQ(chosen(c, {}, {0.1, 0.2}), "1");
}

TEST(steps_commit_by_their_schedule_and_then_the_rest) {
  GenerationConfig c;
  c.gen_length = c.block_length = 10;
  c.steps = 4;
  StepPosition at;
  at.masked_at_start = at.eligible = 10;
  CHECK_EQ(chosen(c, at, std::vector<double>(10, 0.5)), "0 1 2");
  at.step_in_block = 4;
  at.eligible = 5;
  CHECK_EQ(chosen(c, at, std::vector<double>(5, 0.5)), "0 1 2 3 4");
}

TEST(cache_policies_compute_the_documented_rows) {
  const std::vector<int32_t> block = {6, 7, 8};
  for (CacheKind k : {CacheKind::None, CacheKind::Prefix, CacheKind::Dual})
    CHECK_EQ(rows_of(k, 0, 0, block, 6), "0 1 2 3 4 5 6 7 8 9 10 11");
  CHECK_EQ(rows_of(CacheKind::None, 1, 0, block, 6), "0 1 2 3 4 5 6 7 8 9 10 11");
  CHECK_EQ(rows_of(CacheKind::Prefix, 1, 0, block, 6), "6 7 8 9 10 11");
  CHECK_EQ(rows_of(CacheKind::Prefix, 1, 1, block, 6), "5 6 7 8 9 10 11");
  CHECK_EQ(rows_of(CacheKind::Dual, 1, 0, block, 6), "6 7 8");
  CHECK_EQ(rows_of(CacheKind::Dual, 1, 1, block, 6), "5 6 7");
  // The first block owns masked prompt positions too.
  const std::vector<int32_t> infill = {2, 3, 6, 7, 8};
  CHECK_EQ(rows_of(CacheKind::Prefix, 1, 0, infill, 6), "2 3 6 7 8 9 10 11");
  CHECK_EQ(rows_of(CacheKind::Prefix, 1, 1, infill, 6), "1 2 3 5 6 7 8 9 10 11");
  CHECK_EQ(rows_of(CacheKind::Dual, 1, 1, infill, 6), "1 2 5 6 7");
}

TEST(filters_keep_the_crossing_token_and_the_best) {
  GenerationConfig c;
  ops::RowStatsParams p;
  p.mask_id = 0;
  auto kept = [&](std::vector<float> logits) {
    filter_row(logits.data(), int64_t(logits.size()), c, p);
    std::vector<int32_t> ids;
    for (size_t i = 0; i < logits.size(); ++i)
      if (std::isfinite(logits[i])) ids.push_back(int32_t(i));
    return join(ids);
  };
  const std::vector<float> logits = {std::log(0.1f), std::log(0.4f), std::log(0.3f), std::log(0.2f)};
  c.top_p = 0.5;
  CHECK_EQ(kept(logits), "1 2");
  c.top_p = 0.05;
  CHECK_EQ(kept(logits), "1");
  c.top_p.reset();
  c.top_k = 3;
  CHECK_EQ(kept(logits), "1 2 3");
  c.top_k = 1;
  CHECK_EQ(kept({5.0f, 1.0f, 2.0f}), "0 2");  // the mask id is best, the best id that may be proposed stays beside it
}

TEST(config_names_the_field_and_what_is_allowed) {
  auto invalid = [](auto change) {
    GenerationConfig c;
    change(c);
    c.validate();
  };
  GenerationConfig().validate();
  CHECK_THROWS(ConfigError, "threshold = 1.5", invalid([](auto& c) { c.threshold = 1.5; }));
  CHECK_THROWS(ConfigError, "block_length = 0", invalid([](auto& c) { c.block_length = 0; }));
  CHECK_THROWS(ConfigError, "multiple of the number of blocks, 4", invalid([](auto& c) { c.steps = 30; }));
  CHECK_THROWS(ConfigError, "give one", invalid([](auto& c) { c.steps = 32, c.threshold = 0.5; }));
  CHECK_THROWS(ConfigError, "Dream", invalid([](auto& c) { c.remasking = Remasking::Origin, c.steps = 128; }));
  CHECK_THROWS(ConfigError, "probability", invalid([](auto& c) { c.remasking = Remasking::Entropy; }));
  Schedule s;
  CHECK_THROWS(ConfigError, "\"llada\", \"dream\"", set_by_name(s, "linear"));
}
