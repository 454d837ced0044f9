#include "engine/engine.h"

#include <algorithm>

#include "decode/filters.h"
#include "runtime/error.h"

namespace dllm {

namespace {

using Clock = std::chrono::steady_clock;

class RunningMark {
 public:
  explicit RunningMark(std::atomic<std::thread::id>& id) : id_(id) { id_ = std::this_thread::get_id(); }
  ~RunningMark() { id_ = std::thread::id(); }

 private:
  std::atomic<std::thread::id>& id_;
};

}  // namespace

Engine::Engine(const std::string& folder, DType dtype, const LoadProgress& progress)
    : Engine(std::make_unique<Checkpoint>(folder), dtype, progress) {}

Engine::Engine(std::unique_ptr<Checkpoint> checkpoint, DType dtype, const LoadProgress& progress)
    : spec_(ModelSpec::from_config(checkpoint->config_text(), checkpoint->config_path())),
      weights_(load_weights(spec_, std::move(checkpoint), dtype, progress)), transformer_(spec_, weights_) {}

void Engine::check_prompt(size_t index, const std::vector<int32_t>& prompt, const GenerationConfig& config,
                          bool infill) const {
  const int64_t length = int64_t(prompt.size()) + config.gen_length;
  if (length > spec_.max_positions)
    fail<InputError>("prompt ", index, " has ", prompt.size(), " tokens; with gen_length = ", config.gen_length,
                     " that is ", length, " positions, beyond the model's context of ", spec_.max_positions);
  for (size_t i = 0; i < prompt.size(); ++i)
    if (prompt[i] < 0 || prompt[i] >= spec_.vocab_size)
      fail<InputError>("prompt ", index, " holds the id ", prompt[i], " at position ", i,
                       "; ids must be between 0 and ", spec_.vocab_size - 1);
  const bool first_is_infill = infill && !prompt.empty() && prompt[0] == spec_.mask_id;
  if (spec_.logit_shift && (prompt.empty() || first_is_infill))
    fail<InputError>("prompt ", index, first_is_infill ? " begins with a position to fill" : " is empty",
                     "; this model reads each token from the position before it and needs at least one given token");
  const bool has_infill = infill && std::find(prompt.begin(), prompt.end(), spec_.mask_id) != prompt.end();
  if (length == 0 || (config.gen_length == 0 && !has_infill))
    fail<ConfigError>("gen_length = 0 is not allowed: it must be at least 1, unless the prompt has positions to fill");
}

std::vector<Result> Engine::generate(const std::vector<std::vector<int32_t>>& prompts, const GenerationConfig& config,
                                     const GenerateOptions& options) {
  config.validate();
  if (options.batch_size < 1)
    fail<ConfigError>("batch_size = ", options.batch_size, " is not allowed: it must be at least 1");
  for (size_t i = 0; i < prompts.size(); ++i) check_prompt(i, prompts[i], config, options.infill);
  if (running_ == std::this_thread::get_id())
    fail<UsageError>("generate() was called from within on_step; call it after the running generate() has returned");
  const std::lock_guard lock(mutex_);
  const RunningMark mark(running_);

  std::vector<Result> results(prompts.size());
  std::vector<std::unique_ptr<Sequence>> active;
  std::vector<size_t> index_of;  // of active sequences
  size_t next = 0;
  while (next < prompts.size() || !active.empty()) {
    for (; next < prompts.size() && int64_t(active.size()) < options.batch_size; ++next) {
      active.push_back(
          std::make_unique<Sequence>(int64_t(next), prompts[next], options.infill, config, spec_, weights_.dtype));
      index_of.push_back(next);
    }
    for (size_t i = 0; i < active.size();) {
      if (active[i]->advance()) {
        ++i;
        continue;
      }
      results[index_of[i]] = active[i]->take_result();
      active.erase(active.begin() + int64_t(i));
      index_of.erase(index_of.begin() + int64_t(i));
    }
    if (!active.empty()) step(active, config, options);
  }
  return results;
}

void Engine::step(std::vector<std::unique_ptr<Sequence>>& active, const GenerationConfig& config,
                  const GenerateOptions& options) {
  if (options.interrupt && *options.interrupt) fail<Interrupted>("generation was interrupted");
  const auto begin = Clock::now();
  input_.clear();
  for (auto& s : active) s->append_rows(input_);
  const ops::RowStats* stats = evaluate(active, config);
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();

  size_t first = 0;  // this sequence's first entry of input_.sequences
  for (auto& s : active) {
    StepStats counters;
    counters.seconds = seconds;
    counters.weight_bytes = transformer_.weight_bytes();
    counters.logit_rows = s->logit_rows() * s->streams();
    for (int64_t i = 0; i < s->streams(); ++i, ++first) {
      const auto& q = input_.sequences[first];
      counters.rows += q.row_end - q.row_begin;
      counters.attention_pairs += transformer_.attention_pairs(q.row_end - q.row_begin, s->logit_rows(), q.n_keys);
    }
    StepEvent event;
    s->commit(stats, counters, event);
    stats += s->logit_rows();
    if (options.on_step && !options.on_step(event)) fail<Interrupted>("on_step asked to stop the generation");
  }
}

// Statistics of every active sequence's logit rows, in order.
const ops::RowStats* Engine::evaluate(const std::vector<std::unique_ptr<Sequence>>& active,
                                      const GenerationConfig& config) {
  keys_.clear();
  for (const auto& s : active) s->append_keys(keys_);
  stats_.resize(keys_.size());
  transformer_.forward(input_);
  if (config.needs_logits())
    combine_logits(active, config);
  else
    transformer_.row_stats(stats_params(config, spec_), keys_.data(), stats_.data());
  require_finite(active);
  return stats_.data();
}

// The path with whole logits rows: guidance, then filters, then the same statistics.
void Engine::combine_logits(const std::vector<std::unique_ptr<Sequence>>& active, const GenerationConfig& config) {
  ops::RowStatsParams params = stats_params(config, spec_);
  int64_t ld = 0;
  float* logits = transformer_.logits(ld);
  ops::RowStats* out = stats_.data();
  const NoiseKey* keys = keys_.data();
  ops::RowStatsParams filtered = params;
  filtered.banned_id = -1;
  filtered.temperature = 1.0f;
  for (const auto& s : active) {
    const int64_t n = s->logit_rows();
    for (int64_t r = 0; r < n; ++r) {
      float* row = logits + r * ld;
      if (s->streams() == 2) apply_guidance(row, row + n * ld, spec_.vocab_size, float(config.cfg_scale));
      filter_row(row, spec_.vocab_size, config, params);
    }
    ops::row_stats(logits, n, spec_.vocab_size, ld, filtered, keys, out);
    logits += n * s->streams() * ld;
    keys += n;
    out += n;
  }
}

// A NaN or an infinity must not be decoded as if it were an answer. The failed step is run once more with checks between
// the layers: the rows it writes are the same, so this finds where it began.
void Engine::require_finite(const std::vector<std::unique_ptr<Sequence>>& active) {
  const bool ok = std::all_of(stats_.begin(), stats_.end(), [](const ops::RowStats& s) { return s.finite; });
  if (ok) return;
  const std::string where = "at step " + std::to_string(active[0]->step()) + ": ";
  try {
    transformer_.forward(input_, /*check_finite=*/true);
  } catch (const NumericalError& e) {
    fail<NumericalError>("the logits are not finite ", where, e.what());
  }
  fail<NumericalError>("the logits are not finite ", where, "every layer's output is finite, the LM head's is not");
}

}  // namespace dllm
