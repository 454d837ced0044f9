// Attention and head means: every tile height, one chunk, cut keys and uncut keys, which must give the same bits; ragged
// sequences with grouped heads, and an empty one.
#include "ops/cuda/attention.h"

#include <optional>

#include "cuda_emulator/case.h"
#include "ops/cuda/kernel.h"

namespace dllm {
namespace {

using namespace ops::cuda;
using emu::bf16;
using emu::half;

struct Sequence {
  int rows, keys, capacity;
};
// What a launch is sized by; chooses tile heights and whether keys are cut.
struct Capacity {
  int rows, keys;
};

template <class T>
struct Problem {
  static constexpr DType kType = std::is_same_v<T, float>  ? DType::F32
                                 : std::is_same_v<T, bf16> ? DType::BF16
                                                           : DType::F16;
  static constexpr int kPad = 8;  // columns of q, out beyond the heads

  emu::Case& c;
  int heads, kv, dim, rows = 0, ld;
  std::vector<Sequence> shapes;
  std::vector<SequenceRows> sequences;
  std::vector<KvView> slabs;
  std::vector<std::vector<T>> k, v;
  std::vector<T> q;
  const T* device_q;
  const SequenceRows* device_sequences;
  const KvView* device_slabs;

  Problem(emu::Case& c, int heads, int kv, int dim, const std::vector<Sequence>& shapes)
      : c(c), heads(heads), kv(kv), dim(dim), ld(heads * dim + kPad), shapes(shapes) {
    for (const Sequence& s : shapes) {
      sequences.push_back({rows, rows + s.rows, s.keys});
      rows += s.rows;
      k.push_back(slab(s));
      v.push_back(slab(s));
      slabs.push_back({c.upload(k.back()), c.upload(v.back()), s.capacity});
    }
    device_q = c.random<T>(size_t(rows) * ld, 3.0);
    q = c.host(device_q, size_t(rows) * ld);
    device_sequences = c.upload(sequences);
    device_slabs = c.upload(slabs);
  }

  // [kv][capacity][dim]; NaN beyond the sequence's keys.
  std::vector<T> slab(const Sequence& s) {
    std::vector<T> x(size_t(kv) * s.capacity * dim);
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = cu::from_float<T>(int(i / dim) % s.capacity < s.keys ? float(2 * c.uniform() - 1) : NAN);
    return x;
  }
  float scale() const { return 1.0f / std::sqrt(float(dim)); }

  struct Result {
    std::vector<T> out;
    std::vector<float> lse, mean;
  };
  // Two rows more than there are, which must stay as they were. `reserved` sizes the scratch: what the launch asks for, or
  // more.
  Result run(const Capacity& most, bool means) { return run(most, means, most); }
  Result run(const Capacity& most, bool means, const Capacity& reserved) {
    const size_t n = size_t(rows) + 2;
    T* out = c.device<T>(n * ld);
    float *lse = c.device<float>(n * heads), *mean = c.device<float>(n * (most.keys + 1));
    const size_t scratch = attention_scratch_bytes(kType, heads, dim, reserved.rows, reserved.keys);
    if (scratch < attention_scratch_bytes(kType, heads, dim, most.rows, most.keys))
      throw Error("scratch of " + std::to_string(scratch) + " bytes is too little for fewer rows or keys");
    AttentionArgs a{device_q,
                    ld,
                    out,
                    ld,
                    lse,
                    device_sequences,
                    device_slabs,
                    int(shapes.size()),
                    heads,
                    kv,
                    dim,
                    most.rows,
                    most.keys,
                    scale(),
                    scratch ? c.device<char>(scratch) : nullptr};
    attention(c.stream(), kType, a);
    Result r{c.host(out, n * ld), c.host(lse, n * heads), {}};
    if (!means) return r;
    a.out = a.scratch = nullptr;
    head_mean(c.stream(), kType, {a, mean, most.keys + 1});
    const std::vector<float> values = c.host(mean, n * (most.keys + 1));
    for (size_t row = 0; row < n; ++row)
      for (int j = 0; j <= most.keys; ++j) {
        const float x = values[row * (most.keys + 1) + j];
        if (j < keys_of(int(row)))
          r.mean.push_back(x);
        else
          c.expect(std::isnan(x), "head_mean writes beyond rows or keys");
      }
    return r;
  }
  int keys_of(int row) const {
    for (const SequenceRows& s : sequences)
      if (row >= s.begin && row < s.end) return s.n_keys;
    return 0;
  }

