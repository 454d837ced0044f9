#include "engine/cuda/device_loop.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "runtime/error.h"

namespace dllm {

namespace {

constexpr size_t kRings = 2;  // one step under way, one being read
constexpr size_t kMostGraphs = 64;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Capacities are rounded up, so that few shapes, and few graphs, serve all row counts.
int32_t bucket(int32_t rows, int32_t most) {
  const int32_t to = rows <= 64 ? 16 : rows <= 256 ? 32 : rows <= 1024 ? 64 : 256;
  return std::min((rows + to - 1) / to * to, most);
}

}  // namespace

std::unique_ptr<Loop> make_device_loop(const ModelSpec& spec, Model& model) {
  if (model.device().is_cpu()) return nullptr;
  return std::make_unique<DeviceLoop>(spec, static_cast<CudaModel&>(model));
}

// However generate() ends, nothing that is under way outlives the memory it works on.
DeviceLoop::Cleanup::~Cleanup() {
  try {
    loop.device_.synchronize();
  } catch (const Error&) {  // it was reported where it happened
  }
  loop.flights_.clear();
  loop.slots_.clear();
}

DeviceLoop::DeviceLoop(const ModelSpec& spec, CudaModel& model) : spec_(spec), model_(model), device_(model.device()) {
  const char* setting = std::getenv("DLLM_CUDA_GRAPHS");
  uses_graphs_ = !setting || std::string(setting) != "0";
}

bool DeviceLoop::supports(const GenerationConfig& config) const {
  return !config.needs_logits() && !config.reference_quirks;
}

std::vector<Result> DeviceLoop::generate(const std::vector<std::vector<int32_t>>& prompts,
                                         const GenerationConfig& config, const GenerateOptions& options) {
  const Cleanup cleanup{*this};
  prepare(prompts, config, options);
  std::vector<Result> results(prompts.size());
  size_t next = 0;
  last_completion_ = now();
  const auto fill = [&] {
    for (size_t s = 0; s < slots_.size(); ++s)
      while (!slots_[s].sequence && next < prompts.size()) {
        auto sequence = std::make_unique<Sequence>(int64_t(next), prompts[next], options.infill, config, spec_, model_);
        if (sequence->advance())
          admit(s, std::move(sequence));
        else  // nothing to decide
          results[next] = sequence->take_result();
        ++next;
      }
  };
  fill();
  for (;;) {
    if (options.interrupt && *options.interrupt) fail<Interrupted>("generation was interrupted");
    const size_t before = flights_.size();
    submit(options);
    const bool idle = flights_.size() == before;
    if (flights_.empty()) break;
    if (idle || flights_.size() == kRings) complete(options, results);
    fill();
  }
  return results;
}

// --- A batch begins -----------------------------------------------------------------------------------------------------

void DeviceLoop::prepare(const std::vector<std::vector<int32_t>>& prompts, const GenerationConfig& config,
                         const GenerateOptions& options) {
  config_ = &config;
  params_ = stats_params(config, spec_);
  flights_.clear();
  demanded_.reset();
  slots_.clear();
  slots_.resize(std::min(size_t(options.batch_size), prompts.size()));
  always_refresh_.assign(size_t(spec_.n_layers), 0);
  for (int64_t layer : config.dllm.always_refresh_layers) always_refresh_[size_t(layer)] = 1;

  // As much as the largest sequences need at a time.
  std::vector<int64_t> lengths;
  int64_t infills = 0;
  for (const std::vector<int32_t>& p : prompts) {
    lengths.push_back(int64_t(p.size()) + config.gen_length);
    if (options.infill) infills = std::max<int64_t>(infills, std::count(p.begin(), p.end(), spec_.mask_id));
  }
  std::sort(lengths.rbegin(), lengths.rend());
  StepSize most;
  const int64_t reads =
      config.cache == CacheKind::D2 ? config.gen_length : std::min(config.gen_length, config.block_length);
  for (size_t s = 0; s < slots_.size(); ++s)
    most.add({.rows = lengths[s],
              .out_rows = reads + infills,
              .sequences = 1,
              .keys = lengths[0],
              .features = config.cache == CacheKind::DLLM,
              .importance = config.cache == CacheKind::D2});
  model_.reserve(most);

  LoopSize size{int32_t(slots_.size()), int32_t(lengths.empty() ? 0 : lengths[0]), int32_t(reads + infills),
                int32_t(spec_.n_layers)};
  if (size != size_) {
    device_.synchronize();
    graphs_.clear();
    size_ = {};
    memory_buffer_ = DeviceBuffer();
    memory_buffer_ = DeviceBuffer(device_, LoopMemory::at(nullptr, size).bytes, "the loop's state");
    memory_ = LoopMemory::at(memory_buffer_.as(), size);
    records_ = {};
    records_ = Pinned<cuda::StepRecord>(device_, kRings * slots_.size(), "step records");
    committed_ = {};
    committed_ = Pinned<cuda::CommittedToken>(device_, kRings * slots_.size() * size_t(size.reads), "step records");
    computed_ = {};
    computed_ = Pinned<int32_t>(device_, kRings * slots_.size() * size_t(size.length), "step records");
    size_ = size;
  }
  device_.fill_zero(memory_.states, slots_.size() * sizeof(cuda::SequenceState));  // no slot is active
  Rules rules = rules_of(config, spec_);
  if (rules.token_frequencies) {
    frequencies_ = DeviceBuffer(device_, config.token_frequencies.size() * sizeof(double), "token_frequencies");
    device_.copy_in(frequencies_.as(), rules.token_frequencies, frequencies_.bytes());
    rules.token_frequencies = frequencies_.as<double>();
  }
  device_.copy_in(memory_.rules, &rules, sizeof rules);
  device_.copy_in(memory_.always_refresh, always_refresh_.data(), always_refresh_.size());
  const size_t strides = size_t(spec_.n_layers) * size_t(model_.max_sequences());
  slabs_.assign(strides, {});
  attention_features_.assign(strides, nullptr);
  mlp_features_.assign(strides, nullptr);
}

void DeviceLoop::admit(size_t index, std::unique_ptr<Sequence> sequence) {
  Slot& slot = slots_[index];
  slot.block.begin("block");
  const Canvas& canvas = sequence->canvas();
  const int32_t length = canvas.length();
  // For the longest at once: a step under way may still read what the slot's last sequence had.
  if (!slot.memory.bytes())
    slot.memory = DeviceBuffer(device_, SlotMemory::at(nullptr, size_.length).bytes, "a sequence's state");
  const size_t bytes = SlotMemory::at(nullptr, length).bytes;
  std::vector<char> staged(bytes);
  SlotMemory host = SlotMemory::at(staged.data(), length), memory = SlotMemory::at(slot.memory.as(), length);
  cuda::SequenceState state{};
  state.active = 1;
  state.length = length;
  state.prompt_length = canvas.prompt_length;
  state.first_editable = length;
  state.n_blocks = int32_t(config_->num_blocks());
  state.block_length = int32_t(std::min<int64_t>(config_->block_length, length));
  state.tokens = memory.tokens;
  state.flags = memory.flags;
  state.block = -1;
  state.first_stop = length;
  std::copy(canvas.tokens.begin(), canvas.tokens.end(), host.tokens);
  for (int32_t p = 0; p < length; ++p) {
    host.flags[p] = canvas.editable.test(p) ? cuda::kEditable | cuda::kMasked : 0;
    state.editable_count += canvas.editable.test(p);
    if (canvas.editable.test(p)) state.first_editable = std::min(state.first_editable, p);
  }
  const auto density = [&](double sigma, double* phi, double* tail) {
    const CertaintyDensity d(canvas.editable, sigma);
    std::copy(d.phi().begin(), d.phi().end(), phi);
    std::copy(d.tail().begin(), d.tail().end(), tail);
  };
  if (config_->prior_sigma() > 0) {
    density(config_->prior_sigma(), host.prior_phi, host.prior_tail);
    state.prior = memory.prior;
  }
  if (config_->cache == CacheKind::D2) {
    density(config_->d2.sigma, host.d2_phi, host.d2_tail);
    state.d2 = memory.d2;
    state.certainty = memory.certainty;
    state.importance = memory.importance;
  }
  device_.copy_in(slot.memory.as(), staged.data(), bytes);
  device_.copy_in(memory_.states + index, &state, sizeof state);

  const StepMemory& step = model_.memory();
  const size_t stride = size_t(model_.max_sequences());
  const auto kv = sequence->slabs();
  const auto features = sequence->feature_slabs();
  for (size_t l = 0; l < size_t(spec_.n_layers); ++l) {
    slabs_[l * stride + index] = {kv[l].k, kv[l].v, int32_t(kv[l].capacity)};
    if (features.empty()) continue;
    attention_features_[l * stride + index] = features[l].attention.data;
    mlp_features_[l * stride + index] = features[l].mlp.data;
  }
  device_.copy_in(step.slabs, slabs_.data(), slabs_.size() * sizeof(slabs_[0]));
  if (!features.empty()) {
    device_.copy_in(step.attention_features, attention_features_.data(), attention_features_.size() * sizeof(void*));
    device_.copy_in(step.mlp_features, mlp_features_.data(), mlp_features_.size() * sizeof(void*));
  }
  slot.blocks = state.n_blocks;
  slot.first_editable = state.first_editable;
  slot.rows = length;
  slot.sequence = std::move(sequence);
}

// --- What the next step needs, as far as the host can know ------------------------------------------------------------------

// Where a sequence is after one more step: in the same block, unless the step is bound to finish it.
DeviceLoop::Place DeviceLoop::after(const Slot& slot, Place place) const {
  const bool certain = config_->rule() != TransferRule::Steps && config_->remasking != Remasking::Origin;
  ++place.step;
  ++place.step_in_block;
  place.eligible -= certain ? config_->min_transfer() : 0;
  if (place.eligible > 0) return place;
  ++place.block;
  place.step_in_block = 0;
  place.eligible = place.block < slot.blocks ? config_->block_length : 0;
  return place;
}

cuda::StepNeeds DeviceLoop::needs_of(const Slot& slot, const Place& at) const {
  const Canvas& canvas = slot.sequence->canvas();
  const int32_t length = canvas.length(), prompt = canvas.prompt_length, shift = spec_.logit_shift;
  const int64_t block_length = config_->block_length;
  const int32_t begin = int32_t(std::min<int64_t>(prompt + at.block * block_length, length));
  const int32_t end = int32_t(std::min<int64_t>(begin + block_length, length));
  int32_t infills = 0;  // positions of the prompt that are filled
  for (int32_t p = slot.first_editable; p < prompt; ++p) infills += canvas.editable.test(p);
  const int32_t here = end - begin + (at.block == 0 ? infills : 0);
  const int32_t editable = length - prompt + infills;
  cuda::StepNeeds n{length, here, 0, 0};
  const bool first = at.step_in_block == 0;
  switch (config_->cache) {
    case CacheKind::None:
      break;
    case CacheKind::Prefix:
      if (!first) n.rows = std::min(length, length - begin + shift + (at.block == 0 ? infills * (1 + shift) : 0));
      break;
    case CacheKind::Dual:
      if (!first) n.rows = here;
      break;
    case CacheKind::DLLM: {
      const DLLMCacheConfig& c = config_->dllm;
      const bool refresh_prompt = at.step % c.kp == 0, refresh_response = at.step % c.kr == 0;
      const bool after_first =
          refresh_prompt ? spec_.n_layers > 1
                         : std::any_of(always_refresh_.begin() + 1, always_refresh_.end(), [](uint8_t x) { return x; });
      if (at.step > 0 && !after_first) n.rows = std::min(length, editable + shift * (1 + infills));
      const bool verifies = c.rou > 0 && !refresh_response;
      n.live = (refresh_prompt ? n.rows - editable : 0) + (refresh_response ? editable
                                                           : verifies       ? int32_t(c.rou * double(editable))
                                                                            : 0);
      n.verified = verifies ? editable : 0;
      break;
    }
    case CacheKind::D2:
      // Room for a quarter more than the last step took: the nucleus changes slowly.
      if (at.step == 1) n.rows = std::min(length, int32_t(std::min<int64_t>(2 * config_->d2.current_k, length)));
      if (at.step > 1) n.rows = std::min(length, slot.rows + slot.rows / 4);
      n.reads = std::min(n.rows, editable);
      break;
  }
  return n;
}

// Of the sequences that still have something to decide.
cuda::StepNeeds DeviceLoop::needs_at(const std::vector<std::optional<Place>>& places) const {
  cuda::StepNeeds sum{};
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (!places[s] || places[s]->eligible == 0) continue;
    const cuda::StepNeeds n = needs_of(slots_[s], *places[s]);
    sum.rows += n.rows;
    sum.reads += n.reads;
    sum.live += n.live;
    sum.verified += n.verified;
  }
  return sum;
}

