#include "engine/engine.h"

#include <algorithm>
#include <cmath>

#include "decode/filters.h"
#include "runtime/buffer.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace dllm {

using Clock = std::chrono::steady_clock;

Engine::Exclusive::Exclusive(Engine& engine, const char* function) : engine_(engine) {
  if (engine.running_ == std::this_thread::get_id())
    fail<UsageError>(function, "() was called from within on_step; call it after the running generate() has returned");
  lock_ = std::unique_lock(engine.mutex_);
  engine.running_ = std::this_thread::get_id();
}

Engine::Exclusive::~Exclusive() { engine_.running_ = std::thread::id(); }

Engine::Engine(const std::string& folder, DType dtype, Quantization quantization, const LoadProgress& progress,
               const std::string& device)
    : Engine(std::make_unique<Checkpoint>(folder), dtype, quantization, progress, device) {}

Engine::Engine(std::unique_ptr<Checkpoint> checkpoint, DType dtype, Quantization quantization,
               const LoadProgress& progress, const std::string& device)
    : spec_(ModelSpec::from_config(checkpoint->config_text(), checkpoint->config_path())) {
  if (device != "cpu" && device != "cuda") fail<ConfigError>("device = \"", device, "\" must be \"cpu\" or \"cuda\"");
  if (device == "cpu" && dtype == DType::F16)
    fail<ConfigError>("dtype = \"float16\" is not supported on the CPU (there are: \"float32\", \"bfloat16\")");
  const auto load = device == "cpu" ? load_cpu_model : load_cuda_model;
  model_ = load(spec_, std::move(checkpoint), dtype, quantization, progress);
  device_loop_ = make_device_loop(spec_, *model_);
}

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

namespace {

// What the released d2Cache harness does not have, or does in a way that is not reproduced.
void check_quirks(const std::vector<std::vector<int32_t>>& prompts, const GenerationConfig& config,
                  const GenerateOptions& options) {
  if (options.infill) fail<ConfigError>("infill with reference_quirks is not allowed: the released harness has none");
  for (size_t i = 1; i < prompts.size(); ++i)
    if (config.cache == CacheKind::D2 && options.batch_size > 1 && prompts[i].size() != prompts[0].size())
      fail<ConfigError>("reference_quirks with cache d2 runs batches of equal lengths only, prompt ", i, " has ",
                        prompts[i].size(), " tokens and prompt 0 has ", prompts[0].size(), "; use batch_size = 1");
}

// The statistics pass over rows that are already filtered.
ops::RowStatsParams filtered_params(const GenerationConfig& config, const ModelSpec& spec) {
  ops::RowStatsParams p = stats_params(config, spec);
  p.banned_id = -1;
  p.temperature = 1.0f;
  return p;
}

}  // namespace

std::vector<Result> Engine::generate(const std::vector<std::vector<int32_t>>& prompts, const GenerationConfig& config,
                                     const GenerateOptions& options) {
  config.validate();
  config.validate_for(spec_.vocab_size, spec_.n_layers);
  if (options.batch_size < 1)
    fail<ConfigError>("batch_size = ", options.batch_size, " is not allowed: it must be at least 1");
  for (size_t i = 0; i < prompts.size(); ++i) check_prompt(i, prompts[i], config, options.infill);
  if (config.reference_quirks) check_quirks(prompts, config, options);
  const Exclusive exclusive(*this, "generate");
  if (device_loop_ && device_loop_->supports(config)) return device_loop_->generate(prompts, config, options);

  // The released d2Cache pads rows to the largest sequence of a fixed batch, whose blocks begin together.
  const bool fixed_groups = config.reference_quirks && config.cache == CacheKind::D2;
  std::vector<Result> results(prompts.size());
  std::vector<std::unique_ptr<Sequence>> running;
  size_t next = 0;
  bytes_taken_ = buffers_taken().bytes;
  while (next < prompts.size() || !running.empty()) {
    if ((!fixed_groups || running.empty()) && next < prompts.size()) {
      for (; next < prompts.size() && int64_t(running.size()) < options.batch_size; ++next)
        running.push_back(
            std::make_unique<Sequence>(int64_t(next), prompts[next], options.infill, config, spec_, *model_));
      StepSize most;
      for (const auto& s : running) most.add(s->largest_step());
      reserve(most, config);
    }
    std::erase_if(running, [&](const std::unique_ptr<Sequence>& s) {
      const bool finished = !s->advance();
      if (finished) results[size_t(s->index())] = s->take_result();
      return finished;
    });
    if (running.empty()) continue;
    int64_t block = running[0]->block();
    for (const auto& s : running) block = std::min(block, s->block());
    active_.clear();
    for (const auto& s : running)
      if (!fixed_groups || s->block() == block) active_.push_back(s.get());
    step(config, options);
  }
  return results;
}

// Memory for every step until another sequence begins: the steps themselves take none.
void Engine::reserve(const StepSize& most, const GenerationConfig& config) {
  model_->reserve(most);
  input_.reserve(most);
  active_.reserve(size_t(most.sequences));
  policies_.reserve(size_t(most.sequences));
  plans_.reserve(size_t(most.sequences));
  keys_.reserve(size_t(most.out_rows));
  stats_.reserve(size_t(most.out_rows));
  if (!config.reference_quirks) return;
  blank_stats_.reserve(size_t(most.out_rows));
  blank_logits_.assign(size_t(spec_.vocab_size), 0.0f);
  filter_row(blank_logits_.data(), spec_.vocab_size, config, stats_params(config, spec_));
}

