#include "engine/sequence.h"

#include <algorithm>

#include "decode/filters.h"
#include "runtime/stopwatch.h"

namespace dllm {

namespace {
double seconds_since(std::chrono::steady_clock::time_point t) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
}
}  // namespace

Sequence::Sequence(int64_t index, const std::vector<int32_t>& prompt, bool infill, const GenerationConfig& config,
                   const ModelSpec& spec, const Model& model)
    : index_(index), config_(config), rules_(rules_of(config, spec)), spec_(spec),
      policy_(make_cache_policy(config, spec)), started_(std::chrono::steady_clock::now()) {
  const int64_t length = int64_t(prompt.size()) + config.gen_length;
  canvas_.prompt_length = int32_t(prompt.size());
  canvas_.tokens = prompt;
  canvas_.tokens.resize(size_t(length), spec.mask_id);
  canvas_.editable = Bitmap(length);
  for (int32_t p = 0; p < length; ++p)
    if (p >= canvas_.prompt_length || (infill && prompt[size_t(p)] == spec.mask_id)) canvas_.editable.set(p);
  canvas_.masked = canvas_.editable;
  commit_step_.assign(size_t(length), -1);
  first_stop_ = int32_t(length);
  const DType dtype = model.info().dtype;
  for (int i = 0; i < (config.cfg_scale > 0 ? 2 : 1); ++i) {
    Stream& s = streams_.emplace_back();
    s.kv = KvCache(spec, dtype, length, model.device());
    if (config.cache == CacheKind::DLLM) s.features = FeatureCache(spec, dtype, length, model.device());
  }
  if (config.dllm.cfg_interval_steps > 1) guidance_.resize(size_t(length));
  if (config.kl_threshold) history_.emplace(length, config.kl_history_length, config.reference_quirks);
  if (config.prior_sigma() > 0) prior_.emplace(canvas_.editable, config.prior_sigma());
  reserve();
}

// What else a step needs, the policy and the transformer aside, is as large in the first step as it ever gets.
void Sequence::reserve() {
  const auto editable = size_t(canvas_.editable.count());
  for (std::vector<int32_t>* list :
       {&block_positions_, &eligible_, &reads_, &blanks_, &event_.positions, &event_.token_ids})
    list->reserve(editable);
  event_.confidences.reserve(editable);
  event_.computed.reserve(size_t(canvas_.length()));
  proposals_.reserve(editable);
  committed_.reserve(editable);
  scores_.reserve(editable);
  result_.prompt_ids.reserve(size_t(canvas_.prompt_length));
  result_.token_ids.reserve(size_t(config_.gen_length));
  result_.commit_steps.reserve(size_t(config_.gen_length));
  // A step commits something, or its schedule says that it need not. Millions of steps may be asked for: beyond some
  // thousands the list grows by doubling.
  constexpr size_t kMostSteps = 1 << 14;
  result_.steps.reserve(std::min(editable + size_t(config_.steps.value_or(0)), kMostSteps));
}

// Whether a step reads the logits of every masked position that it computes, not only of those that it may commit.
bool Sequence::reads_every_mask() const {
  return policy_->wants_all_scores() || history_ || (!guidance_.empty() && evaluated_ == 2);
}

StepSize Sequence::largest_step() const {
  const int64_t length = canvas_.length(), editable = canvas_.editable.count(), streams = int64_t(streams_.size());
  const int64_t given = editable - config_.gen_length;  // infills of the prompt, which the first block owns
  const bool all = reads_every_mask() || !guidance_.empty();
  const int64_t reads = all ? editable : std::min(editable, given + config_.block_length);
  return {.rows = length * streams,
          .out_rows = reads * streams,
          .sequences = streams,
          .keys = length,
          .logits = config_.needs_logits(),
          .features = config_.cache == CacheKind::DLLM,
          .importance = config_.cache == CacheKind::D2};
}

bool Sequence::advance() {
  for (;;) {
    if (block_ >= 0) {
      find_eligible();
      if (!eligible_.empty()) return true;
      if (block_ == 0) result_.seconds_first_block = seconds_since(started_);
    }
    if (block_ + 1 >= config_.num_blocks()) return false;
    begin_block();
  }
}

