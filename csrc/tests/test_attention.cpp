// Attention gives the same bits however its work is split: by threads, by rows, by keys, among sequences.

#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "runtime/buffer.h"
#include "tests/check.h"
#include "tests/threads.h"

using namespace dllm;
using ops::AttentionSequence;
using test::Threads;

namespace {

constexpr int kHeads = 4, kKvHeads = 2, kHeadDim = 64, kColumns = kHeads * kHeadDim;

// Random K and V of one sequence, and its query rows.
struct Sequence {
  ops::KvSlab slab;
  Buffer k, v, q;
  int64_t rows, keys;

  Sequence(int64_t rows, int64_t keys, DType dtype, unsigned seed) : rows(rows), keys(keys) {
    slab.capacity = (keys + 31) / 32 * 32;
    slab.n_kv = kKvHeads;
    slab.head_dim = kHeadDim;
    slab.dtype = dtype;
    std::mt19937 rng(seed);
    k = random(slab.k_elements(), rng);
    v = random(slab.v_elements(), rng);
    q = random(rows * kColumns, rng);
    slab.k = k.as<>();
    slab.v = v.as<>();
  }

 private:
  Buffer random(int64_t n, std::mt19937& rng) const {
    std::normal_distribution<float> normal;
    Buffer b(size_t(n) * size_of(slab.dtype), "test");
    for (int64_t i = 0; i < n; ++i)
      if (slab.dtype == DType::F32)
        b.as<float>()[i] = normal(rng);
      else
        b.as<uint16_t>()[i] = float_to_bf16(normal(rng));
    return b;
  }
};

struct Result {
  std::vector<char> out;
  std::vector<std::vector<float>> means;
  bool operator==(const Result&) const = default;
};

// All sequences in one call, those with an odd index (or all, or none) with a mean.
enum class Means { None, Odd, All };
Result attend(const std::vector<Sequence>& sequences, Means means) {
  Result result;
  std::vector<AttentionSequence> in;
  const DType dtype = sequences[0].slab.dtype;
  const size_t row_bytes = kColumns * size_of(dtype);
  std::vector<char> q;
  int64_t row = 0;
  result.means.resize(sequences.size());
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = sequences[i];
    q.insert(q.end(), s.q.as<char>(), s.q.as<char>() + size_t(s.rows) * row_bytes);
    in.push_back({row, row + s.rows, s.keys, s.slab});
    row += s.rows;
    if (means == Means::None || (means == Means::Odd && i % 2 == 0)) continue;
    result.means[i].assign(size_t(s.rows * s.keys), -1.0f);
    in.back().mean = result.means[i].data();
    in.back().ld_mean = s.keys;
  }
  result.out.assign(size_t(row) * row_bytes, 0);
  ops::attention({q.data(), kColumns, dtype, kHeads, kKvHeads, kHeadDim, 0.125f, in.data(), int64_t(in.size()),
                  result.out.data(), kColumns});
  return result;
}

std::vector<Sequence> one(int64_t rows, int64_t keys, DType dtype) {
  std::vector<Sequence> s;
  s.emplace_back(rows, keys, dtype, unsigned(rows * 10000 + keys));
  return s;
}

}  // namespace

TEST(attention_has_the_same_bits_on_any_number_of_threads) {
  for (DType dtype : {DType::F32, DType::BF16})
    for (int64_t keys : {1, 33, 320, 511, 512, 513, 1024, 1025, 1600})
      for (int64_t rows : {1, 5, 16, 33}) {
        const std::vector<Sequence> s = one(rows, keys, dtype);
        const Threads single(1);
        const Result alone = attend(s, Means::All);
        for (int threads : {1, 2, 3, 5, 64}) {
          const Threads set(threads);
          CHECK(attend(s, Means::None).out == alone.out);
          if (threads == 3) CHECK(attend(s, Means::All) == alone);
        }
      }
}

TEST(attention_of_many_sequences_is_that_of_each) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    std::vector<Sequence> sequences;
    const int64_t rows[] = {32, 1, 7, 0, 70, 2, 32}, keys[] = {1600, 1100, 40, 5, 513, 700, 320};
    for (unsigned i = 0; i < 7; ++i) sequences.emplace_back(rows[i], keys[i], dtype, i);
    Result expected;
    const Threads single(1);
    for (unsigned i = 0; i < 7; ++i) {
      std::vector<Sequence> s;
      s.emplace_back(rows[i], keys[i], dtype, i);
      const Result r = attend(s, i % 2 ? Means::All : Means::None);
      expected.out.insert(expected.out.end(), r.out.begin(), r.out.end());
      expected.means.push_back(r.means[0]);
    }
    for (int threads : {1, 2, 3, 5, 64}) {
      const Threads set(threads);
      CHECK(attend(sequences, Means::Odd) == expected);
      CHECK(attend(sequences, Means::None).out == expected.out);
    }
  }
}
