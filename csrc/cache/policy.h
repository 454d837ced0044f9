// A cache policy says which rows a step computes; everything else is the same for all of them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "decode/config.h"
#include "model/spec.h"
#include "model/step_input.h"
#include "runtime/bitmap.h"

namespace dllm {

// The block being decoded, as the list of its positions. The first block also owns the masked positions of the prompt.
struct BlockView {
  std::span<const int32_t> positions;  // ascending
  int32_t suffix_begin;  // first generated position of the block: the prefix cache recomputes from here on
  int64_t step;  // steps already taken in this block
};

// A sequence as a policy sees it when it plans a step.
struct SequenceView {
  int32_t prompt_length;
  int64_t block_length;    // of GenerationConfig; the last block may be shorter
  const Bitmap& editable;  // positions this generation decides
  const Bitmap& masked;    // those not yet committed
  int32_t first_stop;      // masked positions from here on are never read (the length, if there is no stop id)
  BlockView block;
  int64_t step;  // steps already taken
  int32_t length() const { return int32_t(masked.size()); }
};

struct StepPlan {
  std::vector<int32_t> rows;  // positions to compute, ascending
  bool importance = false;    // the policy wants attention rollout in StepOutcome
  FeatureStep features;       // has layers only where a layer computes some of the rows (dLLM-Cache)
};

// What a step brought, for policies that learn from it.
struct StepOutcome {
  struct Score {
    int32_t position;
    double certainty;  // decode/transfer.h
  };
  std::span<const Score> scores;         // of every masked position that was computed
  std::span<const int32_t> eligible;     // positions that could be committed, ascending
  std::span<const int32_t> committed;    // those that were, ascending
  std::span<const float> importance;     // [positions], where the plan asked for it
};

class CachePolicy {
 public:
  virtual ~CachePolicy() = default;

  // Plans the next step. stream: 0, or 1 for guidance's pass without the prompt, planned after it where it runs.
  // Row i - shift predicts position i (ModelSpec::logit_shift).
  virtual void plan(const SequenceView& view, int stream, StepPlan& out) = 0;
  // Told after the step's commits; `view` is the state after them, with the block of the step.
  virtual void observe(const SequenceView& view, const StepOutcome& outcome);
  // True: the next step reads the logits of every masked position that it computes, not only of the block's.
  virtual bool wants_all_scores() const { return false; }

  // Sequences of one batch influence each other in the released d2Cache, and only there. Called on one policy of a step's
  // sequences with all of them, after they have planned, and after they have observed.
  virtual void plan_together(std::span<CachePolicy* const> batch, std::span<StepPlan* const> plans);
  virtual void observe_together(std::span<CachePolicy* const> batch);
};

std::unique_ptr<CachePolicy> make_cache_policy(const GenerationConfig& config, const ModelSpec& spec);

void plan_everything(int32_t length, StepPlan& out);

// The policies, one per file.
std::unique_ptr<CachePolicy> make_no_cache();
std::unique_ptr<CachePolicy> make_prefix_cache(const GenerationConfig& config, const ModelSpec& spec);
std::unique_ptr<CachePolicy> make_dual_cache(const ModelSpec& spec);
std::unique_ptr<CachePolicy> make_dllm_cache(const GenerationConfig& config, const ModelSpec& spec);
std::unique_ptr<CachePolicy> make_d2_cache(const GenerationConfig& config, const ModelSpec& spec);
std::unique_ptr<CachePolicy> make_released_d2_cache(const GenerationConfig& config, const ModelSpec& spec);

}  // namespace dllm
