// d2Cache's choices and dLLM-Cache's kept features, below the engine.

#include <algorithm>

#include "cache/d2_rows.h"
#include "cache/feature_cache.h"
#include "cache/kv_cache.h"
#include "decode/density.h"
#include "decode/kl_history.h"
#include "model/transformer.h"
#include "tests/check.h"
#include "tests/tiny_model.h"

using namespace dllm;
using test::TempFolder;

namespace {

std::string join(const std::vector<int32_t>& v) {
  std::string s;
  for (int32_t i : v) s += (s.empty() ? "" : " ") + std::to_string(i);
  return s;
}

Bitmap set_of(int64_t size, const std::vector<int32_t>& members) {
  Bitmap b(size);
  for (int32_t i : members) b.set(i);
  return b;
}

// Of positions that are all known, or all not.
std::vector<double> density_of(int64_t positions, bool known, double sigma) {
  Bitmap editable(positions), none(positions);
  for (int64_t p = 0; p < positions; ++p) editable.set(p);
  CertaintyDensity density(editable, sigma);
  const std::span<const double> d = density.of(known ? none : editable);
  return {d.begin(), d.end()};
}

constexpr int64_t kLength = 24, kPrompt = 9;

// A model, one sequence's caches, and a step with kept features over all its rows.
struct Kept {
  TempFolder folder;
  ModelSpec spec;
  Weights weights;
  KvCache kv;
  FeatureCache features;
  FeatureStep step;
  StepInput in;
  Transformer transformer{spec, weights};

  Kept(Family family, DType dtype) {
    test::write_tiny_model(folder, family);
    auto checkpoint = std::make_unique<Checkpoint>(folder.path());
    spec = ModelSpec::from_config(checkpoint->config_text(), "config.json");
    weights = load_weights(spec, std::move(checkpoint), dtype, Quantization::None, {});
    kv = KvCache(spec, dtype, kLength);
    features = FeatureCache(spec, dtype, kLength);
    for (int32_t p = 0; p < kLength; ++p) {
      (p < kPrompt ? step.prompt_rows : step.response_rows).push_back(p);
      step.last_rows.push_back(p);
      in.tokens.push_back((p * 7 + 3) % 70);
      in.positions.push_back(p);
      in.out_rows.push_back(p);
    }
    in.sequences.push_back({0, kLength, kLength, kv.slabs(), false, &step, features.slabs()});
  }

  std::vector<float> logits(bool refresh_prompt, bool refresh_response, int64_t verify) {
    step.layers.assign(size_t(spec.n_layers), {refresh_prompt, refresh_response});
    step.n_verify = verify;
    transformer.forward(in);
    int64_t ld = 0;
    const float* l = transformer.logits(ld);
    std::vector<float> out;
    for (int64_t r = 0; r < kLength; ++r) out.insert(out.end(), l + r * ld, l + r * ld + spec.vocab_size);
    return out;
  }
};

}  // namespace

TEST(density_has_the_published_values) {
  const std::vector<double> d = density_of(64, false, 10.0);
  const std::pair<int, double> expected[] = {{0, 0.480053},  {1, 0.440358},   {5, 0.291081},
                                             {10, 0.146758}, {20, 0.0201406}, {40, 2.5425e-5}};
  for (const auto& [i, value] : expected) CHECK(std::abs(d[size_t(i)] / value - 1) < 1e-5);
  CHECK(density_of(0, true, 1.0).empty());
  const std::vector<double> all = density_of(5, true, 2.0);
  for (double x : all) CHECK(x > 0.5);
}

TEST(nucleus_stops_before_its_share_is_exceeded) {
  // shares .05 .04 .03 of a total of 1: two of them for p = .1
  std::vector<float> importance(97, 0.88f / 94);
  importance[50] = 0.05f, importance[3] = 0.04f, importance[77] = 0.03f;
  Bitmap rows(97);
  std::vector<int32_t> scratch;
  add_nucleus(importance, 0.1, rows, scratch);
  CHECK_EQ(join(rows.members()), "3 50");
  rows = Bitmap(97);
  add_nucleus(importance, 0.0, rows, scratch);
  CHECK_EQ(join(rows.members()), "50");
  rows = set_of(97, {50});  // what is there already has no part in it
  add_nucleus(importance, 0.0, rows, scratch);
  CHECK_EQ(join(rows.members()), "3 50");
  add_nucleus(importance, 1.0, rows, scratch);
  CHECK_EQ(rows.count(), 97);
}

TEST(inflation_fills_narrow_gaps) {
  Bitmap rows = set_of(20, {2, 6, 11, 12, 19});
  inflate(4, rows);
  CHECK_EQ(join(rows.members()), "2 3 4 5 6 11 12 19");
  inflate(0, rows);
  CHECK_EQ(rows.count(), 8);
}

TEST(kl_needs_a_history) {
  KlHistory h(2, 2, false), released(2, 2, true);
  const float a[] = {0, 0}, b[] = {5, 0};
  CHECK(!h.stable(0, 1.0) && released.stable(0, 1.0));
  for (int i = 0; i < 3; ++i) {
    h.update(0, a, 2, std::log(2.0));
    CHECK_EQ(h.stable(0, 0.1), i == 2);  // the first is against nothing, and far from it
  }
  h.update(0, b, 2, std::log(std::exp(5.0) + 1));
  CHECK(!h.stable(0, 0.1) && h.stable(0, 1.0));
}

constexpr Family kFamilies[] = {Family::LLaDA, Family::Dream};

TEST(a_refresh_of_everything_is_the_plain_step) {
  for (Family family : kFamilies)
    for (DType dtype : {DType::F32, DType::BF16}) {
      Kept kept(family, dtype);
      const std::vector<float> all = kept.logits(true, true, -1);
      CHECK(kept.logits(true, false, int64_t(kLength - kPrompt)) == all);
      kept.in.sequences[0].features = nullptr;
      CHECK(kept.logits(true, true, -1) == all);
    }
}

TEST(v_verify_finds_the_row_that_changed) {
  for (Family family : kFamilies) {
    Kept kept(family, DType::F32);
    const std::vector<float> before = kept.logits(true, true, -1);
    // Nothing changed: whichever rows are verified, the outputs are the same.
    CHECK(kept.logits(false, false, 3) == before);
    CHECK_EQ(kept.transformer.work(0).layer_rows, 3 * kept.spec.n_layers);
    CHECK_EQ(kept.transformer.work(0).verify_rows, (kLength - kPrompt) * kept.spec.n_layers);
    // One other token: its row is computed, so its output is no longer the kept one.
    kept.in.tokens[17] = 60;
    const std::vector<float> after = kept.logits(false, false, 1);
    const int64_t v = kept.spec.vocab_size;
    for (int64_t r = 0; r < kLength; ++r)
      CHECK_EQ(std::equal(after.begin() + r * v, after.begin() + (r + 1) * v, before.begin() + r * v), r != 17);
  }
}

TEST(rollout_covers_every_position_once) {
  for (Family family : kFamilies) {
    Kept kept(family, DType::F32);
    kept.in.sequences[0].features = nullptr;
    kept.in.sequences[0].importance = true;
    kept.in.out_rows = {4};
    kept.transformer.forward(kept.in);
    double sum = 0;
    for (float c : kept.transformer.importance(0)) sum += c;
    CHECK(std::abs(sum - kLength) < 1e-4);
  }
}