// After the steps under way, of which those will do nothing that do not fit.
cuda::StepNeeds DeviceLoop::expected_needs() const {
  std::vector<std::optional<Place>> places(slots_.size());
  for (size_t s = 0; s < slots_.size(); ++s)
    if (const Sequence* q = slots_[s].sequence.get())
      places[s] = Place{q->block(), q->step(), q->step_in_block(), q->eligible()};
  for (const Flight& flight : flights_) {
    auto then = places;
    for (size_t s = 0; s < slots_.size(); ++s)
      if (flight.sequences[s] != slots_[s].sequence.get()) then[s].reset();  // it began later
    if (!needs_at(then).fits(flight.limits)) continue;
    for (size_t s = 0; s < slots_.size(); ++s)
      if (then[s] && then[s]->eligible > 0) places[s] = after(slots_[s], *then[s]);
  }
  return needs_at(places);
}

StepShape DeviceLoop::shape_of(const cuda::StepNeeds& limits) const {
  StepShape shape{limits.rows, limits.reads, int32_t(slots_.size()), size_.length, config_->cache == CacheKind::D2, {}};
  if (config_->cache == CacheKind::DLLM)
    for (uint8_t always : always_refresh_)
      shape.layers.push_back(always ? StepShape::Layer{limits.rows, 0}
                                    : StepShape::Layer{limits.live, limits.verified});
  return shape;
}