void Sequence::begin_block() {
  ++block_;
  const int64_t begin = canvas_.prompt_length + block_ * config_.block_length;
  block_begin_ = int32_t(std::min<int64_t>(begin, canvas_.length()));
  const int32_t end = int32_t(std::min<int64_t>(begin + config_.block_length, canvas_.length()));
  block_positions_.clear();
  if (block_ == 0)
    for (int32_t p = 0; p < canvas_.prompt_length; ++p)
      if (canvas_.editable.test(p)) block_positions_.push_back(p);
  for (int32_t p = block_begin_; p < end; ++p) block_positions_.push_back(p);
  at_.step_in_block = 0;
  at_.masked_at_start = std::count_if(block_positions_.begin(), block_positions_.end(),
                                      [&](int32_t p) { return canvas_.masked.test(p); });
}

// Nothing after the first committed stop id can change the text, so it is not decoded (stop_at_eos).
void Sequence::find_eligible() {
  eligible_.clear();
  for (int32_t p : block_positions_)
    if (canvas_.masked.test(p) && p < first_stop_) eligible_.push_back(p);
  at_.eligible = int64_t(eligible_.size());
}

SequenceView Sequence::view_of(const StepPosition& at) const {
  return {canvas_.prompt_length, config_.block_length, canvas_.editable,
          canvas_.masked,        first_stop_,          {block_positions_, block_begin_, at.step_in_block},
          int64_t(at.step)};
}

bool Sequence::is_computed(int32_t position) const {
  const std::vector<int32_t>& rows = streams_[0].plan.rows;
  return std::binary_search(rows.begin(), rows.end(), position - spec_.logit_shift);
}

StepPlan& Sequence::plan_step() {
  selection_seconds_ = 0;
  const Stopwatch watch(selection_seconds_);
  // dLLM-Cache keeps the guidance difference; its released code evaluates it at the first five steps too.
  const int64_t interval = config_.dllm.cfg_interval_steps;
  const bool guided = at_.step < 5 || at_.step % interval == 0;
  evaluated_ = guided ? int64_t(streams_.size()) : 1;
  for (int64_t i = 0; i < evaluated_; ++i) policy_->plan(view_of(at_), int(i), streams_[size_t(i)].plan);
  if (prior_) density_ = prior_->of(canvas_.masked);
  return streams_[0].plan;
}

bool Sequence::computes_everything() const {
  const StepPlan& plan = streams_[0].plan;
  const FeatureStep& f = plan.features;
  return int32_t(plan.rows.size()) == canvas_.length() &&
         std::all_of(f.layers.begin(), f.layers.end(), [&](const FeatureStep::Refresh& r) {
           return (r.prompt || f.prompt_rows.empty()) && (r.response || f.response_rows.empty());
         });
}

void Sequence::append_rows(StepInput& in) {
  reads_.clear();
  blanks_.clear();
  const auto read = [&](int32_t p) {
    if (is_computed(p))
      reads_.push_back(p);
    else if (config_.reference_quirks && (history_ || std::binary_search(eligible_.begin(), eligible_.end(), p)))
      blanks_.push_back(p);
  };
  if (reads_every_mask())
    canvas_.masked.for_each([&](int64_t p) {
      if (p < first_stop_ || config_.reference_quirks) read(int32_t(p));
    });
  else
    for (int32_t p : eligible_) read(p);
  if (!config_.reference_quirks) std::erase_if(eligible_, [&](int32_t p) { return !is_computed(p); });

  for (size_t i = 0; i < size_t(evaluated_); ++i) {
    const Stream& stream = streams_[i];
    const StepPlan& plan = stream.plan;
    const int64_t begin = int64_t(in.tokens.size());
    auto row = plan.rows.begin();
    for (int32_t p : reads_) {
      row = std::lower_bound(row, plan.rows.end(), p - spec_.logit_shift);
      in.out_rows.push_back(int32_t(begin + (row - plan.rows.begin())));
    }
    for (int32_t p : plan.rows) {
      const bool hidden = i == 1 && p < canvas_.prompt_length && !canvas_.editable.test(p);
      in.tokens.push_back(hidden ? spec_.mask_id : canvas_.tokens[size_t(p)]);
      in.positions.push_back(p);
    }
    in.sequences.push_back({begin, int64_t(in.tokens.size()), canvas_.length(), stream.kv.slabs(),
                            plan.importance && i == 0, plan.features.layers.empty() ? nullptr : &plan.features,
                            stream.features.slabs()});
  }
}

void Sequence::guide(int32_t position, float* cond, const float* uncond) {
  const int64_t vocab = spec_.vocab_size;
  const float scale = float(config_.cfg_scale);
  if (evaluated_ == 1) return apply_kept_guidance(cond, guidance_[size_t(position)].data(), vocab, scale);
  if (!guidance_.empty()) {
    std::vector<float>& kept = guidance_[size_t(position)];
    kept.resize(size_t(vocab));
    for (int64_t v = 0; v < vocab; ++v) kept[size_t(v)] = cond[v] - uncond[v];
  }
  apply_guidance(cond, uncond, vocab, scale);
}

