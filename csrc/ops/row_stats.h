// Everything a decoder needs to know about a row of logits, from one pass over it; and the LM head fused with that pass,
// vocabulary tile by vocabulary tile, so that no [rows, vocab] tensor exists on the decode path.
#pragma once

#include <cstdint>

#include "ops/philox.h"
#include "runtime/dtype.h"

namespace dllm {
class Buffer;
}

namespace dllm::ops {

struct PackedLinear;

// Ties go to the lowest token id. The mask id stays in the softmax but is never proposed (a committed mask token would be
// a hole in the text). Exponentials are fp32, their sums fp64: 1 - p is resolved far below fp32's 6e-8.
struct RowStats {
  int32_t top1_id = -1, top2_id = -1;  // best and second best ids other than the mask id; -1: there is none
  float top1_logit = 0, top2_logit = 0;
  double log_sum_exp = 0;  // over every id that is not banned or filtered (logit -inf)
  double entropy = 0;  // -sum p ln p, in nats
  int32_t sampled_id = -1;  // argmax of logit + noise_scale * gumbel; the same as top1_id where noise_scale is 0
  float sampled_logit = 0;  // its logit without the noise
  bool finite = true;  // no NaN and no +inf among the logits, and at least one proposable id
};

struct RowStatsParams {
  int32_t mask_id = -1;
  int32_t banned_id = -1;  // logit taken as -inf (logits_eos_inf), -1: none
  float temperature = 1.0f;  // logits are divided by this first (the Dream schedule); 1: untouched, bit for bit
  double noise_scale = 0.0;  // > 0: Gumbel noise of stream Token times this, added in fp64
  bool operator==(const RowStatsParams&) const = default;
};

// Statistics of rows of given logits [rows, vocab] (fp32; -inf marks a filtered id); keys [rows] is read only if
// noise_scale > 0. The result is the same as lm_head_stats gives for the same logits, bit for bit.
void row_stats(const float* logits, int64_t rows, int64_t vocab, int64_t ld, const RowStatsParams& params,
               const NoiseKey* keys, RowStats* out);

// Statistics of x W^T without storing it. x [rows, k] as in LinearArgs. scratch grows as needed and is reused.
void lm_head_stats(const PackedLinear& head, const void* x, DType x_dtype, int64_t rows, int64_t ldx,
                   const RowStatsParams& params, const NoiseKey* keys, RowStats* out, Buffer& scratch);

}  // namespace dllm::ops