// --- Steps ----------------------------------------------------------------------------------------------------------------

void DeviceLoop::submit(const GenerateOptions& options) {
  cuda::StepNeeds n = expected_needs();
  if (n.rows == 0) return;
  if (demanded_) {
    n.rows = std::max(n.rows, demanded_->rows);
    n.reads = std::max(n.reads, demanded_->reads);
    n.live = std::max(n.live, demanded_->live);
    n.verified = std::max(n.verified, demanded_->verified);
  }
  const int32_t most = model_.max_rows();
  const cuda::StepNeeds limits{bucket(n.rows, most), bucket(n.reads, model_.max_out_rows()), bucket(n.live, most),
                               bucket(n.verified, most)};
  Flight flight{0, next_ring_, shape_of(limits), limits, {}, {}};
  next_ring_ = (next_ring_ + 1) % kRings;
  run_or_replay(flight.shape, limits);
  const size_t first = flight.ring * slots_.size();
  device_.copy_out(records_.data() + first, memory_.commit.records, slots_.size() * sizeof(cuda::StepRecord));
  device_.copy_out(committed_.data() + first * size_t(size_.reads), memory_.commit.committed,
                   slots_.size() * size_t(size_.reads) * sizeof(cuda::CommittedToken));
  if (options.on_step)
    device_.copy_out(computed_.data() + first * size_t(size_.length), memory_.plan.rows,
                     slots_.size() * size_t(size_.length) * sizeof(int32_t));
  flight.mark = device_.mark();
  for (const Slot& slot : slots_) flight.sequences.push_back(slot.sequence.get());
  flights_.push_back(std::move(flight));
}

