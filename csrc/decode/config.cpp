#include "decode/config.h"

#include <cmath>

#include "runtime/error.h"

namespace dllm {

namespace {

constexpr const char* kRemasking[] = {"low_confidence", "topk_margin", "entropy", "random", "origin"};
constexpr const char* kSchedules[] = {"llada", "dream"};
constexpr const char* kCaches[] = {"none", "prefix", "dual", "dllm", "d2"};

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
    {[](const GenerationConfig& c) {
       return int(!!c.steps) + int(!!c.threshold) + int(!!c.factor) + int(!!c.gamma) > 1;
     },
     "more than one of steps, threshold, factor and gamma",
     "each of them decides how many positions a step commits: give one"},
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
     "alg_temp with threshold, factor or gamma",
     "alg_temp draws a given number of positions; give steps or num_transfer_tokens"},
    {[](const GenerationConfig& c) { return c.confidence_eos_eot_inf && !by_probability(c); },
     "confidence_eos_eot_inf with remasking entropy, random or origin",
     "it sets the probability-based confidence of end-of-text positions to zero"},
    {[](const GenerationConfig& c) { return c.remasking == Remasking::Origin && c.has_score_transform(); },
     "remasking origin with sigma, token_frequencies or position_decay",
     "they order positions, and origin transfers each by itself"},
    {[](const GenerationConfig& c) { return c.remasking == Remasking::Origin && c.cache == CacheKind::D2; },
     "remasking origin with cache d2", "d2Cache chooses its rows by confidence, and origin has none"},
    {[](const GenerationConfig& c) {
       return c.kl_threshold && !uses(c, TransferRule::Threshold) && !uses(c, TransferRule::Factor);
     },
     "kl_threshold with steps, gamma or a bare num_transfer_tokens",
     "KLASS filters what threshold or factor choose; give one of them"},
    {[](const GenerationConfig& c) { return !c.token_frequencies.empty() && c.remasking != Remasking::LowConfidence; },
     "token_frequencies with remasking other than low_confidence",
     "PC-Sampler weighs the probability of the proposed token"},
    {[](const GenerationConfig& c) {
       return c.autoregressive && (c.factor || c.gamma || c.alg_temp || c.kl_threshold || c.has_score_transform() ||
                                   c.remasking == Remasking::Random || c.remasking == Remasking::Origin);
     },
     "autoregressive with factor, gamma, alg_temp, kl_threshold, sigma, token_frequencies, position_decay, or "
     "remasking random or origin",
     "they choose among positions, and autoregressive leaves no choice"},
    {[](const GenerationConfig& c) { return c.autoregressive && c.cache == CacheKind::D2 && !c.reference_quirks; },
     "autoregressive with cache d2", "d2Cache may not compute the first masked position"},
    {[](const GenerationConfig& c) { return c.dllm.cfg_interval_steps != 1 && !(c.cfg_scale > 0); },
     "cfg_interval_steps without cfg_scale", "there is no guidance whose difference could be kept"},
    {[](const GenerationConfig& c) { return c.cache != CacheKind::DLLM && c.dllm != DLLMCacheConfig(); },
     "kp, kr, rou, always_refresh_layers or cfg_interval_steps with another cache than dllm",
     "they are settings of dLLM-Cache"},
    {[](const GenerationConfig& c) { return c.cache != CacheKind::D2 && c.d2 != D2CacheConfig(); },
     "rollout_p, current_k, d2_sigma or inflate_w with another cache than d2", "they are settings of d2Cache"},
    {[](const GenerationConfig& c) {
       return c.reference_quirks && (c.steps || c.cfg_scale > 0 || c.alg_temp || c.logits_eos_inf ||
                                     c.confidence_eos_eot_inf || c.position_decay > 0);
     },
     "reference_quirks with steps, cfg_scale, alg_temp, logits_eos_inf, confidence_eos_eot_inf or position_decay",
     "the released d2Cache harness has none of them"},
};

}  // namespace

TransferRule GenerationConfig::rule() const {
  if (steps) return TransferRule::Steps;
  if (factor) return TransferRule::Factor;
  if (gamma) return TransferRule::Gamma;
  if (threshold || !num_transfer_tokens) return TransferRule::Threshold;
  return TransferRule::Count;
}

double GenerationConfig::prior_sigma() const {
  if (sigma) return *sigma;
  const bool counts = rule() == TransferRule::Steps || rule() == TransferRule::Count;
  return cache == CacheKind::D2 && counts && !autoregressive && remasking != Remasking::Origin ? d2.sigma : 0.0;
}