void Sequence::note_distribution(int32_t position, const float* logits, double log_sum_exp) {
  if (history_) history_->update(position, logits, spec_.vocab_size, log_sum_exp);
}

void Sequence::note_stop(int32_t position, int32_t token) {
  if (!config_.stop_at_eos || position < canvas_.prompt_length) return;
  const auto end = config_.reference_quirks ? spec_.stop_ids.begin() + 1 : spec_.stop_ids.end();  // EOS only
  if (std::find(spec_.stop_ids.begin(), end, token) != end) first_stop_ = std::min(first_stop_, position);
}

void Sequence::propose_all(std::span<const int32_t> positions, const ops::RowStats* stats) {
  for (size_t i = 0; i < positions.size(); ++i) {
    const int32_t p = positions[i];
    const ScoreContext context{density_.empty() ? 1.0 : density_[size_t(p)], p - block_positions_.front()};
    proposals_.push_back(rules::propose(rules_, p, at_.step, stats[i], context));
    if (history_) proposals_.back().stable = history_->stable(p, *config_.kl_threshold);
  }
}

const StepEvent& Sequence::commit(const ops::RowStats* reads, const ops::RowStats* blanks,
                                  std::span<const float> importance, StepStats counters) {
  const StepPosition at_before = at_;
  proposals_.clear();
  scores_.clear();
  propose_all(reads_, reads);
  if (policy_->wants_all_scores())
    for (const Proposal& p : proposals_) scores_.push_back({p.position, rules::certainty(rules_, p.confidence)});
  propose_all(blanks_, blanks);
  if (!blanks_.empty())
    std::sort(proposals_.begin(), proposals_.end(),
              [](const Proposal& a, const Proposal& b) { return a.position < b.position; });
  std::erase_if(proposals_,
                [&](const Proposal& p) { return !std::binary_search(eligible_.begin(), eligible_.end(), p.position); });

  committed_.clear();
  for (int32_t i : selector_.select(rules_, at_, proposals_)) {
    const Proposal& p = proposals_[size_t(i)];
    committed_.push_back({p.position, p.token, float(p.confidence)});
  }
  counters.selection_seconds += selection_seconds_;
  const std::vector<int32_t>& rows = streams_[0].plan.rows;
  apply(committed_, int64_t(rows.size()), rows, computes_everything(), counters);
  policy_->observe(view_of(at_before), {scores_, eligible_, event_.positions, importance});
  return event_;
}

const StepEvent& Sequence::apply(std::span<const Committed> committed, int64_t rows, std::span<const int32_t> computed,
                                 bool is_full, StepStats counters) {
  event_.sequence = index_;
  event_.step = int64_t(at_.step);
  event_.block = block_;
  event_.positions.clear();
  event_.token_ids.clear();
  event_.confidences.clear();
  event_.rows = rows;
  event_.computed.assign(computed.begin(), computed.end());
  event_.is_full = is_full;
  for (const Committed& c : committed) {
    canvas_.tokens[size_t(c.position)] = c.token;
    canvas_.masked.reset(c.position);
    commit_step_[size_t(c.position)] = int64_t(at_.step);
    note_stop(c.position, c.token);
    if (history_) history_->forget(c.position);
    if (!guidance_.empty()) guidance_[size_t(c.position)] = {};
    event_.positions.push_back(c.position);
    event_.token_ids.push_back(c.token);
    event_.confidences.push_back(c.confidence);
  }
  counters.commits = int64_t(committed.size());
  result_.steps.push_back(counters);
  result_.nfe += evaluated_;
  ++at_.step;
  ++at_.step_in_block;
  return event_;
}

Result Sequence::take_result() {
  const auto generated = canvas_.tokens.begin() + canvas_.prompt_length;
  result_.prompt_ids.assign(canvas_.tokens.begin(), generated);
  result_.token_ids.assign(generated, canvas_.tokens.end());
  result_.commit_steps.assign(commit_step_.begin() + canvas_.prompt_length, commit_step_.end());
  for (int64_t i = int64_t(first_stop_) - canvas_.prompt_length + 1; i < int64_t(result_.token_ids.size()); ++i) {
    result_.token_ids[size_t(i)] = spec_.eos_id;
    result_.commit_steps[size_t(i)] = -1;
  }
  result_.seconds_total = seconds_since(started_);
  return std::move(result_);
}

}  // namespace dllm