// The plan of every sequence's next step, packed if it fits.
void DeviceLoop::launch_plan(const cuda::StepNeeds& limits) {
  const NvtxRange range("plan");
  cuda::PlanArgs plan = memory_.plan;
  plan.states = memory_.states;
  plan.sequences = int32_t(slots_.size());
  plan.cache = config_->cache;
  plan.shift = spec_.logit_shift;
  plan.seed = config_->seed;
  plan.kp = config_->dllm.kp;
  plan.kr = config_->dllm.kr;
  plan.rou = config_->dllm.rou;
  plan.always_refresh = memory_.always_refresh;
  plan.layers = spec_.n_layers;
  plan.rollout_p = config_->d2.rollout_p;
  plan.current_k = config_->d2.current_k;
  plan.inflate_w = config_->d2.inflate_w;
  plan.max_length = size_.length;
  cuda::plan_step(device_.stream(), plan);
  cuda::pack_step(device_.stream(), {plan, model_.memory(), model_.max_sequences(), limits, memory_.commit.records});
}

void DeviceLoop::launch_commit() {
  const NvtxRange range("commit");
  cuda::CommitArgs commit = memory_.commit;
  commit.states = memory_.states;
  commit.sequences = int32_t(slots_.size());
  commit.rules = memory_.rules;
  commit.stats = model_.stats();
  commit.reads = memory_.plan.reads;
  commit.read_count = memory_.plan.read_count;
  commit.max_length = size_.length;
  commit.max_reads = size_.reads;
  if (config_->cache == CacheKind::D2) {
    commit.importance = model_.importance_on_device();
    commit.importance_ld = model_.importance_stride();
  }
  cuda::commit_step(device_.stream(), commit);
}

