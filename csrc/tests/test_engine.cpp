// The whole engine on tiny random models: what the sanitizers watch while every policy and decoder runs.

#include "engine/engine.h"

#include <algorithm>

#include "runtime/error.h"
#include "runtime/isa.h"
#include "tests/check.h"
#include "tests/tiny_model.h"

using namespace dllm;
using test::TempFolder;

namespace {

std::string join(const std::vector<int32_t>& v) {
  std::string s;
  for (int32_t i : v) s += std::to_string(i) + " ";
  return s;
}

const std::vector<int32_t> kPrompt = {5, 9, 1, 33, 60, 12, 7};

GenerationConfig short_config() {
  GenerationConfig c;
  c.gen_length = 21;
  c.block_length = 8;
  c.threshold = 0.2;
  c.stop_at_eos = false;
  return c;
}

std::vector<GenerationConfig> decoders() {
  std::vector<GenerationConfig> all(11, short_config());
  all[1].threshold.reset(), all[1].factor = 0.8;
  all[2].threshold.reset(), all[2].steps = 12;
  all[3].threshold.reset(), all[3].num_transfer_tokens = 2, all[3].remasking = Remasking::Entropy;
  all[4].threshold.reset(), all[4].steps = 12, all[4].schedule = Schedule::Dream, all[4].temperature = 0.5;
  all[4].top_p = 0.9, all[4].top_k = 20, all[4].alg_temp = 0.3;
  all[5].threshold.reset(), all[5].steps = 12, all[5].schedule = Schedule::Dream, all[5].remasking = Remasking::Origin;
  all[6].cfg_scale = 1.5, all[6].logits_eos_inf = true;
  all[7].threshold.reset(), all[7].num_transfer_tokens = 1, all[7].remasking = Remasking::Random;
  all[7].temperature = 1.0;
  all[8].threshold.reset(), all[8].gamma = 0.5, all[8].sigma = 3, all[8].remasking = Remasking::Entropy;
  all[9].kl_threshold = 0.5, all[9].cfg_scale = 0.5, all[9].token_frequencies.assign(70, 1.0 / 70);
  all[10].threshold.reset(), all[10].num_transfer_tokens = 2, all[10].position_decay = 0.3;
  return all;
}

}  // namespace

TEST(every_policy_decoder_family_and_precision_runs) {
  for (Family family : {Family::LLaDA, Family::Dream}) {
    const TempFolder f;
    test::write_tiny_model(f, family);
    for (DType t : {DType::F32, DType::BF16}) {
      Engine engine(f.path(), t);
      for (CacheKind cache : {CacheKind::None, CacheKind::Prefix, CacheKind::Dual, CacheKind::DLLM, CacheKind::D2})
        for (GenerationConfig c : decoders()) {
          if (cache == CacheKind::D2 && c.remasking == Remasking::Origin) continue;
          c.cache = cache;
          c.dllm.kp = cache == CacheKind::DLLM ? 6 : 50;
          c.d2.current_k = cache == CacheKind::D2 ? 5 : 32;
          GenerateOptions o;
          o.infill = true;  // the prompt holds a mask token at position 2
          const Result r = engine.generate({kPrompt}, c, o)[0];
          CHECK_EQ(r.token_ids.size(), 21u);
          CHECK(r.prompt_ids[2] != 1);
          int64_t commits = 0;
          for (const StepStats& s : r.steps) commits += s.commits;
          CHECK_EQ(commits, 22);
          CHECK_EQ(r.nfe, int64_t(r.steps.size()) * (c.cfg_scale > 0 ? 2 : 1));
        }
    }
  }
}

TEST(all_instruction_sets_give_the_same_tokens) {
  const TempFolder f;
  test::write_tiny_model(f, Family::LLaDA);
  std::string first;
  for (Isa isa : available_isas()) {
    set_isa(name_of(isa));
    Engine engine(f.path(), DType::F32);
    const std::string ids = join(engine.generate({kPrompt}, short_config())[0].token_ids);
    if (first.empty()) first = ids;
    CHECK_EQ(ids, first);
  }
  set_isa("auto");
}

