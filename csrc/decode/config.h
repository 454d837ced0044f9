// GenerationConfig: how one generation is decoded. The fields, their defaults and their meaning are those of
// dllm_ext.GenerationConfig; this struct is where they are checked, for Python and C++ alike.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace dllm {

enum class Remasking {
  LowConfidence,  // p(x0)                    LLaDA "low_confidence", Dream "maskgit_plus"
  TopkMargin,     // p(1) - p(2)              Dream "topk_margin"
  Entropy,        // sum p ln p               Dream "entropy"
  Random,         // U(0, 1)                  LLaDA "random"
  Origin,         // independent transfers    Dream "origin"
};
enum class Schedule { LLaDA, Dream };
enum class CacheKind { None, Prefix, Dual, DLLM, D2 };

// How many positions a step commits: exactly one of these rules is in force.
enum class TransferRule { Steps, Threshold, Factor, Gamma, Count };

// dLLM-Cache (arXiv 2506.06295), csrc/cache/dllm_policy.cpp.
struct DLLMCacheConfig {
  int64_t kp = 50, kr = 2;  // steps between refreshes of the prompt and of the response
  double rou = 0.25;        // share of the response refreshed in between, by least similarity of V
  std::vector<int64_t> always_refresh_layers = {0};
  int64_t cfg_interval_steps = 1;  // steps between evaluations of the guidance difference
  bool operator==(const DLLMCacheConfig&) const = default;
};

// d2Cache (arXiv 2509.23094), csrc/cache/d2_policy.cpp.
struct D2CacheConfig {
  double rollout_p = 0.1;  // share of attention rollout kept among the rows that nothing else asks for
  int64_t current_k = 32;  // masked positions computed per step
  double sigma = 10;       // of the certainty density
  int64_t inflate_w = 4;   // gaps up to this wide between computed rows are filled; 0: off
  bool operator==(const D2CacheConfig&) const = default;
};

struct GenerationConfig {
  int64_t gen_length = 128;
  int64_t block_length = 32;
  std::optional<int64_t> steps;
  std::optional<int64_t> num_transfer_tokens;
  double temperature = 0;
  std::optional<double> top_p;
  std::optional<int64_t> top_k;
  Remasking remasking = Remasking::LowConfidence;
  Schedule schedule = Schedule::LLaDA;
  double eps = 1e-3;
  std::optional<double> alg_temp;
  std::optional<double> threshold;  // 0.9 where no other rule is given
  std::optional<double> factor;
  std::optional<double> gamma;         // EB-sampler
  std::optional<double> kl_threshold;  // KLASS, in front of threshold or factor
  int64_t kl_history_length = 2;
  std::optional<double> sigma;            // certainty prior; see prior_sigma
  std::vector<double> token_frequencies;  // [vocab], PC-Sampler; empty: off
  double clip_alpha = 10;
  double position_decay = 0;
  bool autoregressive = false;
  double cfg_scale = 0;
  bool logits_eos_inf = false;
  bool confidence_eos_eot_inf = false;
  bool stop_at_eos = true;
  uint64_t seed = 0;
  CacheKind cache = CacheKind::Prefix;
  DLLMCacheConfig dllm;
  D2CacheConfig d2;
  bool reference_quirks = false;  // the released d2Cache harness instead of the algorithms as stated

  int64_t num_blocks() const { return gen_length == 0 ? 1 : (gen_length + block_length - 1) / block_length; }
  int64_t steps_per_block() const { return *steps / num_blocks(); }
  TransferRule rule() const;
  double effective_threshold() const { return threshold.value_or(0.9); }
  int64_t min_transfer() const { return num_transfer_tokens.value_or(1); }
  bool needs_logits() const { return cfg_scale > 0 || top_p || top_k || kl_threshold; }
  // Of the certainty prior in force, 0: none. A d2 cache brings its own where no rule looks at bare confidences.
  double prior_sigma() const;
  bool has_score_transform() const { return prior_sigma() > 0 || !token_frequencies.empty() || position_decay > 0; }

  // ConfigError names the field, its value and what is allowed; combinations are checked against a table.
  void validate() const;
  // What can only be checked beside a model: the length of token_frequencies, the layers of a cache.
  void validate_for(int64_t vocab_size, int64_t n_layers) const;
};

// f(name, field) for every field: the one list that Python's dicts and the command line of tools/ are read with.
template <class Config, class F>
void for_each_field(Config& c, F&& f) {
  f("gen_length", c.gen_length);
  f("block_length", c.block_length);
  f("steps", c.steps);
  f("num_transfer_tokens", c.num_transfer_tokens);
  f("temperature", c.temperature);
  f("top_p", c.top_p);
  f("top_k", c.top_k);
  f("remasking", c.remasking);
  f("schedule", c.schedule);
  f("eps", c.eps);
  f("alg_temp", c.alg_temp);
  f("threshold", c.threshold);
  f("factor", c.factor);
  f("gamma", c.gamma);
  f("kl_threshold", c.kl_threshold);
  f("kl_history_length", c.kl_history_length);
  f("sigma", c.sigma);
  f("token_frequencies", c.token_frequencies);
  f("clip_alpha", c.clip_alpha);
  f("position_decay", c.position_decay);
  f("autoregressive", c.autoregressive);
  f("cfg_scale", c.cfg_scale);
  f("logits_eos_inf", c.logits_eos_inf);
  f("confidence_eos_eot_inf", c.confidence_eos_eot_inf);
  f("stop_at_eos", c.stop_at_eos);
  f("seed", c.seed);
  f("cache", c.cache);
  f("kp", c.dllm.kp);
  f("kr", c.dllm.kr);
  f("rou", c.dllm.rou);
  f("always_refresh_layers", c.dllm.always_refresh_layers);
  f("cfg_interval_steps", c.dllm.cfg_interval_steps);
  f("rollout_p", c.d2.rollout_p);
  f("current_k", c.d2.current_k);
  f("d2_sigma", c.d2.sigma);
  f("inflate_w", c.d2.inflate_w);
  f("reference_quirks", c.reference_quirks);
}

// The names used in Python and on command lines; set_by_name throws a ConfigError that lists what exists.
const char* name_of(Remasking r);
const char* name_of(Schedule s);
const char* name_of(CacheKind c);
void set_by_name(Remasking& r, const std::string& name);
void set_by_name(Schedule& s, const std::string& name);
void set_by_name(CacheKind& c, const std::string& name);

}  // namespace dllm
