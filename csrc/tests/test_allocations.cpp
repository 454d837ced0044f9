// The denoising loop takes no memory: every allocation of this executable is counted, step by step. Only a step before which
// a sequence began may show any: the sequence's slabs and lists, and scratch for the largest step that may follow. No later
// step may, not the full one at the start of a block either.
//
// One thread runs here. Kernels keep scratch per thread, which a thread takes when it first gets such work, and which thread
// gets what is chance: with several, only what lies outside that scratch can be held to nothing.

#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>
#include <utility>

#include "engine/engine.h"
#include "runtime/buffer.h"
#include "runtime/error.h"
#include "tests/check.h"
#include "tests/threads.h"
#include "tests/tiny_model.h"

namespace {
std::atomic<int64_t> news = 0;
}

// The array and nothrow forms end here as well.
void* operator new(size_t bytes) {
  ++news;
  if (void* p = std::malloc(bytes ? bytes : 1)) return p;
  throw std::bad_alloc();
}
void* operator new(size_t bytes, std::align_val_t align) {
  ++news;
  const size_t a = size_t(align);
  if (void* p = std::aligned_alloc(a, (bytes + a - 1) / a * a)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }

using namespace dllm;
using test::TempFolder;

namespace {

// Buffers come from aligned_alloc, which is not operator new. They are all that a kernel's scratch is made of.
int64_t allocations(bool buffers) { return news + (buffers ? buffers_taken().blocks : 0); }

struct Decoder {
  const char* name;
  void (*set)(GenerationConfig&);
};

const Decoder kDecoders[] = {
    {"threshold", [](GenerationConfig& c) { c.threshold = 0.2; }},
    {"steps", [](GenerationConfig& c) { c.steps = 12; }},
    {"two per step", [](GenerationConfig& c) { c.num_transfer_tokens = 2; }},
    {"factor", [](GenerationConfig& c) { c.factor = 0.8; }},
    {"EB-sampler", [](GenerationConfig& c) { c.gamma = 0.5, c.remasking = Remasking::Entropy; }},
    {"KLASS", [](GenerationConfig& c) { c.threshold = 0.2, c.kl_threshold = 0.5; }},
    {"certainty prior", [](GenerationConfig& c) { c.threshold = 0.2, c.sigma = 3; }},
    {"temperature", [](GenerationConfig& c) { c.num_transfer_tokens = 1, c.temperature = 0.7; }},
    {"guidance", [](GenerationConfig& c) { c.num_transfer_tokens = 1, c.cfg_scale = 1.5; }},
    {"kept guidance",
     [](GenerationConfig& c) { c.num_transfer_tokens = 1, c.cfg_scale = 1, c.dllm.cfg_interval_steps = 3; }},
    {"nucleus", [](GenerationConfig& c) { c.threshold = 0.2, c.temperature = 1, c.top_p = 0.9, c.top_k = 20; }},
    {"left to right", [](GenerationConfig& c) { c.threshold = 0.2, c.autoregressive = true; }},
    {"Dream schedule",
     [](GenerationConfig& c) { c.steps = 30, c.schedule = Schedule::Dream, c.temperature = 0.5, c.alg_temp = 0.3; }},
    {"Dream origin",
     [](GenerationConfig& c) { c.steps = 12, c.schedule = Schedule::Dream, c.remasking = Remasking::Origin; }},
};

// Allocations per step; a step is one round of on_step over the sequences that ran in it.
class StepCounts {
 public:
  explicit StepCounts(bool buffers) : buffers_(buffers) { steps_.reserve(1024); }

  bool note(const StepEvent& e) {
    if (e.sequence <= last_sequence_) steps_.emplace_back();
    last_sequence_ = e.sequence;
    Step& step = steps_.back();
    const int64_t now = allocations(buffers_);
    step.allocations += now - std::exchange(seen_, now);
    step.begins |= e.step == 0;
    return true;
  }

  // "step 3: 12, ..." of the steps before which no sequence began; empty if all is well.
  std::string surprises() const {
    std::string s;
    for (size_t i = 0; i < steps_.size(); ++i)
      if (steps_[i].allocations > 0 && !steps_[i].begins)
        s += " step " + std::to_string(i) + ": " + std::to_string(steps_[i].allocations);
    return s;
  }

 private:
  struct Step {
    int64_t allocations = 0;
    bool begins = false;  // a sequence's first
  };
  bool buffers_;  // count them too
  std::vector<Step> steps_;
  int64_t last_sequence_ = std::numeric_limits<int64_t>::max();
  int64_t seen_ = 0;
};

// Runs every cache with every decoder that goes with it, and fails with a list of the steps that allocated.
void check_steps(const std::vector<std::vector<int32_t>>& prompts, GenerateOptions options, bool quirks,
                 int threads = 1) {
  const test::Threads guard(threads);
  std::string failures;
  for (Family family : {Family::LLaDA, Family::Dream}) {
    const TempFolder folder;
    test::write_tiny_model(folder, family);
    for (CacheKind cache : {CacheKind::None, CacheKind::Prefix, CacheKind::Dual, CacheKind::DLLM, CacheKind::D2})
      for (const Decoder& decoder : kDecoders) {
        GenerationConfig c;
        c.gen_length = 21;
        c.block_length = 8;
        c.stop_at_eos = false;
        c.cache = cache;
        if (cache == CacheKind::DLLM) c.dllm.kp = 6;
        if (cache == CacheKind::D2) c.d2.current_k = 5;
        c.reference_quirks = quirks;
        decoder.set(c);
        try {
          c.validate();
        } catch (const ConfigError&) {
          continue;  // these do not go together
        }
        Engine engine(folder.path(), DType::F32);  // a new one: what an earlier generation left would hide something
        StepCounts counts(threads == 1);
        options.on_step = [&](const StepEvent& e) { return counts.note(e); };
        engine.generate(prompts, c, options);
        if (const std::string s = counts.surprises(); !s.empty())
          failures +=
              std::string("\n    ") + name_of(family) + ", cache " + name_of(cache) + ", " + decoder.name + ":" + s;
      }
  }
  if (!failures.empty()) test::fail_at(__FILE__, __LINE__, "allocations" + failures);
}

const std::vector<int32_t> kPrompt = {5, 9, 1, 33, 60, 12, 7};

}  // namespace

TEST(only_a_first_step_takes_memory) {
  GenerateOptions o;
  o.infill = true;  // the prompt holds a mask token at position 2
  check_steps({kPrompt}, o, false);
}

TEST(threads_take_nothing_but_their_scratch) { check_steps({kPrompt}, {}, false, 2); }

TEST(only_a_first_step_takes_memory_in_a_batch) {
  // The third prompt, the longest, begins when another sequence ends: later steps are larger than any before it.
  GenerateOptions o;
  o.batch_size = 2;
  check_steps({kPrompt, {3, 4}, std::vector<int32_t>(40, 8), {6, 2, 2}}, o, false);
}

TEST(only_a_first_step_takes_memory_as_released) { check_steps({kPrompt, {5, 9, 2, 33, 61, 12, 7}}, {}, true); }

TEST(results_count_the_memory_of_buffers) {
  const test::Threads one(1);
  const TempFolder folder;
  test::write_tiny_model(folder, Family::LLaDA);
  Engine engine(folder.path(), DType::F32);
  GenerationConfig c;
  c.gen_length = 32;
  c.block_length = 8;
  for (int run = 0; run < 2; ++run) {
    const int64_t before = buffers_taken().bytes;
    const Result r = engine.generate({kPrompt}, c)[0];
    // Two layers with two heads, 64 positions, 16 numbers of K and 32 of V each; the second time nothing else is new.
    const int64_t slabs = 2 * 2 * 64 * (16 + 32) * 4;
    CHECK(run == 0 ? r.steps[0].buffer_bytes > slabs : r.steps[0].buffer_bytes == slabs);
    CHECK_EQ(r.steps[0].buffer_bytes, buffers_taken().bytes - before);
    for (size_t i = 1; i < r.steps.size(); ++i) CHECK_EQ(r.steps[i].buffer_bytes, 0);
  }
}