TEST(a_batch_changes_no_result) {
  const TempFolder f;
  test::write_tiny_model(f, Family::Dream);
  Engine engine(f.path(), DType::F32);
  const std::vector<std::vector<int32_t>> prompts = {{3}, kPrompt, std::vector<int32_t>(40, 8), {4, 4}, kPrompt};
  GenerationConfig c = short_config();
  c.temperature = 0.7;
  for (int64_t batch_size : {1, 2, 8}) {
    GenerateOptions o;
    o.batch_size = batch_size;
    const auto together = engine.generate(prompts, c, o);
    for (size_t i = 0; i < prompts.size(); ++i)
      CHECK_EQ(join(together[i].token_ids), join(engine.generate({prompts[i]}, c)[0].token_ids));
  }
}

TEST(released_behaviour_runs) {
  for (Family family : {Family::LLaDA, Family::Dream}) {
    const TempFolder f;
    test::write_tiny_model(f, family);
    Engine engine(f.path(), DType::F32);
    for (CacheKind cache : {CacheKind::None, CacheKind::Prefix, CacheKind::Dual, CacheKind::DLLM, CacheKind::D2})
      for (GenerationConfig c : decoders()) {
        if (c.steps || c.cfg_scale > 0 || c.alg_temp || c.position_decay > 0) continue;
        c.cache = cache;
        c.reference_quirks = true;
        const auto results = engine.generate({kPrompt, {5, 9, 2, 33, 61, 12, 7}}, c);
        for (const Result& r : results) CHECK_EQ(std::count(r.commit_steps.begin(), r.commit_steps.end(), -1), 0);
      }
    GenerationConfig c = short_config();
    c.cache = CacheKind::D2;
    c.reference_quirks = true;
    CHECK_THROWS(ConfigError, "equal lengths", engine.generate({kPrompt, {5}}, c));
    GenerateOptions o;
    o.infill = true;
    CHECK_THROWS(ConfigError, "infill", engine.generate({kPrompt}, c, o));
  }
}

TEST(guidance_difference_is_reused) {
  const TempFolder f;
  test::write_tiny_model(f, Family::Dream);
  Engine engine(f.path(), DType::F32);
  GenerationConfig c = short_config();
  c.threshold.reset(), c.num_transfer_tokens = 1, c.cfg_scale = 1, c.cache = CacheKind::DLLM;
  c.dllm.cfg_interval_steps = 4;
  const Result r = engine.generate({kPrompt}, c)[0];
  CHECK_EQ(r.nfe, 21 + 5 + 4);  // steps 0 to 4, then 8, 12, 16, 20
}

TEST(the_engine_survives_being_stopped) {
  const TempFolder f;
  test::write_tiny_model(f, Family::LLaDA);
  Engine engine(f.path(), DType::F32);
  const std::string before = join(engine.generate({kPrompt}, short_config())[0].token_ids);
  GenerateOptions o;
  o.on_step = [](const StepEvent& e) { return e.step < 2; };
  CHECK_THROWS(Interrupted, "on_step", engine.generate({kPrompt}, short_config(), o));
  const std::atomic<bool> raised = true;
  o = {};
  o.interrupt = &raised;
  CHECK_THROWS(Interrupted, "interrupted", engine.generate({kPrompt}, short_config(), o));
  o = {};
  o.on_step = [&](const StepEvent&) {
    engine.generate({kPrompt}, short_config());
    return true;
  };
  CHECK_THROWS(UsageError, "on_step", engine.generate({kPrompt}, short_config(), o));
  CHECK_EQ(join(engine.generate({kPrompt}, short_config())[0].token_ids), before);
}

TEST(prompts_are_checked) {
  const TempFolder f;
  test::write_tiny_model(f, Family::Dream);
  Engine engine(f.path(), DType::F32);
  GenerationConfig c = short_config();
  CHECK_THROWS(InputError, "the id 70", engine.generate({{1, 70}}, c));
  CHECK_THROWS(InputError, "the id -1", engine.generate({{-1}}, c));
  CHECK_THROWS(InputError, "empty", engine.generate({{}}, c));
  CHECK_THROWS(InputError, "context of 256", engine.generate({std::vector<int32_t>(236, 3)}, c));
  c.gen_length = 0;
  CHECK_THROWS(ConfigError, "gen_length = 0", engine.generate({{3}}, c));
}

TEST(nan_is_reported_with_step_and_layer) {
  const TempFolder f;
  test::write_tiny_model(f, Family::LLaDA, NAN);
  Engine engine(f.path(), DType::F32);
  CHECK_THROWS(NumericalError, "at step 0: layer 1", engine.generate({kPrompt}, short_config()));
}
