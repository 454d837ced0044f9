// dLLM-Cache's passes: every element type, ragged sequences, lists in any order; the choice of rows against a sort.
#include "ops/cuda/features.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "cuda_emulator/case.h"
#include "ops/cuda/kernel.h"

namespace dllm {
namespace {

using namespace ops::cuda;
using emu::all_types;
using emu::bf16;
using emu::half;
using emu::type_of;

// A list as the host knows it.
struct Rows {
  std::vector<int32_t> row, position, sequence;
  std::vector<SequenceRows> sequences;
};
RowList upload(emu::Case& c, Rows rows, int capacity) {
  const int32_t count = int32_t(rows.row.size());
  for (auto* v : {&rows.row, &rows.position, &rows.sequence}) v->resize(size_t(capacity), 1 << 30);  // never to be read
  return {c.upload(rows.row),       c.upload(rows.position),    c.upload(rows.sequence),
          c.upload(rows.sequences), c.upload<int32_t>({count}), capacity};
}

// Every second of 2 n rows of the stream, spread over two sequences.
constexpr int kPositions = 23;
Rows some_rows(int n) {
  Rows rows;
  for (int i = 0; i < n; ++i) {
    rows.row.push_back(2 * i + 1);
    rows.position.push_back((5 * i + 2) % kPositions);
    rows.sequence.push_back(i % 4 == 1);
  }
  return rows;
}

template <class T>
void kept_case(emu::Case& c, int n, int capacity, int d) {
  const Rows rows = some_rows(n);
  const RowList list = upload(c, rows, capacity);
  const size_t stream_size = size_t(2 * capacity) * d, slab_size = size_t(kPositions) * d;
  float* x = c.random<float>(stream_size);
  const float* y = c.random<float>(size_t(capacity) * d);
  const std::vector<float> before = c.host(x, stream_size), hy = c.host(y, size_t(capacity) * d);
  const std::vector<void*> attention = {c.device<T>(slab_size), c.device<T>(slab_size)};
  const std::vector<void*> mlp = {c.random<T>(slab_size), c.random<T>(slab_size)};

  store_and_add(c.stream(), type_of<T>(), {y, list, c.upload(attention), d, x});
  const std::vector<float> added = c.host(x, stream_size);
  c.output(x, stream_size);
  std::vector<T> kept[2], other[2];
  for (size_t s = 0; s < 2; ++s) {
    kept[s] = c.host(static_cast<T*>(attention[s]), slab_size);
    other[s] = c.host(static_cast<T*>(mlp[s]), slab_size);
    c.output(static_cast<T*>(attention[s]), slab_size);
  }
  add_kept(c.stream(), type_of<T>(), {list, c.upload(attention), c.upload(mlp), d, x});
  const std::vector<float> after = c.host(x, stream_size);
  c.output(x, stream_size);

  for (int r = 0; r < 2 * capacity; ++r)
    for (int i = 0; i < d; ++i) {
      const size_t at = size_t(r) * d + i;
      if (r % 2 == 0 || r / 2 >= n) {
        c.expect(added[at] == before[at] && after[at] == before[at], "a row that is not listed changes");
        continue;
      }
      const float fresh = hy[size_t(r / 2) * d + i];
      const size_t s = size_t(rows.sequence[size_t(r / 2)]), from = size_t(rows.position[size_t(r / 2)]) * d + i;
      c.expect(added[at] == before[at] + fresh, "store_and_add");
      c.expect(cu::to_float(kept[s][from]) == cu::to_float(cu::from_float<T>(fresh)), "the kept value");
      c.expect(after[at] == (added[at] + cu::to_float(kept[s][from])) + cu::to_float(other[s][from]), "add_kept");
    }
}

template <class T>
void verify_case(emu::Case& c, int n, int capacity, int n_kv, int head_dim, bool with_bias) {
  const Rows rows = some_rows(n);
  const RowList list = upload(c, rows, capacity);
  const int width = n_kv * head_dim;
  const size_t slab_size = size_t(kPositions + 2) * width;
  std::vector<KvView> slabs;
  for (int s = 0; s < 2; ++s) slabs.push_back({nullptr, c.random<T>(slab_size), kPositions + 2});
  std::vector<T> before[2];
  for (size_t s = 0; s < 2; ++s) before[s] = c.host(static_cast<T*>(slabs[s].v), slab_size);
  const auto slab_at = [&](int i, int column) {
    return (size_t(column / head_dim) * (kPositions + 2) + size_t(rows.position[size_t(i)])) * head_dim +
           size_t(column % head_dim);
  };
  // Row 0 is what the cache holds, row 1 nothing but zeros, row 2 has a NaN.
  std::vector<float> v(size_t(capacity) * width), bias(static_cast<size_t>(width));
  for (float& x : v) x = float(2 * c.uniform() - 1);
  for (float& x : bias) x = float(c.uniform() - 0.5);
  for (int j = 0; j < width; ++j) {
    if (n > 0) {
      v[size_t(j)] = cu::to_float(before[size_t(rows.sequence[0])][slab_at(0, j)]);
      if (with_bias) bias[size_t(j)] = 0;
    }
    if (n > 1) v[size_t(width + j)] = 0;
  }
  if (n > 2) v[size_t(2 * width + width / 2)] = std::numeric_limits<float>::quiet_NaN();
  double* similarity = c.device<double>(size_t(capacity));
  verify_values(c.stream(), type_of<T>(),
                {c.upload(v), with_bias ? c.upload(bias) : nullptr, list, c.upload(slabs), n_kv, head_dim, similarity});
  c.output(similarity, size_t(capacity));
  const std::vector<double> found = c.host(similarity, size_t(capacity));
  std::vector<T> after[2];
  for (size_t s = 0; s < 2; ++s) {
    after[s] = c.host(static_cast<T*>(slabs[s].v), slab_size);
    c.output(static_cast<T*>(slabs[s].v), slab_size);
  }
  std::vector<T> expected[2] = {before[0], before[1]};
  for (int i = 0; i < capacity; ++i) {
    if (i >= n) {
      c.expect(std::isnan(found[size_t(i)]), "similarity beyond the count");
      continue;
    }
    const size_t s = size_t(rows.sequence[size_t(i)]);
    double dot = 0, a = 0, b = 0;
    for (int j = 0; j < width; ++j) {
      const T rounded = cu::from_float<T>(v[size_t(i) * width + j] + (with_bias ? bias[size_t(j)] : 0));
      const double x = cu::to_float(rounded), y = cu::to_float(before[s][slab_at(i, j)]);
      dot += x * y, a += x * x, b += y * y;
      expected[s][slab_at(i, j)] = rounded;
    }
    if (i == 0) c.expect(found[0] == 1.0, "equal values have similarity 1");
    if (i == 1 && !with_bias) c.expect(found[1] == 0.0, "zeros have similarity 0");
    if (i == 2)
      c.expect(std::isnan(found[2]), "a NaN stays one");
    else
      c.expect_close(found[size_t(i)], dot / std::sqrt(std::max(a, 1e-16) * std::max(b, 1e-16)), 1e-14, "similarity");
  }
  for (size_t s = 0; s < 2; ++s)
    for (size_t i = 0; i < slab_size; ++i) {
      const float x = cu::to_float(after[s][i]), y = cu::to_float(expected[s][i]);
      c.expect(x == y || (std::isnan(x) && std::isnan(y)), "the slab's values");
    }
}

struct Part {
  int rows;
  LayerPlan plan;
};

// similarity(rng) of every response row.
template <class F>
void choose_case(emu::Case& c, const std::vector<Part>& parts, F&& similarity_of) {
  Rows step, verified, live, resting;
  std::vector<int32_t> is_response;
  std::vector<LayerPlan> plans;
  std::vector<double> similarity;
  for (size_t s = 0; s < parts.size(); ++s) {
    const LayerPlan plan = parts[s].plan;
    plans.push_back(plan);
    const int begin = int(step.row.size()), first_verified = int(verified.row.size());
    const int n_keys = parts[s].rows + 5;
    const bool verifies = !plan.refresh_response && plan.n_verify >= 0;
    for (int i = 0; i < parts[s].rows; ++i) {
      const bool response = i >= parts[s].rows / 4 && i % 7 != 3;
      const int row = begin + i;
      step.row.push_back(row);
      step.position.push_back(i + i / 9);
      step.sequence.push_back(int(s));
      is_response.push_back(response);
      if (response && verifies) {
        verified.row.push_back(row);
        verified.position.push_back(step.position.back());
        verified.sequence.push_back(int(s));
        similarity.push_back(similarity_of());
      }
    }
    const int verified_end = int(verified.row.size());
    step.sequences.push_back({begin, int(step.row.size()), n_keys});
    verified.sequences.push_back({first_verified, verified_end, n_keys});

    std::vector<int> order(size_t(verified_end - first_verified));
    std::iota(order.begin(), order.end(), first_verified);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      const auto change = [&](int i) { return std::isnan(similarity[size_t(i)]) ? 2.0 : -similarity[size_t(i)]; };
      return change(a) > change(b);
    });
    if (verifies) order.resize(std::min(order.size(), size_t(plan.n_verify)));
    const int live_begin = int(live.row.size()), resting_begin = int(resting.row.size());
    for (int r = begin; r < int(step.row.size()); ++r) {
      const bool chosen = std::any_of(order.begin(), order.end(), [&](int i) { return verified.row[size_t(i)] == r; });
      Rows& to = chosen || (is_response[size_t(r)] ? plan.refresh_response : plan.refresh_prompt) ? live : resting;
      to.row.push_back(r);
      to.position.push_back(step.position[size_t(r)]);
      to.sequence.push_back(int(s));
    }
    live.sequences.push_back({live_begin, int(live.row.size()), n_keys});
    resting.sequences.push_back({resting_begin, int(resting.row.size()), n_keys});
  }
  const int n = int(step.row.size()), capacity = n + 3, n_sequences = int(parts.size());
  const auto empty = [&] {
    return RowList{c.device<int32_t>(size_t(capacity)),
                   c.device<int32_t>(size_t(capacity)),
                   c.device<int32_t>(size_t(capacity)),
                   c.device<SequenceRows>(size_t(n_sequences)),
                   c.device<int32_t>(1),
                   capacity};
  };
  const RowList lists[2] = {empty(), empty()};
  is_response.resize(size_t(capacity));
  choose_rows(c.stream(), {upload(c, step, capacity), c.upload(is_response), c.upload(plans),
                           upload(c, verified, capacity), c.upload(similarity), n_sequences, lists[0], lists[1]});
  for (int which = 0; which < 2; ++which) {
    const RowList& list = lists[which];
    Rows expected = which ? resting : live;
    const std::string what = which ? "resting " : "live ";
    c.expect(c.host(list.count, 1)[0] == int(expected.row.size()), what + "count");
    for (auto* v : {&expected.row, &expected.position, &expected.sequence}) v->resize(size_t(capacity), -1);
    c.expect(c.host(list.row, size_t(capacity)) == expected.row, what + "rows");
    c.expect(c.host(list.position, size_t(capacity)) == expected.position, what + "positions");
    c.expect(c.host(list.sequence, size_t(capacity)) == expected.sequence, what + "sequences");
    const std::vector<SequenceRows> ranges = c.host(list.sequences, size_t(n_sequences));
    for (size_t s = 0; s < size_t(n_sequences); ++s)
      c.expect(ranges[s].begin == expected.sequences[s].begin && ranges[s].end == expected.sequences[s].end &&
                   ranges[s].n_keys == expected.sequences[s].n_keys,
               what + "ranges");
    c.output(list.row, size_t(capacity));
    c.output(list.position, size_t(capacity));
  }
}

