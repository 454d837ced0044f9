// The steps of the cache policies: whole generations, planned step by step against lists made by hand, and plans that do
// not fit.
#include "cache/cuda/plan.h"

#include <algorithm>
#include <numeric>

#include "cuda_emulator/case.h"

namespace dllm {
namespace {

using namespace cuda;
using ops::cuda::LayerPlan;
using ops::cuda::SequenceRows;

constexpr int kSpare = 3;  // sequences of the memory beyond those in use
constexpr uint64_t kSeed = 77;

struct Policy {
  CacheKind cache = CacheKind::None;
  int shift = 0;
  int64_t kp = 4, kr = 2;
  double rou = 0.25;
  std::vector<uint8_t> always = {1, 0, 0};
  double rollout_p = 0.3;
  int64_t current_k = 6, inflate_w = 3;
};

// A sequence as the host knows it.
struct Sequence {
  int prompt, length, block_length;
  std::vector<int> infill;  // positions of the prompt to be decided
  bool active = true, finished = false;
  int block = -1, step = 0, step_in_block = 0, masked_at_start = 0, first_stop = 0;
  std::vector<uint8_t> flags = {};
  std::vector<int32_t> tokens = {};
  std::vector<double> certainty = {};
  std::vector<float> importance = {};

  void begin(emu::Case& c) {
    first_stop = length;
    for (int p = 0; p < length; ++p) {
      const bool decides = p >= prompt || std::find(infill.begin(), infill.end(), p) != infill.end();
      flags.push_back(decides ? kEditable | kMasked : 0);
      tokens.push_back(int32_t(1000 * c.uniform()));
      certainty.push_back(c.uniform());
      importance.push_back(float(c.uniform()));
    }
  }
  bool editable(int p) const { return flags[size_t(p)] & kEditable; }
  bool masked(int p) const { return flags[size_t(p)] & kMasked; }
  int first_editable() const {
    int p = 0;
    while (p < length && !editable(p)) ++p;
    return p;
  }
  int blocks() const { return std::max(1, (length - prompt + block_length - 1) / block_length); }
  int begin_of(int b) const { return std::min(prompt + b * block_length, length); }
  std::vector<int> positions() const {  // of the block
    std::vector<int> list;
    for (int p = 0; p < length; ++p)
      if (p < prompt ? block == 0 && editable(p) : p >= begin_of(block) && p < begin_of(block + 1)) list.push_back(p);
    return list;
  }
  std::vector<int> eligible() const {
    std::vector<int> list;
    if (block < 0) return list;
    for (int p : positions())
      if (masked(p) && p < first_stop) list.push_back(p);
    return list;
  }
  bool advance() {
    Sequence next = *this;
    while (next.eligible().empty()) {
      if (++next.block == blocks()) return false;
      next.step_in_block = next.masked_at_start = 0;
      for (int p : next.positions()) next.masked_at_start += next.masked(p);
    }
    *this = next;
    return true;
  }
  // A step is over: the last `n` of the block's are decided.
  void commit(int n, emu::Case& c) {
    const std::vector<int> open = eligible();
    for (uint8_t& f : flags) f &= uint8_t(~kFresh);
    for (size_t i = 0; i < open.size() && int(i) < n; ++i) {
      const size_t p = size_t(open[open.size() - 1 - i]);
      flags[p] = kEditable | kFresh;
      tokens[p] = int32_t(1000 * c.uniform());
    }
    for (float& x : importance) x = float(c.uniform());
    for (int p : open) certainty[size_t(p)] = c.uniform();
    ++step, ++step_in_block;
  }
};

// phi and tail as decode/density.cpp makes them.
Density upload_density(emu::Case& c, const Sequence& s, double sigma) {
  const int n = s.length - s.first_editable();
  std::vector<double> phi, tail(size_t(3 * n + 2));
  for (int d = 0; d <= 3 * n; ++d) phi.push_back(std::exp(-0.5 * d / sigma * d / sigma));
  for (int d = 3 * n; d >= 0; --d) tail[size_t(d)] = tail[size_t(d + 1)] + phi[size_t(d)];
  return {c.upload(phi), c.upload(tail), c.device<double>(size_t(s.length))};
}
// The formula of decode/density.h.
double density_at(const Sequence& s, int p, double sigma) {
  const int first = s.first_editable(), n = s.length - first;
  double sum = 0, all = 0;
  const auto phi = [&](int d) { return std::exp(-0.5 * d / sigma * d / sigma); };
  for (int j = -n; j < 2 * n; ++j)
    if (j < 0 || !s.masked(j < n ? first + j : s.length - 1)) sum += phi(p - first - j);
  for (int d = -3 * n; d < 3 * n; ++d) all += phi(d);
  return sum / all;
}

struct Step {
  std::vector<int> rows, reads;
  StepNeeds needs{};
  LayerPlan plan{};
};

std::vector<int> d2_rows(const Policy& policy, const Sequence& s, const std::vector<double>& density) {
  std::vector<bool> chosen(size_t(s.length), false);
  for (int p = 0; p < s.length; ++p) chosen[size_t(p)] = s.flags[size_t(p)] & kFresh;
  std::vector<int> open;
  for (int p = 0; p < std::min(s.length, s.first_stop); ++p)
    if (s.masked(p)) open.push_back(p);
  if (int64_t(open.size()) >= policy.current_k) {
    const int last = open[size_t(policy.current_k - 1)];
    int end = s.length;
    for (int b = s.blocks() - 1; b >= 0 && last < s.begin_of(b + 1); --b) end = s.begin_of(b + 1);
    std::erase_if(open, [&](int p) { return p >= end; });
    const std::vector<int> block = s.positions();
    const auto key = [&](int p) {
      return std::pair(std::count(block.begin(), block.end(), p), s.certainty[size_t(p)] * density[size_t(p)]);
    };
    std::stable_sort(open.begin(), open.end(), [&](int a, int b) { return key(a) > key(b); });
    open.resize(size_t(policy.current_k));
  }
  for (int p : open) chosen[size_t(p - policy.shift)] = true;

  std::vector<int> rest;
  double total = 0, cumulated = 0;
  for (int p = 0; p < s.length; ++p)
    if (!chosen[size_t(p)]) rest.push_back(p), total += s.importance[size_t(p)];
  std::stable_sort(rest.begin(), rest.end(),
                   [&](int a, int b) { return s.importance[size_t(a)] > s.importance[size_t(b)]; });
  for (int p : rest) {
    cumulated += s.importance[size_t(p)] / total;
    if (p != rest[0] && policy.rollout_p < 1 && cumulated > policy.rollout_p) break;
    chosen[size_t(p)] = true;
  }
  std::vector<int> members, rows;
  for (int p = 0; p < s.length; ++p)
    if (chosen[size_t(p)]) members.push_back(p);
  for (size_t i = 0; i < members.size(); ++i) {
    if (i > 0 && members[i] - members[i - 1] <= policy.inflate_w)
      for (int p = members[i - 1] + 1; p < members[i]; ++p) rows.push_back(p);
    rows.push_back(members[i]);
  }
  return rows;
}

Step plain_step(const Policy& policy, const Sequence& s, const std::vector<double>& density) {
  Step out;
  std::vector<int> everything(static_cast<size_t>(s.length)), &rows = out.rows;
  std::iota(everything.begin(), everything.end(), 0);
  const bool first = s.step_in_block == 0;
  const auto has = [&](int row) { return std::find(rows.begin(), rows.end(), row) != rows.end(); };
  const int responses = int(std::count_if(everything.begin(), everything.end(), [&](int p) { return s.editable(p); }));
  switch (policy.cache) {
    case CacheKind::None:
      rows = everything;
      break;
    case CacheKind::Prefix:
      for (int p : everything) {
        bool wanted = first || p >= s.begin_of(s.block) - policy.shift;
        for (int q : s.positions()) wanted |= p == q || p == q - policy.shift;
        if (wanted) rows.push_back(p);
      }
      break;
    case CacheKind::Dual:
      if (first)
        rows = everything;
      else
        for (int p : s.positions()) rows.push_back(p - policy.shift);
      break;
    case CacheKind::DLLM: {
      const bool prompt = s.step % policy.kp == 0, response = s.step % policy.kr == 0;
      bool all = s.step == 0;
      for (size_t l = 1; l < policy.always.size(); ++l) all |= prompt || policy.always[l];
      for (int p : everything)
        if (all || s.editable(p) || (p + policy.shift < s.length && s.masked(p + policy.shift))) rows.push_back(p);
      out.plan = {prompt, response, policy.rou > 0 ? int(policy.rou * responses) : -1};
      const bool verifies = !response && policy.rou > 0;
      out.needs.live = (prompt ? int(rows.size()) - responses : 0) + (response   ? responses
                                                                      : verifies ? out.plan.n_verify
                                                                                 : 0);
      out.needs.verified = verifies ? responses : 0;
      break;
    }
    case CacheKind::D2:
      rows = s.step == 0 ? everything : d2_rows(policy, s, density);
      break;
  }
  if (policy.cache == CacheKind::D2) {
    for (int p = 0; p < std::min(s.length, s.first_stop); ++p)
      if (s.masked(p) && has(p - policy.shift)) out.reads.push_back(p);
  } else {
    for (int p : s.eligible())
      if (has(p - policy.shift)) out.reads.push_back(p);
  }
  out.needs.rows = int(rows.size());
  out.needs.reads = int(out.reads.size());
  return out;
}

constexpr StepNeeds kAny{1 << 20, 1 << 20, 1 << 20, 1 << 20};

// Plans and packs one step of all sequences on the device; `sequences` moves on as the device should. Returns the needs.
StepNeeds check(emu::Case& c, const Policy& policy, std::vector<Sequence>& sequences, StepNeeds limits = kAny) {
  const int n = int(sequences.size()), layers = int(policy.always.size());
  constexpr double kSigma = 3;
  std::vector<SequenceState> states;
  int max_length = 0, total = 0;
  for (const Sequence& s : sequences) {
    SequenceState q{};
    q.active = s.active;
    q.length = s.length, q.prompt_length = s.prompt, q.first_editable = s.first_editable();
    q.editable_count = int(std::count_if(s.flags.begin(), s.flags.end(), [](int f) { return f & kEditable; }));
    q.n_blocks = s.blocks(), q.block_length = s.block_length;
    q.tokens = c.upload(s.tokens), q.flags = c.upload(s.flags);
    q.d2 = upload_density(c, s, kSigma);
    q.certainty = c.upload(s.certainty), q.importance = c.upload(s.importance);
    q.block = s.block, q.masked_at_start = s.masked_at_start;
    if (s.block >= 0) q.block_begin = s.begin_of(s.block), q.block_end = s.begin_of(s.block + 1);
    q.step = uint32_t(s.step), q.step_in_block = s.step_in_block, q.first_stop = s.first_stop, q.finished = s.finished;
    states.push_back(q);
    max_length = std::max(max_length, s.length);
    total += s.length;
  }
  const size_t lists = size_t(n) * size_t(max_length);
  PlanArgs a{};
  a.states = c.upload(states), a.sequences = n, a.cache = policy.cache, a.shift = policy.shift, a.seed = kSeed;
  a.kp = policy.kp, a.kr = policy.kr, a.rou = policy.rou, a.always_refresh = c.upload(policy.always), a.layers = layers;
  a.rollout_p = policy.rollout_p, a.current_k = policy.current_k, a.inflate_w = policy.inflate_w;
  a.max_length = max_length, a.rows = c.device<int32_t>(lists), a.reads = c.device<int32_t>(lists);
  a.chosen = c.device<uint8_t>(2 * lists), a.sort_keys = c.device<uint64_t>(size_t(n) * sort_slots(max_length));
  for (int32_t** count : {&a.row_count, &a.read_count, &a.live_count, &a.verified_count})
    *count = c.device<int32_t>(size_t(n));
  a.layer_plans = c.device<LayerPlan>(size_t(n));

  StepMemory m{};
  for (ops::cuda::RowList* list : {&m.step, &m.verified})
    *list = {c.device<int32_t>(size_t(total)),
             c.device<int32_t>(size_t(total)),
             c.device<int32_t>(size_t(total)),
             c.device<SequenceRows>(size_t(n)),
             c.device<int32_t>(1),
             total};
  for (int32_t** list : {&m.tokens, &m.is_response, &m.out_rows}) *list = c.device<int32_t>(size_t(total));
  m.out_count = c.device<int32_t>(1), m.keys = c.device<NoiseKey>(size_t(total));
  const size_t n_plans = size_t(layers) * size_t(n + kSpare);
  m.plans = c.device<LayerPlan>(n_plans);
  StepRecord* records = c.device<StepRecord>(size_t(n));
  plan_step(c.stream(), a);
  pack_step(c.stream(), {a, m, n + kSpare, limits, records});

  // What must have come out.
  std::vector<Step> steps;
  StepNeeds needs{};
  for (size_t i = 0; i < size_t(n); ++i) {
    Sequence& s = sequences[i];
    Step step;
    if (s.active && !s.finished) {
      s.finished = !s.advance();
      std::vector<double> density;
      if (!s.finished && policy.cache == CacheKind::D2 && s.step > 0) {
        density = c.host(states[i].d2.value, size_t(s.length));
        c.output(states[i].d2.value, size_t(s.length));
        for (int p = 0; p < s.first_editable(); ++p) c.expect(density[size_t(p)] == 0, "density left of all");
        for (int p = s.first_editable(); p < s.length; ++p)
          c.expect_close(density[size_t(p)], density_at(s, p, kSigma), 1e-11, "density");
      }
      if (!s.finished) step = plain_step(policy, s, density);
    }
    needs.rows += step.needs.rows, needs.reads += step.needs.reads;
    needs.live += step.needs.live, needs.verified += step.needs.verified;
    steps.push_back(step);
  }
  const bool fits = needs.rows <= limits.rows && needs.reads <= limits.reads && needs.live <= limits.live &&
                    needs.verified <= limits.verified;

  const std::vector<StepRecord> got = c.host(records, size_t(n));
  const std::vector<SequenceState> after = c.host(a.states, size_t(n));
  const auto ranges = c.host(m.step.sequences, size_t(n));
  const auto row = c.host(m.step.row, size_t(total)), position = c.host(m.step.position, size_t(total)),
             sequence = c.host(m.step.sequence, size_t(total)), tokens = c.host(m.tokens, size_t(total)),
             response = c.host(m.is_response, size_t(total)), out_rows = c.host(m.out_rows, size_t(total));
  const auto keys = c.host(m.keys, size_t(total));
  c.output(records, size_t(n));
  c.output(m.step.sequences, size_t(n));
  for (int32_t* list : {m.step.row, m.step.position, m.step.sequence, m.tokens, m.is_response, m.out_rows})
    c.output(list, size_t(total));
  c.output(m.keys, size_t(total));

  size_t at = 0, read = 0;
  for (size_t i = 0; i < size_t(n); ++i) {
    const Sequence& s = sequences[i];
    const Step& step = steps[i];
    const StepRecord& r = got[i];
    const size_t rows = fits ? step.rows.size() : 0, reads = fits ? step.reads.size() : 0;
    c.expect(r.ran == (rows > 0) && r.rows == int(rows) && r.reads == int(reads) && r.finite == 1 && r.committed == 0,
             "record");
    c.expect(r.needs == needs, "needs");
    c.expect(r.finished == s.finished && r.step == s.step && r.block == s.block, "where the record is");
    c.expect(ranges[i].begin == int(at) && ranges[i].end == int(at + rows) && ranges[i].n_keys == s.length, "ranges");
    for (size_t j = 0; j < rows; ++j, ++at) {
      const size_t p = size_t(step.rows[j]);
      c.expect(row[at] == int(at) && position[at] == int(p) && sequence[at] == int(i), "rows");
      c.expect(tokens[at] == s.tokens[p] && response[at] == s.editable(int(p)), "tokens and parts");
    }
    for (size_t j = 0; j < reads; ++j, ++read) {
      const int32_t p = step.reads[j];
      c.expect(position[size_t(out_rows[read])] == p - policy.shift && sequence[size_t(out_rows[read])] == int(i),
               "out_rows");
      c.expect(keys[read].seed == kSeed && int(keys[read].step) == s.step && keys[read].position == uint32_t(p),
               "keys");
    }
    const SequenceState& q = after[i];
    c.expect(q.block == s.block && q.finished == s.finished && q.step_in_block == s.step_in_block &&
                 q.masked_at_start == s.masked_at_start && q.step == uint32_t(s.step),
             "state");
    if (s.block >= 0)
      c.expect(q.block_begin == s.begin_of(s.block) && q.block_end == s.begin_of(s.block + 1), "the state's block");
  }
  c.expect(c.host(m.step.count, 1)[0] == int(at) && c.host(m.out_count, 1)[0] == int(read), "counts");
  c.expect(c.host(m.verified.count, 1)[0] == (fits ? needs.verified : 0), "count of verified rows");
  for (size_t i = at; i < size_t(total); ++i)
    c.expect(row[i] == -1 && position[i] == -1 && sequence[i] == -1 && tokens[i] == -1, "writes beyond the rows");
  for (size_t i = read; i < size_t(total); ++i) c.expect(out_rows[i] == -1, "writes beyond the reads");
  const auto plans = c.host(m.plans, n_plans);
  if (policy.cache != CacheKind::DLLM) {
    for (const LayerPlan& p : plans) c.expect(p.n_verify == -1 && p.refresh_prompt == -1, "no layer's plan");
    return needs;
  }
  c.output(m.plans, n_plans);
  for (int32_t* list : {m.verified.row, m.verified.position, m.verified.sequence}) c.output(list, size_t(total));
  c.output(m.verified.sequences, size_t(n));
  const auto verified = c.host(m.verified.sequences, size_t(n));
  const auto v_row = c.host(m.verified.row, size_t(total)), v_position = c.host(m.verified.position, size_t(total)),
             v_sequence = c.host(m.verified.sequence, size_t(total));
  size_t v = 0;
  for (size_t i = 0; i < size_t(n); ++i) {
    const Sequence& s = sequences[i];
    const size_t begin = v;
    for (size_t j = 0; fits && steps[i].needs.verified && j < steps[i].rows.size(); ++j) {
      const int p = steps[i].rows[j];
      if (!s.editable(p)) continue;
      c.expect(v_row[v] == ranges[i].begin + int(j) && v_position[v] == p && v_sequence[v] == int(i), "verified rows");
      ++v;
    }
    c.expect(verified[i].begin == int(begin) && verified[i].end == int(v) && verified[i].n_keys == s.length,
             "ranges of verified rows");
    for (size_t l = 0; l < size_t(layers) && !steps[i].rows.empty(); ++l) {
      const LayerPlan& p = plans[l * size_t(n + kSpare) + i];
      const bool always = policy.always[l];
      c.expect(p.refresh_prompt == (always || steps[i].plan.refresh_prompt) &&
                   p.refresh_response == (always || steps[i].plan.refresh_response) &&
                   p.n_verify == steps[i].plan.n_verify,
               "a layer's plan");
    }
  }
  for (size_t i = v; i < size_t(total); ++i) c.expect(v_row[i] == -1, "writes beyond the verified rows");
  return needs;
}

std::vector<Sequence> some_sequences(emu::Case& c) {
  std::vector<Sequence> list = {
      {11, 27, 8, {3, 7, 8}}, {5, 9, 4, {}}, {9, 15, 3, {}}, {4, 4, 3, {1, 3}}, {6, 43, 9, {}}};
  for (Sequence& s : list) s.begin(c);
  list[1].active = false;
  list[2].finished = true;
  return list;
}

// Generations from their first step to their end, of different lengths; the last one meets a stop id.
void generate(emu::Case& c, const Policy& policy) {
  std::vector<Sequence> list = some_sequences(c);
  const auto over = [](const Sequence& s) { return !s.active || s.finished; };
  for (int step = 0; step < 40 && !std::all_of(list.begin(), list.end(), over); ++step) {
    check(c, policy, list);
    for (size_t i = 0; i < list.size(); ++i)
      if (!over(list[i])) list[i].commit(step == 1 ? 0 : step % 3 + 4, c);
    if (step == 3) list[4].first_stop = 33;
  }
  c.expect(list[0].finished && list[3].finished && list[4].finished && list[4].first_stop == 33, "they end");
  check(c, policy, list);  // nothing is left
}

// Every limit by itself one too small; then all just large enough.
void too_small(emu::Case& c, const Policy& policy) {
  std::vector<Sequence> list = some_sequences(c);
  for (int step = 0; step < 2; ++step) {
    const StepNeeds needs = check(c, policy, list, {0, 0, 0, 0});  // moves on to the next block all the same
    for (int32_t StepNeeds::* limit : {&StepNeeds::rows, &StepNeeds::reads, &StepNeeds::live, &StepNeeds::verified}) {
      StepNeeds limits = needs;
      if (--(limits.*limit) >= 0) check(c, policy, list, limits);
    }
    check(c, policy, list, needs);
    for (Sequence& s : list)
      if (s.active && !s.finished) s.commit(3, c);
  }
}

// The first steps of a long and a short sequence.
void begin(emu::Case& c, const Policy& policy, int prompt, int length, int steps = 3) {
  std::vector<Sequence> list = {{prompt, length, 20, {prompt - 2}}, {3, 8, 5, {}}};
  for (Sequence& s : list) s.begin(c);
  for (int step = 0; step < steps; ++step) {
    check(c, policy, list);
    for (Sequence& s : list) s.commit(2, c);
  }
}

Policy with(CacheKind cache, int shift) {
  Policy p;
  p.cache = cache, p.shift = shift;
  return p;
}
template <CacheKind kCache>
void plan_generate(emu::Case& c) {
  generate(c, with(kCache, 1));
  begin(c, with(kCache, 0), 14, 40);
}
template <CacheKind kCache>
void plan_limits(emu::Case& c) {
  too_small(c, with(kCache, 1));
}
void plan_dllm_settings(emu::Case& c) {
  Policy p = with(CacheKind::DLLM, 1);
  p.rou = 0;
  begin(c, p, 14, 40);
  p = with(CacheKind::DLLM, 0);
  p.kp = 3, p.kr = 5, p.rou = 0.6, p.always = {0, 0, 1, 0};
  begin(c, p, 14, 40, 6);
}
void plan_d2_settings(emu::Case& c) {
  Policy p = with(CacheKind::D2, 0);
  p.rollout_p = 1, p.inflate_w = 0;
  begin(c, p, 11, 29);
  p.rollout_p = 0, p.inflate_w = 1000, p.current_k = 1;
  begin(c, p, 11, 29);
  p.rollout_p = 0.05, p.inflate_w = 2, p.current_k = int64_t(1) << 40;
  begin(c, p, 11, 29);
}
// The nucleus, where shares are exact: 16 positions of equal importance remain beside the 4 that are computed anyway.
void plan_d2_ties(emu::Case& c) {
  Policy p = with(CacheKind::D2, 0);
  p.rollout_p = 0.25, p.current_k = 4, p.inflate_w = 0;
  std::vector<Sequence> list = {{12, 20, 8, {}}};
  list[0].begin(c);
  check(c, p, list);
  list[0].commit(0, c);
  std::fill(list[0].certainty.begin(), list[0].certainty.end(), 0.5);
  std::fill(list[0].importance.begin(), list[0].importance.end(), 0.5f);
  const StepNeeds needs = check(c, p, list);
  c.expect(needs.rows == 8 && needs.reads == 4, "a quarter of the rest");
}
// More positions than threads, which take them in turns.
void plan_wide(emu::Case& c) {
  for (CacheKind cache : {CacheKind::Prefix, CacheKind::Dual, CacheKind::DLLM, CacheKind::D2})
    begin(c, with(cache, 1), 560, 620);
}
// Too many keys for shared memory.
void plan_d2_unshared_keys(emu::Case& c) { begin(c, with(CacheKind::D2, 0), 8180, 8200, 2); }

const emu::Registered r1("plan/none", plan_generate<CacheKind::None>);
const emu::Registered r2("plan/prefix", plan_generate<CacheKind::Prefix>);
const emu::Registered r3("plan/dual", plan_generate<CacheKind::Dual>);
const emu::Registered r4("plan/dllm", plan_generate<CacheKind::DLLM>);
const emu::Registered r5("plan/d2", plan_generate<CacheKind::D2>);
const emu::Registered r6("plan/dual_limits", plan_limits<CacheKind::Dual>);
const emu::Registered r7("plan/dllm_limits", plan_limits<CacheKind::DLLM>);
const emu::Registered r8("plan/dllm_settings", plan_dllm_settings);
const emu::Registered r9("plan/d2_settings", plan_d2_settings);
const emu::Registered r10("plan/d2_ties", plan_d2_ties);
const emu::Registered r11("plan/wide", plan_wide);
const emu::Registered r12("plan/d2_unshared_keys", plan_d2_unshared_keys);

}  // namespace
}  // namespace dllm