  // In fp64, one row and head after the other.
  void check(const Result& r) {
    // P and the output are rounded to T: half a unit each, of numbers near 1.
    const double eps = kType == DType::F32 ? 2e-6 : kType == DType::BF16 ? 0x1p-8 : 0x1p-11;
    const auto at = [](const std::vector<T>& x, size_t i) { return double(cu::to_float(x[i])); };
    size_t mean_begin = 0;
    for (size_t s = 0; s < sequences.size(); ++s)
      for (int row = sequences[s].begin; row < sequences[s].end; ++row) {
        const int n = sequences[s].n_keys;
        std::vector<double> mean(n);
        for (int h = 0; h < heads; ++h) {
          const size_t slab_head = size_t(h / (heads / kv)) * slabs[s].capacity;
          std::vector<double> p(n);
          double sum = 0;
          for (int j = 0; j < n; ++j) {
            double x = 0;
            for (int d = 0; d < dim; ++d)
              x += at(q, size_t(row) * ld + h * dim + d) * at(k[s], (slab_head + j) * dim + d);
            sum += p[j] = std::exp(x * scale());
          }
          c.expect_close(r.lse[size_t(row) * heads + h], std::log(sum), 5e-6, "lse");
          for (int j = 0; j < n; ++j) mean[j] += p[j] / sum / heads;
          for (int d = 0; d < dim; ++d) {
            double o = 0;
            for (int j = 0; j < n; ++j) o += p[j] / sum * at(v[s], (slab_head + j) * dim + d);
            c.expect_close(at(r.out, size_t(row) * ld + h * dim + d), o, eps * (std::abs(o) + 0.2), "out");
          }
        }
        for (int j = 0; j < n; ++j) c.expect_close(r.mean[mean_begin + j], mean[j], 1e-5 * mean[j], "mean");
        mean_begin += n;
      }
    for (size_t i = 0; i < r.out.size(); ++i)
      if (i / ld >= size_t(rows) || int(i % ld) >= heads * dim)
        c.expect(std::isnan(at(r.out, i)), "attention writes beyond rows or columns");
    for (size_t i = size_t(rows) * heads; i < r.lse.size(); ++i)
      c.expect(std::isnan(r.lse[i]), "attention writes lse beyond rows");
  }
};

// Every capacity must give the bits of the first.
template <class T>
void attention_case(emu::Case& c, int heads, int kv, int dim, const std::vector<Sequence>& shapes,
                    const std::vector<Capacity>& capacities) {
  Problem<T> problem(c, heads, kv, dim, shapes);
  std::optional<typename Problem<T>::Result> first;
  const auto equal = [](const auto& a, const auto& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
  };
  for (const Capacity& most : capacities) {
    // Means at the first and the last: 16 rows a block, and 32.
    const bool means = &most == &capacities.front() || &most == &capacities.back();
    const auto r = problem.run(most, means);
    if (!first) {
      problem.check(r);
      c.output(c.upload(r.out), r.out.size());
      c.output(c.upload(r.lse), r.lse.size());
      c.output(c.upload(r.mean), r.mean.size());
      first = r;
      continue;
    }
    const std::string what =
        " depends on the capacity: " + std::to_string(most.rows) + " x " + std::to_string(most.keys);
    c.expect(equal(r.out, first->out), "out" + what);
    c.expect(equal(r.lse, first->lse), "lse" + what);
    c.expect(!means || equal(r.mean, first->mean), "mean" + what);
  }
}

template <class T, int Dim>
void attention_16bit(emu::Case& c) {
  // One chunk: tiles of 16, 32, 64; the same keys as one of several: 16, 32, 64, uncut.
  attention_case<T>(c, 4, 2, Dim, {{3, 37, 37}, {0, 0, 4}, {17, 130, 131}, {1, 1, 1}},
                    {{21, 130}, {1000, 200}, {2000, 256}, {22, 300}, {500, 300}, {1000, 300}, {2100, 300}});
  // Several chunks, cut and uncut; a group that does not divide a tile.
  attention_case<T>(c, 7, 1, Dim, {{2, 530, 530}, {1, 257, 300}, {1, 256, 256}}, {{4, 530}, {1300, 600}});
  c.budget("sectors", 3.3);  // stores of means: rows of any length
  c.budget("banks", 1.01);
}

void attention_f32(emu::Case& c) {
  for (const int dim : {8, 72, 256})
    attention_case<float>(c, 4, 2, dim, {{3, 37, 37}, {0, 0, 4}, {2, 300, 301}, {1, 1, 1}}, {{6, 300}, {9, 700}});
}

// A row's result alone and beside others; nothing to do at all.
void attention_neighbours(emu::Case& c) {
  Problem<bf16> problem(c, 2, 1, 64, {{3, 70, 70}, {4, 90, 90}});
  const auto both = problem.run({7, 90}, true);
  const int begin = problem.sequences[1].begin, size = 4 * problem.ld;
  problem.device_q += size_t(begin) * problem.ld;
  problem.device_sequences = c.upload<SequenceRows>({{0, 4, 90}});
  problem.device_slabs += 1;
  problem.shapes.erase(problem.shapes.begin());
  problem.sequences = {{0, 4, 90}};
  problem.rows = 4;
  const auto alone = problem.run({4, 90}, true);
  c.output(c.upload(alone.out), alone.out.size());
  c.expect(std::memcmp(&both.out[size_t(begin) * problem.ld], alone.out.data(), size * sizeof(bf16)) == 0,
           "a row's result depends on the rows beside it");
  AttentionArgs none{};
  none.n_heads = none.n_kv = 1;
  none.head_dim = 64;
  attention(c.stream(), DType::BF16, none);
  head_mean(c.stream(), DType::BF16, {none, nullptr, 0});
}

// The engine reserves for its largest step, a full pass that may leave keys uncut, and cuts them in the smaller ones.
void attention_reserved_for_more(emu::Case& c) {
  Problem<bf16> problem(c, 8, 2, 64, {{3, 270, 270}, {2, 300, 310}});
  const Capacity small{16, 300};
  const auto exact = problem.run(small, false);
  c.output(c.upload(exact.out), exact.out.size());
  for (const Capacity& reserved : {Capacity{512, 300}, {1024, 300}, {1025, 300}, {3000, 700}}) {
    const auto r = problem.run(small, false, reserved);
    c.expect(std::memcmp(r.out.data(), exact.out.data(), r.out.size() * sizeof(bf16)) == 0,
             "out depends on what is reserved: " + std::to_string(reserved.rows));
  }
}

const emu::Registered cases[] = {
    {"attention/bf16_64", attention_16bit<bf16, 64>},
    {"attention/bf16_128", attention_16bit<bf16, 128>},
    {"attention/fp16_64", attention_16bit<half, 64>},
    {"attention/fp16_128", attention_16bit<half, 128>},
    {"attention/f32", attention_f32},
    {"attention/neighbours", attention_neighbours},
    {"attention/reserved_for_more", attention_reserved_for_more},
};

}  // namespace
}  // namespace dllm