void features_kept(emu::Case& c) {
  all_types([&]<class T>() {
    kept_case<T>(c, 5, 7, 36);
    kept_case<T>(c, 3, 3, 1030);
    kept_case<T>(c, 0, 2, 4);
  });
}
void features_verify(emu::Case& c) {
  all_types([&]<class T>() {
    verify_case<T>(c, 5, 7, 2, 16, true);
    verify_case<T>(c, 4, 4, 3, 6, false);
    verify_case<T>(c, 4, 4, 4, 400, false);
    verify_case<T>(c, 0, 2, 1, 8, true);
  });
}
void features_accesses(emu::Case& c) {  // whole quads, nothing but the floor
  all_types([&]<class T>() {
    kept_case<T>(c, 8, 8, 512);
    verify_case<T>(c, 8, 8, 4, 128, true);
  });
  c.budget("sectors", 1.01);
  c.budget("banks", 1.01);
}
void features_choose(emu::Case& c) {
  const auto any = [&] { return 2 * c.uniform() - 1; };
  choose_case(c, {{300, {0, 0, 20}}, {0, {1, 0, 3}}, {1, {0, 1, -1}}, {70, {1, 0, 7}}, {33, {0, 0, -1}}}, any);
  choose_case(c, {{40, {1, 1, -1}}, {64, {0, 1, 5}}, {65, {0, 0, 0}}, {30, {0, 0, 30}}, {0, {0, 0, 2}}}, any);
  choose_case(c, {{2900, {0, 0, 611}}}, any);
}
void features_choose_similar(emu::Case& c) {  // close to 1, as similarities are
  const auto close = [&] { return 1.0 - 1e-12 * c.uniform(); };
  choose_case(c, {{1500, {0, 0, 17}}, {1500, {1, 0, 1000}}}, close);
}
void features_choose_ties(emu::Case& c) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double values[] = {1.0, 1.0, 1.0, 0.5, -0.0, 0.0, nan, -1.0};
  const auto few = [&] { return values[size_t(c.uniform() * 8)]; };
  choose_case(c, {{1400, {0, 0, 100}}, {1400, {0, 0, 500}}, {1400, {0, 0, 800}}}, few);
  choose_case(c, {{1400, {0, 0, 1100}}, {40, {0, 0, 12}}}, [] { return 1.0; });
}

const emu::Registered r1("features/kept", features_kept);
const emu::Registered r2("features/verify", features_verify);
const emu::Registered r3("features/choose", features_choose);
const emu::Registered r4("features/choose_similar", features_choose_similar);
const emu::Registered r5("features/choose_ties", features_choose_ties);
const emu::Registered r6("features/accesses", features_accesses);

}  // namespace
}  // namespace dllm
