// Changes to whole logits rows, for the methods that need them: guidance, nucleus and top-k filtering.
#pragma once

#include <cstdint>

#include "decode/config.h"
#include "ops/row_stats.h"

namespace dllm {

// Classifier-free guidance as LLaDA's generate.py has it: cond = un + (scale + 1) (cond - un).
void apply_guidance(float* cond, const float* uncond, int64_t vocab, float scale);

// Guidance from a kept difference cond - un (dLLM-Cache's cfg_interval_steps): cond + scale * difference.
void apply_kept_guidance(float* cond, const float* difference, int64_t vocab, float scale);

// Bans, divides by the temperature (Dream schedule), then filters by top_p and then top_k: a filtered id gets -inf.
// The statistics pass that follows must not ban or divide again. The best proposable id always stays.
//   top_p: by falling probability (equal: lowest id first) ids are kept until their sum exceeds top_p, the one that
//   crosses included. top_k: ids whose logit is at least the k-th largest are kept.
void filter_row(float* logits, int64_t vocab, const GenerationConfig& config, const ops::RowStatsParams& params);

}  // namespace dllm
