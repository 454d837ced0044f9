// GenerationConfig: how one generation is decoded. The fields, their defaults and their meaning are those of
// dllm_ext.GenerationConfig; this struct is where they are checked, for Python and C++ alike.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace dllm {

enum class Remasking {
  LowConfidence,  // p(x0)                    LLaDA "low_confidence", Dream "maskgit_plus"
  TopkMargin,     // p(1) - p(2)              Dream "topk_margin"
  Entropy,        // sum p ln p               Dream "entropy"
  Random,         // U(0, 1)                  LLaDA "random"
  Origin,         // independent transfers    Dream "origin"
};
enum class Schedule { LLaDA, Dream };
enum class CacheKind { None, Prefix, Dual };

// How many positions a step commits: exactly one of these rules is in force.
enum class TransferRule { Steps, Threshold, Factor, Count };

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
  double cfg_scale = 0;
  bool logits_eos_inf = false;
  bool confidence_eos_eot_inf = false;
  bool stop_at_eos = true;
  uint64_t seed = 0;
  CacheKind cache = CacheKind::Prefix;

  int64_t num_blocks() const { return gen_length == 0 ? 1 : (gen_length + block_length - 1) / block_length; }
  int64_t steps_per_block() const { return *steps / num_blocks(); }
  TransferRule rule() const;
  double effective_threshold() const { return threshold.value_or(0.9); }
  int64_t min_transfer() const { return num_transfer_tokens.value_or(1); }
  bool needs_logits() const { return cfg_scale > 0 || top_p || top_k; }

  // ConfigError names the field, its value and what is allowed; combinations are checked against a table.
  void validate() const;
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
  f("cfg_scale", c.cfg_scale);
  f("logits_eos_inf", c.logits_eos_inf);
  f("confidence_eos_eot_inf", c.confidence_eos_eot_inf);
  f("stop_at_eos", c.stop_at_eos);
  f("seed", c.seed);
  f("cache", c.cache);
}

// The names used in Python and on command lines; set_by_name throws a ConfigError that lists what exists.
const char* name_of(Remasking r);
const char* name_of(Schedule s);
const char* name_of(CacheKind c);
void set_by_name(Remasking& r, const std::string& name);
void set_by_name(Schedule& s, const std::string& name);
void set_by_name(CacheKind& c, const std::string& name);

}  // namespace dllm