void DeviceLoop::launch(const StepShape& shape, const cuda::StepNeeds& limits) {
  launch_plan(limits);
  model_.run_layers(shape);
  model_.head_stats(shape, params_);
  launch_commit();
}

void DeviceLoop::run_or_replay(const StepShape& shape, const cuda::StepNeeds& limits) {
  const NvtxRange range("step");
  if (!uses_graphs_) return launch(shape, limits);
  const auto same = [&](const CachedGraph& g) {
    return g.shape == shape && g.limits == limits && g.generation == model_.generation() && g.config == launch_config();
  };
  const auto known = std::find_if(graphs_.begin(), graphs_.end(), same);
  if (known == graphs_.end()) {
    if (graphs_.size() == kMostGraphs) graphs_.erase(graphs_.begin());
    graphs_.push_back({shape, limits, launch_config(), model_.generation(), nullptr});
    return launch(shape, limits);
  }
  if (!known->graph) known->graph = device_.capture([&] { launch(shape, limits); });
  device_.replay(*known->graph);
}

// What of a call's settings is baked into launches, beside shapes.
DeviceLoop::LaunchConfig DeviceLoop::launch_config() const {
  return {params_, config_->seed, config_->cache, config_->dllm, config_->d2};
}

void DeviceLoop::complete(const GenerateOptions& options, std::vector<Result>& results) {
  const Flight flight = std::move(flights_.front());
  flights_.pop_front();
  device_.wait(flight.mark);
  const double time = now(), seconds = time - std::exchange(last_completion_, time);
  demanded_.reset();
  for (size_t s = 0; s < slots_.size(); ++s) {
    Slot& slot = slots_[s];
    if (!slot.sequence || flight.sequences[s] != slot.sequence.get()) continue;
    const cuda::StepRecord& r = records_[flight.ring * slots_.size() + s];
    if (!r.ran) {
      if (!r.needs.fits(flight.limits)) demanded_ = r.needs;
      continue;
    }
    if (r.step != slot.sequence->step() || r.block != slot.sequence->block())
      fail<Error>("the device ran step ", r.step, " in block ", r.block, " where the host expected step ",
                  slot.sequence->step(), " in block ", slot.sequence->block(), ": this is a bug of dllm_ext");
    if (!r.finite) report_not_finite(r.step);
    slot.rows = r.rows;
    const auto* tokens = committed_.data() + (flight.ring * slots_.size() + s) * size_t(size_.reads);
    std::vector<Sequence::Committed> committed;
    for (int32_t i = 0; i < r.committed; ++i)
      committed.push_back({tokens[i].position, tokens[i].token, tokens[i].confidence});
    std::span<const int32_t> computed;
    if (options.on_step)
      computed = {computed_.data() + (flight.ring * slots_.size() + s) * size_t(size_.length), size_t(r.rows)};
    const StepEvent& event =
        slot.sequence->apply(committed, r.rows, computed, is_full(slot, r), counters_of(slot, r, seconds));
    if (options.on_step && !options.on_step(event)) fail<Interrupted>("on_step asked to stop the generation");
    const bool more = slot.sequence->advance();
    if (more && slot.sequence->block() != r.block) slot.block.begin("block");
    if (more) continue;
    slot.block.end();
    results[size_t(slot.sequence->index())] = slot.sequence->take_result();
    if (!flights_.empty()) flights_.back().retired.push_back(std::move(slot.sequence));
    slot.sequence = nullptr;
  }
}

