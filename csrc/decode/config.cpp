#include "decode/config.h"

#include <cmath>

#include "runtime/error.h"

namespace dllm {

namespace {

constexpr const char* kRemasking[] = {"low_confidence", "topk_margin", "entropy", "random", "origin"};
constexpr const char* kSchedules[] = {"llada", "dream"};
constexpr const char* kCaches[] = {"none", "prefix", "dual"};

template <class E, size_t N>
E from_name(const char* field, const char* const (&names)[N], const std::string& name) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return E(i);
  std::string all;
  for (const char* n : names) all += std::string(all.empty() ? "" : ", ") + '"' + n + '"';
  fail<ConfigError>(field, " = \"", name, "\" does not exist (there are: ", all, ")");
}

template <class T>
void require(bool ok, const char* field, T value, const char* allowed) {
  if (!ok) fail<ConfigError>(field, " = ", value, " is not allowed: it must be ", allowed);
}

// Combinations that have no meaning, each with its reason. A new strategy adds its lines here.
struct IllegalCombination {
  bool (*applies)(const GenerationConfig&);
  const char* what;
  const char* why;
};

bool uses(const GenerationConfig& c, TransferRule r) { return c.rule() == r; }
bool by_probability(const GenerationConfig& c) {
  return c.remasking == Remasking::LowConfidence || c.remasking == Remasking::TopkMargin;
}

const IllegalCombination kIllegal[] = {
    {[](const GenerationConfig& c) { return int(!!c.steps) + int(!!c.threshold) + int(!!c.factor) > 1; },
     "steps, threshold and factor together", "each of them decides how many positions a step commits: give one"},
    {[](const GenerationConfig& c) { return uses(c, TransferRule::Threshold) && !by_probability(c); },
     "threshold with remasking entropy, random or origin",
     "a threshold is a probability; use low_confidence or topk_margin, or give steps or num_transfer_tokens"},
    {[](const GenerationConfig& c) { return uses(c, TransferRule::Factor) && !by_probability(c); },
     "factor with remasking entropy, random or origin",
     "its bound is on probabilities; use low_confidence or topk_margin"},
    {[](const GenerationConfig& c) {
       return c.remasking == Remasking::Origin && !(c.schedule == Schedule::Dream && uses(c, TransferRule::Steps));
     },
     "remasking origin without schedule dream and steps",
     "its transfer probability 1 - s/t comes from the Dream schedule's time steps"},
    {[](const GenerationConfig& c) { return c.remasking == Remasking::Origin && c.num_transfer_tokens; },
     "remasking origin with num_transfer_tokens", "positions transfer independently, so their number cannot be set"},
    {[](const GenerationConfig& c) { return c.alg_temp && c.remasking == Remasking::Origin; },
     "alg_temp with remasking origin", "origin has no confidence to draw by"},
    {[](const GenerationConfig& c) {
       return c.alg_temp && !uses(c, TransferRule::Steps) && !uses(c, TransferRule::Count);
     },
     "alg_temp with threshold or factor",
     "alg_temp draws a given number of positions; give steps or num_transfer_tokens"},
    {[](const GenerationConfig& c) { return c.confidence_eos_eot_inf && !by_probability(c); },
     "confidence_eos_eot_inf with remasking entropy, random or origin",
     "it sets the probability-based confidence of end-of-text positions to zero"},
};

}  // namespace

TransferRule GenerationConfig::rule() const {
  if (steps) return TransferRule::Steps;
  if (factor) return TransferRule::Factor;
  if (threshold || !num_transfer_tokens) return TransferRule::Threshold;
  return TransferRule::Count;
}

void GenerationConfig::validate() const {
  constexpr int64_t kMaxLength = int64_t(1) << 24;
  require(gen_length >= 0 && gen_length <= kMaxLength, "gen_length", gen_length, "between 0 and 16777216");
  require(block_length >= 1 && block_length <= kMaxLength, "block_length", block_length, "between 1 and 16777216");
  if (num_transfer_tokens)
    require(*num_transfer_tokens >= 1, "num_transfer_tokens", *num_transfer_tokens, "at least 1");
  require(temperature >= 0 && std::isfinite(temperature), "temperature", temperature, "0 or a positive number");
  if (top_p) require(*top_p > 0 && *top_p <= 1, "top_p", *top_p, "in (0, 1]");
  if (top_k) require(*top_k >= 1, "top_k", *top_k, "at least 1");
  require(eps > 0 && eps < 1, "eps", eps, "in (0, 1)");
  if (alg_temp) require(*alg_temp > 0 && std::isfinite(*alg_temp), "alg_temp", *alg_temp, "a positive number, or None");
  if (threshold) require(*threshold >= 0 && *threshold <= 1, "threshold", *threshold, "in [0, 1]");
  if (factor) require(*factor > 0 && std::isfinite(*factor), "factor", *factor, "a positive number");
  require(cfg_scale >= 0 && std::isfinite(cfg_scale), "cfg_scale", cfg_scale, "0 or a positive number");
  for (const IllegalCombination& i : kIllegal)
    if (i.applies(*this)) fail<ConfigError>(i.what, " is not allowed: ", i.why);
  if (steps) {
    require(*steps >= 1, "steps", *steps, "at least 1");
    if (*steps % num_blocks())
      fail<ConfigError>("steps = ", *steps, " is not allowed: it must be a multiple of the number of blocks, ",
                        num_blocks(), " (gen_length = ", gen_length, ", block_length = ", block_length, ")");
  }
}

const char* name_of(Remasking r) { return kRemasking[int(r)]; }
const char* name_of(Schedule s) { return kSchedules[int(s)]; }
const char* name_of(CacheKind c) { return kCaches[int(c)]; }
void set_by_name(Remasking& r, const std::string& n) { r = from_name<Remasking>("remasking", kRemasking, n); }
void set_by_name(Schedule& s, const std::string& n) { s = from_name<Schedule>("schedule", kSchedules, n); }
void set_by_name(CacheKind& c, const std::string& n) { c = from_name<CacheKind>("cache", kCaches, n); }

}  // namespace dllm
