// The engine on the emulated device against the CPU, natively: what runs under AddressSanitizer and under the race
// detector. python_tests/cuda/test_engine_emulated.py has the whole matrix.

#include <cstdlib>

#include "cuda_emulator/device.h"
#include "cuda_emulator/races.h"
#include "engine/engine.h"
#include "tests/check.h"
#include "tests/tiny_model.h"

using namespace dllm;
using dllm::test::TempFolder;

namespace {

const std::vector<std::vector<int32_t>> kPrompts = {{5, 9, 13, 2, 7}, {3, 4, 8}};

GenerationConfig short_config(CacheKind cache) {
  GenerationConfig c;
  c.gen_length = 12;
  c.block_length = 6;
  c.threshold = 0.3;
  c.cache = cache;
  c.stop_at_eos = false;
  if (cache == CacheKind::D2) c.d2 = {.rollout_p = 0.3, .current_k = 4};
  if (cache == CacheKind::DLLM) c.dllm = {.kp = 5, .kr = 3};
  return c;
}

std::string tokens_of(const std::vector<Result>& results) {
  std::string s;
  for (const Result& r : results) {
    for (int32_t id : r.token_ids) s += std::to_string(id) + " ";
    s += "in " + std::to_string(r.nfe) + "; ";
  }
  return s;
}

// Equal tokens from both devices, with the device's loop and with the host's (guidance), for one cache.
void compare(Family family, CacheKind cache) {
  const TempFolder folder;
  test::write_tiny_model(folder, family);
  Engine cpu(folder.path(), DType::F32), cuda(folder.path(), DType::F32, Quantization::None, {}, "cuda");
  GenerationConfig config = short_config(cache);
  CHECK_EQ(tokens_of(cuda.generate(kPrompts, config)), tokens_of(cpu.generate(kPrompts, config)));
  config.temperature = 0.7;
  CHECK_EQ(tokens_of(cuda.generate(kPrompts, config)), tokens_of(cpu.generate(kPrompts, config)));
  config.temperature = 0;
  config.cfg_scale = 1;
  CHECK_EQ(tokens_of(cuda.generate(kPrompts, config)), tokens_of(cpu.generate(kPrompts, config)));
  if constexpr (emu::kRaces)
    for (const std::string& report : emu::races::take_reports()) CHECK_EQ(report, "");
}

}  // namespace

TEST(cuda_engine_none) { compare(Family::LLaDA, CacheKind::None); }
TEST(cuda_engine_prefix) { compare(Family::Dream, CacheKind::Prefix); }
TEST(cuda_engine_dual) { compare(Family::LLaDA, CacheKind::Dual); }
TEST(cuda_engine_dllm) { compare(Family::LLaDA, CacheKind::DLLM); }
TEST(cuda_engine_dllm_dream) { compare(Family::Dream, CacheKind::DLLM); }
TEST(cuda_engine_d2) { compare(Family::LLaDA, CacheKind::D2); }
TEST(cuda_engine_d2_dream) { compare(Family::Dream, CacheKind::D2); }

TEST(cuda_engine_random_order) {
  emu::config().order = emu::Order::Random;
  emu::config().copy_async = emu::CopyAsync::Early;
  compare(Family::Dream, CacheKind::D2);
  compare(Family::LLaDA, CacheKind::DLLM);
  emu::config() = {};
}

TEST(cuda_engine_errors) {
  const TempFolder folder;
  test::write_tiny_model(folder, Family::LLaDA);
  CHECK_THROWS(ConfigError, "head_dim", Engine(folder.path(), DType::BF16, Quantization::None, {}, "cuda"));
  CHECK_THROWS(ConfigError, "multiple", Engine(folder.path(), DType::F32, Quantization::Int8, {}, "cuda"));
  CHECK_THROWS(ConfigError, "device", Engine(folder.path(), DType::F32, Quantization::None, {}, "tpu"));
  CHECK_THROWS(ConfigError, "float16", Engine(folder.path(), DType::F16));
}