bool DeviceLoop::is_full(const Slot& slot, const cuda::StepRecord& r) const {
  if (r.rows != slot.sequence->canvas().length()) return false;
  if (config_->cache != CacheKind::DLLM) return true;
  const bool all = r.step % config_->dllm.kp == 0 && r.step % config_->dllm.kr == 0;
  return all || std::all_of(always_refresh_.begin(), always_refresh_.end(), [](uint8_t x) { return x; });
}

StepStats DeviceLoop::counters_of(const Slot& slot, const cuda::StepRecord& r, double seconds) const {
  StepStats c;
  c.seconds = seconds;
  c.rows = r.rows;
  c.logit_rows = r.reads;
  c.weight_bytes = (r.reads > 0 ? model_.head_weight_bytes() : 0) + model_.layer_weight_bytes();
  c.layer_rows = int64_t(spec_.n_layers) * r.rows;
  if (config_->cache == CacheKind::DLLM) {
    const DLLMCacheConfig& d = config_->dllm;
    const int64_t editable = slot.sequence->canvas().editable.count(), prompt = r.rows - editable;
    const bool verifies = d.rou > 0 && r.step % d.kr != 0;
    const int64_t chosen = verifies ? int64_t(d.rou * double(editable)) : 0;
    c.layer_rows = 0;
    for (uint8_t always : always_refresh_) {
      c.layer_rows += always ? r.rows : (r.step % d.kp == 0 ? prompt : 0) + (r.step % d.kr == 0 ? editable : chosen);
      if (!always && verifies) c.verify_rows += editable;
    }
  }
  c.attention_pairs = c.layer_rows * slot.sequence->canvas().length();
  return c;
}

// The sequence committed nothing, so its plan is the same again: the step is run once more, with room for whatever the others
// need by now and with checks between the layers, to find where it began.
void DeviceLoop::report_not_finite(int64_t step) {
  device_.synchronize();
  const std::string where = "at step " + std::to_string(step) + ": ";
  const cuda::StepNeeds limits{model_.max_rows(), model_.max_out_rows(), model_.max_rows(), model_.max_rows()};
  try {
    launch_plan(limits);
    model_.run_layers(shape_of(limits), /*check_finite=*/true);
  } catch (const NumericalError& e) {
    fail<NumericalError>("the logits are not finite ", where, e.what());
  }
  fail<NumericalError>("the logits are not finite ", where, "every layer's output is finite, the LM head's is not");
}

}  // namespace dllm