void Engine::step(const GenerationConfig& config, const GenerateOptions& options) {
  if (options.interrupt && *options.interrupt) fail<Interrupted>("generation was interrupted");
  const auto begin = Clock::now();
  input_.clear();
  policies_.clear();
  plans_.clear();
  for (Sequence* s : active_) {
    plans_.push_back(&s->plan_step());
    policies_.push_back(&s->policy());
  }
  policies_[0]->plan_together(policies_, plans_);
  for (Sequence* s : active_) s->append_rows(input_);
  evaluate(config);
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  const int64_t taken = buffers_taken().bytes, new_bytes = taken - std::exchange(bytes_taken_, taken);

  size_t stream = 0;  // this sequence's first entry of input_.sequences
  const ops::RowStats *reads = stats_.data(), *blanks = blank_stats_.data();
  for (Sequence* s : active_) {
    StepStats counters;
    counters.seconds = seconds;
    counters.buffer_bytes = new_bytes;
    counters.weight_bytes = model_->weight_bytes();
    counters.logit_rows = int64_t(s->reads().size()) * s->evaluated_streams();
    const std::span<const float> importance =
        input_.sequences[stream].importance ? model_->importance(stream) : std::span<const float>();
    for (int64_t i = 0; i < s->evaluated_streams(); ++i, ++stream) {
      const auto& q = input_.sequences[stream];
      const StepWork& work = model_->work(stream);
      counters.rows += q.row_end - q.row_begin;
      counters.layer_rows += work.layer_rows;
      counters.verify_rows += work.verify_rows;
      counters.selection_seconds += work.selection_seconds;
      counters.attention_pairs += work.attention_pairs;
    }
    const StepEvent& event = s->commit(reads, blanks, importance, counters);
    reads += s->reads().size();
    blanks += s->blanks().size();
    if (options.on_step && !options.on_step(event)) fail<Interrupted>("on_step asked to stop the generation");
  }
  policies_[0]->observe_together(policies_);
}

// Statistics of every active sequence's reads, in order, then of its blanks.
void Engine::evaluate(const GenerationConfig& config) {
  keys_.clear();
  for (const Sequence* s : active_)
    for (int32_t p : s->reads()) keys_.push_back(s->key(p));
  stats_.resize(keys_.size());
  model_->forward(input_);
  if (config.needs_logits())
    combine_logits(config);
  else
    model_->row_stats(stats_params(config, spec_), keys_.data(), stats_.data());
  require_finite();
  if (config.reference_quirks) fill_blanks(config);
}

// The path with whole logits rows: guidance, then filters, then the same statistics.
void Engine::combine_logits(const GenerationConfig& config) {
  const ops::RowStatsParams params = stats_params(config, spec_), filtered = filtered_params(config, spec_);
  const int64_t vocab = spec_.vocab_size;
  int64_t ld = 0;
  float* logits = model_->logits(ld);
  ops::RowStats* out = stats_.data();
  const NoiseKey* keys = keys_.data();
  for (Sequence* s : active_) {
    const int64_t n = int64_t(s->reads().size());
    parallel_for(n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* row = logits + r * ld;
        const int32_t position = s->reads()[size_t(r)];
        if (config.cfg_scale > 0) s->guide(position, row, row + n * ld);
        filter_row(row, vocab, config, params);
        ops::row_stats(row, 1, vocab, ld, filtered, keys + r, out + r);
        s->note_distribution(position, row, out[r].log_sum_exp);
      }
    });
    logits += n * s->evaluated_streams() * ld;
    keys += n;
    out += n;
  }
}

// reference_quirks: positions that were not computed count as logits of zero.
void Engine::fill_blanks(const GenerationConfig& config) {
  const float* row = blank_logits_.data();
  const ops::RowStatsParams params = filtered_params(config, spec_);
  blank_stats_.clear();
  for (Sequence* s : active_)
    for (int32_t p : s->blanks()) {
      const NoiseKey key = s->key(p);
      ops::RowStats stats;
      if (blank_stats_.empty() || config.temperature > 0)
        ops::row_stats(row, 1, spec_.vocab_size, spec_.vocab_size, params, &key, &stats);
      else
        stats = blank_stats_.back();  // without noise they are all alike
      blank_stats_.push_back(stats);
      s->note_distribution(p, row, stats.log_sum_exp);
    }
}

// A NaN or an infinity must not be decoded as if it were an answer, nor choose rows. The failed step is run once more with
// checks between the layers, to find where it began: the rows it writes hold the same values, or, where kept values are
// compared (dLLM-Cache), values that are not finite either.
void Engine::require_finite() {
  bool ok = std::all_of(stats_.begin(), stats_.end(), [](const ops::RowStats& s) { return s.finite; });
  for (size_t i = 0; i < input_.sequences.size(); ++i)
    if (input_.sequences[i].importance)
      for (float c : model_->importance(i)) ok = ok && std::isfinite(c);
  if (ok) return;
  const std::string where = "at step " + std::to_string(active_[0]->step()) + ": ";
  try {
    model_->forward(input_, /*check_finite=*/true);
  } catch (const NumericalError& e) {
    fail<NumericalError>("the logits are not finite ", where, e.what());
  }
  fail<NumericalError>("the logits are not finite ", where, "every layer's output is finite, the LM head's is not");
}

}  // namespace dllm
