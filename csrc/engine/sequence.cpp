#include "engine/sequence.h"

#include <algorithm>

#include "runtime/error.h"

namespace dllm {

namespace {
double seconds_since(std::chrono::steady_clock::time_point t) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
}
}  // namespace

Sequence::Sequence(int64_t index, const std::vector<int32_t>& prompt, bool infill, const GenerationConfig& config,
                   const ModelSpec& spec, DType dtype)
    : index_(index), config_(config), spec_(spec), policy_(make_cache_policy(config.cache)),
      started_(std::chrono::steady_clock::now()) {
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
  for (int i = 0; i < (config.cfg_scale > 0 ? 2 : 1); ++i) kv_.emplace_back(spec, dtype, length);
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
}

void Sequence::append_rows(StepInput& in) {
  policy_->plan(canvas_.length(), {block_positions_, block_begin_, at_.step_in_block}, spec_.logit_shift, plan_);
  for (size_t stream = 0; stream < kv_.size(); ++stream) {
    const int64_t begin = int64_t(in.tokens.size());
    size_t row = 0;
    for (int32_t p : eligible_) {
      row = size_t(std::lower_bound(plan_.rows.begin() + int64_t(row), plan_.rows.end(), p - spec_.logit_shift) -
                   plan_.rows.begin());
      in.out_rows.push_back(begin + int64_t(row));
    }
    for (int32_t p : plan_.rows) {
      const bool hidden = stream == 1 && p < canvas_.prompt_length && !canvas_.editable.test(p);
      in.tokens.push_back(hidden ? spec_.mask_id : canvas_.tokens[size_t(p)]);
      in.positions.push_back(p);
    }
    in.sequences.push_back({begin, int64_t(in.tokens.size()), canvas_.length(), kv_[stream].slabs()});
  }
}

void Sequence::append_keys(std::vector<NoiseKey>& keys) const {
  for (int32_t p : eligible_) keys.push_back({config_.seed, at_.step, uint32_t(p)});
}

void Sequence::note_stop(int32_t position, int32_t token) {
  if (!config_.stop_at_eos || position < canvas_.prompt_length) return;
  if (std::find(spec_.stop_ids.begin(), spec_.stop_ids.end(), token) != spec_.stop_ids.end())
    first_stop_ = std::min(first_stop_, position);
}

void Sequence::commit(const ops::RowStats* stats, StepStats counters, StepEvent& event) {
  std::vector<Proposal> proposals;
  for (size_t i = 0; i < eligible_.size(); ++i)
    proposals.push_back(propose(config_, spec_, eligible_[i], at_.step, stats[i]));

  const int64_t rows = int64_t(plan_.rows.size());
  event = {index_, int64_t(at_.step), block_, {}, {}, rows, rows == canvas_.length()};
  for (int32_t i : select_transfers(config_, at_, proposals)) {
    const Proposal& p = proposals[size_t(i)];
    canvas_.tokens[size_t(p.position)] = p.token;
    canvas_.masked.reset(p.position);
    commit_step_[size_t(p.position)] = int64_t(at_.step);
    note_stop(p.position, p.token);
    event.positions.push_back(p.position);
    event.token_ids.push_back(p.token);
  }
  counters.commits = int64_t(event.positions.size());
  result_.steps.push_back(counters);
  result_.nfe += streams();
  ++at_.step;
  ++at_.step_in_block;
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
