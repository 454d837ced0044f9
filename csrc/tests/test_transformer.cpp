// The row-sparse step itself: what it writes, what it leaves alone, and that a row's bits do not depend on its company.

#include <algorithm>

#include "cache/kv_cache.h"
#include "model/transformer.h"
#include "tests/check.h"
#include "tests/tiny_model.h"

using namespace dllm;
using test::TempFolder;

namespace {

constexpr int64_t kLength = 40;

struct TinyModel {
  TempFolder folder;
  ModelSpec spec;
  Weights weights;

  TinyModel(Family family, DType dtype) {
    test::write_tiny_model(folder, family);
    auto checkpoint = std::make_unique<Checkpoint>(folder.path());
    spec = ModelSpec::from_config(checkpoint->config_text(), "config.json");
    weights = load_weights(spec, std::move(checkpoint), dtype, Quantization::None, {});
  }
};

// K and V of every layer and position, as fp32.
std::vector<float> snapshot(const ModelSpec& spec, const KvCache& kv, int64_t position) {
  std::vector<float> out;
  const int32_t p = int32_t(position);
  std::vector<float> k(size_t(spec.kv_columns())), v(k.size());
  for (const ops::KvSlab& slab : kv.slabs()) {
    ops::read_kv(slab, &p, 1, k.data(), v.data());
    out.insert(out.end(), k.begin(), k.end());
    out.insert(out.end(), v.begin(), v.end());
  }
  return out;
}

void add_sequence(StepInput& in, const std::vector<int32_t>& positions, int32_t salt, const KvCache& kv) {
  const int64_t begin = int64_t(in.tokens.size());
  for (int32_t p : positions) {
    in.tokens.push_back((p * 7 + salt) % 70);
    in.positions.push_back(p);
    in.out_rows.push_back(int32_t(in.tokens.size()) - 1);
  }
  in.sequences.push_back({begin, int64_t(in.tokens.size()), kLength, kv.slabs()});
}

std::vector<int32_t> all_positions() {
  std::vector<int32_t> p;
  for (int32_t i = 0; i < kLength; ++i) p.push_back(i);
  return p;
}

std::vector<float> logits(Transformer& t, const StepInput& in, int64_t vocab) {
  t.forward(in);
  int64_t ld = 0;
  const float* l = t.logits(ld);
  std::vector<float> out;
  for (size_t r = 0; r < in.out_rows.size(); ++r)
    out.insert(out.end(), l + int64_t(r) * ld, l + int64_t(r) * ld + vocab);
  return out;
}

}  // namespace

TEST(a_partial_step_writes_its_rows_and_no_others) {
  for (Family family : {Family::LLaDA, Family::Dream})
    for (DType dtype : {DType::F32, DType::BF16}) {
      TinyModel m(family, dtype);
      Transformer t(m.spec, m.weights);
      KvCache kv(m.spec, dtype, kLength);
      StepInput full;
      add_sequence(full, all_positions(), 0, kv);
      t.forward(full);
      std::vector<std::vector<float>> before;
      for (int64_t p = 0; p < kLength; ++p) before.push_back(snapshot(m.spec, kv, p));

      const std::vector<int32_t> rows = {3, 4, 17, 31, 32, 39};
      StepInput partial;
      add_sequence(partial, rows, 5, kv);  // other tokens than before
      t.forward(partial);
      for (int64_t p = 0; p < kLength; ++p) {
        const bool computed = std::find(rows.begin(), rows.end(), p) != rows.end();
        CHECK_EQ(snapshot(m.spec, kv, p) == before[size_t(p)], !computed);
      }
    }
}

TEST(computing_the_same_rows_again_changes_nothing) {
  TinyModel m(Family::LLaDA, DType::F32);
  Transformer t(m.spec, m.weights);
  KvCache kv(m.spec, DType::F32, kLength);
  StepInput full, part;
  add_sequence(full, all_positions(), 0, kv);
  const std::vector<float> first = logits(t, full, m.spec.vocab_size);
  add_sequence(part, {0, 20, 21, 39}, 0, kv);
  const std::vector<float> again = logits(t, part, m.spec.vocab_size);
  const int64_t v = m.spec.vocab_size;
  size_t r = 0;
  for (int64_t p : {0, 20, 21, 39}) {
    CHECK(std::equal(again.begin() + int64_t(r) * v, again.begin() + int64_t(r + 1) * v, first.begin() + p * v));
    ++r;
  }
}

TEST(a_row_has_the_same_bits_in_any_company) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    TinyModel m(Family::Dream, dtype);
    Transformer t(m.spec, m.weights);
    KvCache a(m.spec, dtype, kLength), b(m.spec, dtype, kLength), alone(m.spec, dtype, kLength);
    StepInput together, single;
    add_sequence(together, all_positions(), 1, a);
    add_sequence(together, all_positions(), 2, b);
    add_sequence(single, all_positions(), 2, alone);
    const std::vector<float> both = logits(t, together, m.spec.vocab_size);
    const std::vector<float> one = logits(t, single, m.spec.vocab_size);
    CHECK(std::equal(one.begin(), one.end(), both.begin() + int64_t(one.size())));
  }
}

TEST(only_wanted_rows_leave_the_last_layer) {
  TinyModel m(Family::LLaDA, DType::F32);
  Transformer t(m.spec, m.weights);
  KvCache kv(m.spec, DType::F32, kLength), other(m.spec, DType::F32, kLength);
  StepInput full, few;
  add_sequence(full, all_positions(), 0, kv);
  const std::vector<float> all = logits(t, full, m.spec.vocab_size);
  add_sequence(few, all_positions(), 0, other);
  few.out_rows = {2, 38};
  const std::vector<float> two = logits(t, few, m.spec.vocab_size);
  const int64_t v = m.spec.vocab_size;
  CHECK_EQ(int64_t(two.size()), 2 * v);
  CHECK(std::equal(two.begin(), two.begin() + v, all.begin() + 2 * v));
  CHECK(std::equal(two.begin() + v, two.end(), all.begin() + 38 * v));
  for (int64_t p = 0; p < kLength; ++p) CHECK(snapshot(m.spec, kv, p) == snapshot(m.spec, other, p));
}