void GenerationConfig::validate() const {
  constexpr int64_t kMaxLength = int64_t(1) << 24;
  require(gen_length >= 0 && gen_length <= kMaxLength, "gen_length", gen_length, "between 0 and 16777216");
  require(block_length >= 1 && block_length <= kMaxLength, "block_length", block_length, "between 1 and 16777216");
  if (num_transfer_tokens)
    require(*num_transfer_tokens >= 1, "num_transfer_tokens", *num_transfer_tokens, "at least 1");
  require(temperature == 0 || (float(temperature) > 0 && std::isfinite(float(temperature))), "temperature", temperature,
          "0 or a positive number of fp32");
  if (top_p) require(*top_p > 0 && *top_p <= 1, "top_p", *top_p, "in (0, 1]");
  if (top_k) require(*top_k >= 1, "top_k", *top_k, "at least 1");
  require(eps > 0 && eps < 1, "eps", eps, "in (0, 1)");
  if (alg_temp) require(*alg_temp > 0 && std::isfinite(*alg_temp), "alg_temp", *alg_temp, "a positive number, or None");
  if (threshold) require(*threshold >= 0 && *threshold <= 1, "threshold", *threshold, "in [0, 1]");
  if (factor) require(*factor > 0 && std::isfinite(*factor), "factor", *factor, "a positive number");
  if (gamma) require(*gamma >= 0 && std::isfinite(*gamma), "gamma", *gamma, "0 or a positive number");
  if (kl_threshold)
    require(*kl_threshold > 0 && std::isfinite(*kl_threshold), "kl_threshold", *kl_threshold, "a positive number");
  require(kl_history_length >= 1 && kl_history_length <= 64, "kl_history_length", kl_history_length,
          "between 1 and 64");
  if (sigma) require(*sigma >= 0 && std::isfinite(*sigma), "sigma", *sigma, "0 or a positive number");
  for (double f : token_frequencies) require(f >= 0 && f <= 1, "token_frequencies", f, "in [0, 1] for every token");
  require(clip_alpha > 0 && std::isfinite(clip_alpha), "clip_alpha", clip_alpha, "a positive number");
  require(position_decay >= 0 && std::isfinite(position_decay), "position_decay", position_decay,
          "0 or a positive number");
  require(dllm.kp >= 1, "kp", dllm.kp, "at least 1");
  require(dllm.kr >= 1, "kr", dllm.kr, "at least 1");
  require(dllm.rou >= 0 && dllm.rou <= 1, "rou", dllm.rou, "in [0, 1]");
  for (int64_t layer : dllm.always_refresh_layers)
    require(layer >= 0, "always_refresh_layers", layer, "layer numbers from 0");
  require(dllm.cfg_interval_steps >= 1, "cfg_interval_steps", dllm.cfg_interval_steps, "at least 1");
  require(d2.rollout_p >= 0 && d2.rollout_p <= 1, "rollout_p", d2.rollout_p, "in [0, 1]");
  require(d2.current_k >= 1, "current_k", d2.current_k, "at least 1");
  require(d2.sigma > 0 && std::isfinite(d2.sigma), "d2_sigma", d2.sigma, "a positive number");
  require(d2.inflate_w >= 0, "inflate_w", d2.inflate_w, "0 or more");
  require(cfg_scale >= 0 && cfg_scale <= 1e6, "cfg_scale", cfg_scale, "in [0, 1000000]");
  for (const IllegalCombination& i : kIllegal)
    if (i.applies(*this)) fail<ConfigError>(i.what, " is not allowed: ", i.why);
  if (steps) {
    require(*steps >= 1, "steps", *steps, "at least 1");
    if (*steps % num_blocks())
      fail<ConfigError>("steps = ", *steps, " is not allowed: it must be a multiple of the number of blocks, ",
                        num_blocks(), " (gen_length = ", gen_length, ", block_length = ", block_length, ")");
  }
}

void GenerationConfig::validate_for(int64_t vocab_size, int64_t n_layers) const {
  if (!token_frequencies.empty() && int64_t(token_frequencies.size()) != vocab_size)
    fail<ConfigError>("token_frequencies has ", token_frequencies.size(), " entries; this model's vocabulary has ",
                      vocab_size);
  for (int64_t layer : dllm.always_refresh_layers)
    if (cache == CacheKind::DLLM && layer >= n_layers)
      fail<ConfigError>("always_refresh_layers holds ", layer, "; this model has the layers 0 to ", n_layers - 1);
}

const char* name_of(Remasking r) { return kRemasking[int(r)]; }
const char* name_of(Schedule s) { return kSchedules[int(s)]; }
const char* name_of(CacheKind c) { return kCaches[int(c)]; }
void set_by_name(Remasking& r, const std::string& n) { r = from_name<Remasking>("remasking", kRemasking, n); }
void set_by_name(Schedule& s, const std::string& n) { s = from_name<Schedule>("schedule", kSchedules, n); }
void set_by_name(CacheKind& c, const std::string& n) { c = from_name<CacheKind>("cache", kCaches, n); }

}  // namespace dllm
