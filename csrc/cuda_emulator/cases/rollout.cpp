// Attention rollout: rows of several parts, keys of several blocks, ragged sequences, with and without c.
#include "ops/cuda/rollout.h"

#include "cuda_emulator/case.h"

namespace dllm {
namespace {

using namespace ops::cuda;

struct Sequence {
  int rows, keys;
};

void check(emu::Case& c, const std::vector<Sequence>& sequences, int ld_mean, bool ones) {
  const int n = int(sequences.size());
  std::vector<SequenceRows> ranges;
  std::vector<int32_t> positions;
  int max_keys = 0;
  for (const Sequence& s : sequences) {
    const int32_t begin = int32_t(positions.size());
    for (int r = 0; r < s.rows; ++r) positions.push_back(int32_t(int64_t(r) * s.keys / s.rows));
    ranges.push_back({begin, begin + s.rows, s.keys});
    max_keys = std::max(max_keys, s.keys);
  }
  const int64_t ld = max_keys + 3;
  const float* mean = c.random<float>(positions.size() * size_t(ld_mean));
  const float* before = ones ? nullptr : c.random<float>(size_t(n * ld), 2.0);
  float* out = c.device<float>(size_t(n * ld));
  rollout(c.stream(), {mean, ld_mean, c.upload(ranges), c.upload(positions), n, max_keys + 40, before, out, ld});
  c.output(out, size_t(n * ld));

  const std::vector<float> m = c.host(mean, positions.size() * size_t(ld_mean)), o = c.host(out, size_t(n * ld));
  const std::vector<float> b = ones ? std::vector<float>(size_t(n * ld), 1.0f) : c.host(before, size_t(n * ld));
  for (int s = 0; s < n; ++s) {
    const size_t at = size_t(s * ld);
    std::vector<double> expected(b.begin() + int64_t(at), b.begin() + int64_t(at + size_t(ld)));
    for (int r = ranges[size_t(s)].begin; r < ranges[size_t(s)].end; ++r) expected[size_t(positions[size_t(r)])] /= 2;
    for (int r = ranges[size_t(s)].begin; r < ranges[size_t(s)].end; ++r)
      for (int j = 0; j < ranges[size_t(s)].n_keys; ++j)
        expected[size_t(j)] += 0.5 * b[at + size_t(positions[size_t(r)])] * m[size_t(r) * size_t(ld_mean) + size_t(j)];
    for (size_t j = 0; j < size_t(ld); ++j)
      if (j < size_t(ranges[size_t(s)].n_keys))
        c.expect_close(o[at + j], expected[j], 2e-5, "importance");
      else
        c.expect(std::isnan(o[at + j]), "writes beyond the keys");
  }
}

void rollout_by_four(emu::Case& c) {
  check(c, {{5, 37}, {0, 12}, {300, 333}, {1, 0}}, 336, false);
  check(c, {{33, 64}}, 64, true);
}
void rollout_accesses(emu::Case& c) {  // whole quads, nothing but the floor
  check(c, {{128, 128}, {256, 256}}, 256, false);
  c.budget("sectors", 1.2);
  c.budget("banks", 1.01);
}
void rollout_by_one(emu::Case& c) {
  check(c, {{130, 131}, {7, 7}, {1, 90}}, 131, false);
  check(c, {{20, 33}, {0, 1}}, 35, true);
}

const emu::Registered r1("rollout/by_four", rollout_by_four);
const emu::Registered r2("rollout/by_one", rollout_by_one);
const emu::Registered r3("rollout/accesses", rollout_accesses);

}  // namespace
}  // namespace dllm
