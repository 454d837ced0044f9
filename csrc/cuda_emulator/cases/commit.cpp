// Committing: every rule against rules::choose with orders from std::sort, and steps that must change nothing.
#include "decode/cuda/commit.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "cuda_emulator/case.h"

namespace dllm {
namespace {

using namespace cuda;
using ops::cuda::RowStatsState;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kSigma = 2.5;
constexpr int32_t kVocab = 60;

enum class Broken { No, Stats, NanImportance, InfiniteImportance };

// A sequence in the middle of a block, of which the step has read `reads`.
struct Sequence {
  int prompt, length, block, block_length;
  std::vector<int> infill = {}, reads = {};
  int step = 5, step_in_block = 2, masked_at_start = 0, first_stop = 0;
  bool ran = true;
  Broken broken = Broken::No;
  std::vector<uint8_t> flags = {};
  std::vector<int32_t> tokens = {};
  std::vector<double> certainty = {};
  std::vector<float> importance = {};  // before, and what the step brings
  std::vector<float> fresh = {};
  std::vector<ops::RowStats> stats = {};

  int begin() const { return std::min(prompt + block * block_length, length); }
  int end() const { return std::min(begin() + block_length, length); }
  bool in_block(int p) const {
    return (p >= begin() && p < end()) ||
           (block == 0 && p < prompt && std::find(infill.begin(), infill.end(), p) != infill.end());
  }
  bool eligible(int p) const { return in_block(p) && (flags[size_t(p)] & kMasked) && p < first_stop; }
  int first_editable() const { return infill.empty() ? prompt : infill[0]; }
};

struct Setting {
  Rules rules{};
  bool ties = false;  // few different confidences
  bool d2 = false;  // certainties and importance are kept, and positions beyond the block are read
  bool prior = false;
};

void fill(emu::Case& c, const Setting& setting, Sequence& s) {
  s.first_stop = s.length;
  for (int p = 0; p < s.length; ++p) {
    const bool decides = p >= s.prompt || std::find(s.infill.begin(), s.infill.end(), p) != s.infill.end();
    const double u = c.uniform();
    const bool open = decides && (p >= s.end() || (s.in_block(p) && u < 0.7));
    s.flags.push_back(uint8_t(decides ? kEditable | (open ? kMasked : u < 0.9 ? kFresh : 0) : 0));
    s.masked_at_start += s.in_block(p);
    s.tokens.push_back(int32_t(1000 + p));
    s.certainty.push_back(c.uniform());
    s.importance.push_back(float(c.uniform()));
    s.fresh.push_back(float(c.uniform()));
  }
  for (int p = 0; p < s.length; ++p)  // under d2Cache not every masked position is computed
    if ((s.flags[size_t(p)] & kMasked) && (setting.d2 ? p % 5 != 0 : s.in_block(p))) s.reads.push_back(p);
  for (size_t i = 0; i < s.reads.size(); ++i) {
    ops::RowStats r;
    const double low = setting.ties ? std::floor(3 * c.uniform()) : 2 * c.uniform();
    r.top1_id = r.sampled_id = int32_t(kVocab * c.uniform()), r.top2_id = i % 7 == 3 ? -1 : (r.top1_id + 1) % kVocab;
    r.top1_logit = r.sampled_logit = float(-low);
    r.top2_logit = setting.ties ? r.top1_logit - 1 : float(-low - c.uniform());
    r.log_sum_exp = setting.ties ? 0.05 : 0.01 + 0.1 * c.uniform();
    r.entropy = setting.ties ? low / 4 : c.uniform();
    s.stats.push_back(r);
  }
}

// phi and tail as decode/density.cpp makes them.
Density upload_density(emu::Case& c, const Sequence& s) {
  const int n = s.length - s.first_editable();
  std::vector<double> phi, tail(size_t(3 * n + 2));
  for (int d = 0; d <= 3 * n; ++d) phi.push_back(std::exp(-0.5 * d / kSigma * d / kSigma));
  for (int d = 3 * n; d >= 0; --d) tail[size_t(d)] = tail[size_t(d + 1)] + phi[size_t(d)];
  return {c.upload(phi), c.upload(tail), c.device<double>(size_t(s.length))};
}

// The proposals that rules::choose takes; positions ascend.
std::vector<int32_t> plain_choice(const Rules& r, const StepPosition& at, const std::vector<Proposal>& proposals) {
  const auto falling = [&](auto&& key) {
    std::vector<int32_t> order(proposals.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      const double x = key(proposals[size_t(a)]), y = key(proposals[size_t(b)]);
      return x > y || (x == y && a < b);
    });
    return order;
  };
  const auto by_key = falling([&](const Proposal& p) { return rules::order_key(r, at, p); });
  const auto by_compared = falling([&](const Proposal& p) { return rules::compared(r, p); });
  std::vector<int32_t> chosen(proposals.size());
  rules::Choice choice{chosen.data()};
  rules::choose(r, at, proposals.data(), int32_t(proposals.size()), by_key.data(), by_compared.data(), choice);
  chosen.resize(size_t(choice.count));
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

// Commits one step of all sequences on the device; returns how many tokens.
int check(emu::Case& c, const Setting& setting, std::vector<Sequence> sequences) {
  const Rules& rules = setting.rules;
  const size_t n = sequences.size();
  size_t max_length = 0, max_reads = 1;
  for (Sequence& s : sequences) {
    fill(c, setting, s);
    max_length = std::max(max_length, size_t(s.length));
    max_reads = std::max(max_reads, s.reads.size());
    if (s.broken == Broken::Stats) s.stats.back().finite = false;
    if (s.broken == Broken::NanImportance) s.fresh.back() = float(kNaN);
    if (s.broken == Broken::InfiniteImportance) s.fresh.front() = -std::numeric_limits<float>::infinity();
  }
  const size_t ld = max_length + 5;
  std::vector<SequenceState> states;
  std::vector<RowStatsState> stats;
  std::vector<StepRecord> records;
  std::vector<int32_t> reads(n * max_length, 1 << 30), read_count;
  std::vector<float> importance(n * ld, float(kNaN));
  for (size_t i = 0; i < n; ++i) {
    const Sequence& s = sequences[i];
    SequenceState q{};
    q.active = 1, q.length = s.length, q.prompt_length = s.prompt, q.first_editable = s.first_editable();
    q.n_blocks = 100, q.block_length = s.block_length;
    q.tokens = c.upload(s.tokens), q.flags = c.upload(s.flags);
    if (setting.prior) q.prior = upload_density(c, s);
    if (setting.d2) q.certainty = c.upload(s.certainty), q.importance = c.upload(s.importance);
    q.block = s.block, q.block_begin = s.begin(), q.block_end = s.end(), q.masked_at_start = s.masked_at_start;
    q.step = uint32_t(s.step), q.step_in_block = s.step_in_block, q.first_stop = s.first_stop;
    states.push_back(q);
    StepRecord r{};
    r.ran = s.ran, r.step = s.step, r.block = s.block, r.reads = int(s.reads.size()), r.finite = 1;
    records.push_back(r);
    std::copy(s.reads.begin(), s.reads.end(), reads.begin() + int64_t(i * max_length));
    std::copy(s.fresh.begin(), s.fresh.end(), importance.begin() + int64_t(i * ld));
    read_count.push_back(int32_t(s.reads.size()));
    for (const ops::RowStats& x : s.stats)
      if (s.ran) stats.push_back({0, 1, 0, 0, x});
  }
  CommitArgs a{};
  a.states = c.upload(states), a.sequences = int32_t(n), a.stats = c.upload(stats), a.reads = c.upload(reads);
  Rules on_device = rules;
  if (rules.token_frequencies)
    on_device.token_frequencies =
        c.upload(std::vector<double>(rules.token_frequencies, rules.token_frequencies + kVocab));
  a.rules = c.upload<Rules>({on_device});
  a.read_count = c.upload(read_count);
  if (setting.d2) a.importance = c.upload(importance), a.importance_ld = int64_t(ld);
  a.max_length = int32_t(max_length), a.max_reads = int32_t(max_reads);
  a.proposals = c.device<Proposal>(n * max_reads), a.keys = c.device<double>(n * max_reads);
  for (int32_t** list : {&a.by_key, &a.by_compared, &a.chosen}) *list = c.device<int32_t>(n * max_reads);
  a.records = c.upload(records), a.committed = c.device<CommittedToken>(n * max_reads);
  commit_step(c.stream(), a);

  const auto after = c.host(a.states, n);
  const auto got = c.host(a.records, n);
  const auto committed = c.host(a.committed, n * max_reads);
  c.output(a.records, n);
  c.output(a.committed, n * max_reads);
  int total = 0;
  for (size_t i = 0; i < n; ++i) {
    const Sequence& s = sequences[i];
    const SequenceState& q = states[i];
    const size_t length = size_t(s.length);
    const bool runs = s.ran && s.broken == Broken::No;
    std::vector<double> density(length, 1.0), certainty = s.certainty;
    if (setting.prior && runs) {
      density = c.host(q.prior.value, length);
      c.output(q.prior.value, length);
    }
    std::vector<Proposal> proposals;
    int64_t eligible = 0;
    for (int p = 0; p < s.length; ++p) eligible += s.eligible(p);
    const int start = s.block == 0 ? s.first_editable() : s.begin();
    for (size_t j = 0; j < s.reads.size(); ++j) {
      const int p = s.reads[j];
      const Proposal x = rules::propose(rules, p, uint32_t(s.step), s.stats[j], {density[size_t(p)], p - start});
      certainty[size_t(p)] = rules::certainty(rules, x.confidence);
      if (s.eligible(p)) proposals.push_back(x);
    }
    const StepPosition at{uint32_t(s.step), s.step_in_block, s.masked_at_start, eligible};
    std::vector<int32_t> tokens = s.tokens;
    std::vector<uint8_t> flags = s.flags;
    std::vector<CommittedToken> expected;
    int first_stop = s.first_stop;
    if (runs) {
      for (uint8_t& f : flags) f &= uint8_t(~kFresh);
      for (int32_t k : plain_choice(rules, at, proposals)) {
        const Proposal& p = proposals[size_t(k)];
        const size_t position = size_t(p.position);
        expected.push_back({p.position, p.token, float(p.confidence)});
        tokens[position] = p.token;
        flags[position] = kEditable | kFresh;
        if (rules.stop_at_eos && p.position >= s.prompt && rules.stops(p.token))
          first_stop = std::min(first_stop, p.position);
      }
    }
    total += int(expected.size());
    c.expect(got[i].committed == int(expected.size()), "how many are committed");
    c.expect(got[i].ran == s.ran && got[i].finite == (s.broken == Broken::No || !s.ran), "the record's flags");
    c.expect(got[i].step == s.step && got[i].block == s.block && got[i].reads == int(s.reads.size()),
             "the rest of the record");
    for (size_t j = 0; j < max_reads; ++j) {
      const CommittedToken& x = committed[i * max_reads + j];
      if (j < expected.size())
        c.expect(x.position == expected[j].position && x.token == expected[j].token &&
                     x.confidence == expected[j].confidence,
                 "committed");
      else
        c.expect(x.position == -1 && x.token == -1, "writes beyond the committed");
    }
    c.expect(c.host(q.tokens, length) == tokens, "tokens");
    c.expect(c.host(q.flags, length) == flags, "flags");
    c.output(q.tokens, length);
    c.output(q.flags, length);
    c.expect(after[i].first_stop == first_stop && after[i].step == uint32_t(s.step + runs) &&
                 after[i].step_in_block == s.step_in_block + runs && after[i].block == s.block &&
                 after[i].masked_at_start == s.masked_at_start && !after[i].finished,
             "state");
    if (!setting.d2) continue;
    c.expect(c.host(q.certainty, length) == (runs ? certainty : s.certainty), "certainty");
    c.expect(c.host(q.importance, length) == (runs ? s.fresh : s.importance), "importance");
    c.output(q.certainty, length);
    c.output(q.importance, length);
  }
  return total;
}

// The first block with positions of the prompt, one in the middle, a block that is longer than the threads, the last.
std::vector<Sequence> some_sequences() {
  return {{12, 40, 0, 9, {2, 3, 7}}, {4, 60, 2, 8}, {9, 700, 1, 330}, {5, 6, 0, 32}, {31, 64, 2, 15}};
}

Setting with(TransferRule rule, Remasking remasking) {
  Setting s;
  Rules& r = s.rules;
  r.rule = rule, r.remasking = remasking, r.schedule = Schedule::LLaDA, r.seed = 99;
  r.eps = 1e-3, r.threshold = 0.5, r.factor = 1.5, r.gamma = 0.8, r.steps_per_block = 4, r.min_transfer = 1;
  r.stop_at_eos = true, r.clip_alpha = 10;
  r.n_stop_ids = 2, r.stop_ids[0] = 7, r.stop_ids[1] = 31;
  return s;
}

template <TransferRule kRule>
void commit_rule(emu::Case& c) {
  for (Remasking remasking : {Remasking::LowConfidence, Remasking::TopkMargin, Remasking::Entropy, Remasking::Random})
    for (bool ties : {false, true}) {
      Setting s = with(kRule, remasking);
      s.ties = ties;
      s.rules.num_transfer_tokens = kRule == TransferRule::Count ? 3 : 0;
      s.rules.min_transfer = ties || kRule == TransferRule::Count ? 3 : 1;
      if (remasking == Remasking::Entropy) s.rules.threshold = -0.2;
      c.expect(check(c, s, some_sequences()) >= 5, "every sequence goes on");
    }
}
void commit_steps_dream(emu::Case& c) {
  for (int step : {0, 2, 3, 4, 9}) {
    Setting s = with(TransferRule::Steps, Remasking::LowConfidence);
    s.rules.schedule = Schedule::Dream;
    s.ties = step == 2;
    std::vector<Sequence> list = some_sequences();
    for (Sequence& q : list) q.step_in_block = step;
    check(c, s, list);
  }
}
void commit_origin(emu::Case& c) {
  Setting s = with(TransferRule::Steps, Remasking::Origin);
  s.rules.schedule = Schedule::Dream;
  for (int step : {0, 1, 3}) {
    std::vector<Sequence> list = some_sequences();
    for (Sequence& q : list) q.step_in_block = step;
    check(c, s, list);
  }
}
void commit_left_to_right(emu::Case& c) {
  for (TransferRule rule : {TransferRule::Steps, TransferRule::Threshold}) {
    Setting s = with(rule, Remasking::LowConfidence);
    s.rules.autoregressive = true;
    check(c, s, some_sequences());
  }
}
// What changes the score, and drawing by it.
void commit_scores(emu::Case& c) {
  std::vector<double> frequencies;
  for (int32_t i = 0; i < kVocab; ++i) frequencies.push_back(c.uniform() / kVocab);
  for (TransferRule rule : {TransferRule::Count, TransferRule::Factor}) {
    Setting s = with(rule, Remasking::Entropy);
    s.prior = s.ties = true;
    s.rules.min_transfer = 3;
    s.rules.transforms_score = true;
    check(c, s, some_sequences());
    s.rules.position_decay = 0.1;
    s.rules.token_frequencies = frequencies.data();
    check(c, s, some_sequences());
    s.rules.confidence_eos_eot_inf = true;
    s.rules.alg_temp = 0.7;
    check(c, s, some_sequences());
  }
}
// Every token is a stop id: the first one counts, unless it is in the prompt, or stops are off.
void commit_stop(emu::Case& c) {
  for (bool stops : {true, false}) {
    Setting s = with(TransferRule::Threshold, Remasking::LowConfidence);
    s.rules.threshold = 0;
    s.rules.stop_at_eos = stops;
    s.rules.n_stop_ids = Rules::kMaxStopIds;
    for (int i = 0; i < Rules::kMaxStopIds; ++i) s.rules.stop_ids[i] = 7 * i;
    check(c, s, some_sequences());
  }
}
void commit_d2(emu::Case& c) {
  for (TransferRule rule : {TransferRule::Threshold, TransferRule::Gamma, TransferRule::Steps}) {
    Setting s = with(rule, Remasking::Entropy);
    s.d2 = true;
    s.rules.threshold = -0.3;
    s.ties = rule == TransferRule::Gamma;
    check(c, s, some_sequences());
  }
}
// What is not a number stops its own sequence only; what did not run has no statistics.
void commit_nothing(emu::Case& c) {
  Setting s = with(TransferRule::Threshold, Remasking::LowConfidence);
  s.d2 = true;
  std::vector<Sequence> list = some_sequences();
  list[0].ran = false;
  list[2].broken = Broken::Stats;
  c.expect(check(c, s, list) > 0, "the others commit");
  list[0].broken = Broken::NanImportance;
  list[1].broken = Broken::NanImportance;
  list[2].broken = Broken::InfiniteImportance;
  c.expect(check(c, s, list) > 0, "the others commit");
  s.d2 = false;  // nobody looks at it
  for (Sequence& q : list) q.broken = Broken::Stats;
  c.expect(check(c, s, list) == 0, "none commits");
}

const emu::Registered r1("commit/threshold", commit_rule<TransferRule::Threshold>);
const emu::Registered r2("commit/factor", commit_rule<TransferRule::Factor>);
const emu::Registered r3("commit/gamma", commit_rule<TransferRule::Gamma>);
const emu::Registered r4("commit/count", commit_rule<TransferRule::Count>);
const emu::Registered r5("commit/steps", commit_rule<TransferRule::Steps>);
const emu::Registered r6("commit/steps_dream", commit_steps_dream);
const emu::Registered r7("commit/origin", commit_origin);
const emu::Registered r8("commit/left_to_right", commit_left_to_right);
const emu::Registered r9("commit/scores", commit_scores);
const emu::Registered r10("commit/stop", commit_stop);
const emu::Registered r11("commit/d2", commit_d2);
const emu::Registered r12("commit/nothing", commit_nothing);

}  // namespace
}  // namespace dllm
