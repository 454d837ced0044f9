#include "engine/measure.h"

#include "cache/kv_cache.h"
#include "runtime/error.h"
#include "runtime/stopwatch.h"

namespace dllm {

namespace {

void require_within(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    fail<UsageError>(name, " = ", value, " is not allowed: it must be between ", least, " and ", most);
}

// The rows at positions [begin, end) of a sequence of `end` slots, the statistics of all of them wanted. Every other token
// of a partial step is the mask, as in a block that is half decoded; the rest are scattered over the vocabulary.
StepInput step_of(const ModelSpec& spec, const KvCache& kv, int64_t begin, int64_t end) {
  StepInput in;
  for (int64_t p = begin; p < end; ++p) {
    const bool mask = begin > 0 && p % 2 == 1;
    in.tokens.push_back(mask ? spec.mask_id : int32_t((p * 2654435761u + 12345u) % uint64_t(spec.vocab_size)));
    in.positions.push_back(int32_t(p));
    in.out_rows.push_back(int32_t(p - begin));
  }
  in.sequences.push_back({0, end - begin, end, kv.slabs()});
  return in;
}

}  // namespace

std::vector<double> time_steps(Engine& engine, int64_t rows, int64_t keys, int64_t repeats) {
  const ModelSpec& spec = engine.spec();
  require_within("keys", keys, 1, spec.max_positions);
  require_within("rows", rows, 1, keys);
  require_within("repeats", repeats, 1, int64_t(1) << 20);

  Model& model = engine.model();
  const KvCache kv(spec, model.info().dtype, keys, model.device());
  std::vector<ops::RowStats> stats(static_cast<size_t>(keys));
  ops::RowStatsParams params;
  params.mask_id = spec.mask_id;
  const auto run = [&](const StepInput& in) {
    model.forward(in);
    model.row_stats(params, nullptr, stats.data());
  };
  run(step_of(spec, kv, 0, keys));  // fills the slabs, and is the warm-up

  const StepInput step = step_of(spec, kv, keys - rows, keys);
  std::vector<double> seconds(static_cast<size_t>(repeats));
  for (double& s : seconds) {
    const Stopwatch watch(s);
    run(step);
  }
  return seconds;
}

}  // namespace dllm
