// A cache policy says which rows a step computes; everything else is the same for all of them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "decode/config.h"

namespace dllm {

// The block being decoded, as the list of its positions. The first block also owns the masked positions of the prompt.
struct BlockView {
  std::span<const int32_t> positions;  // ascending
  int32_t suffix_begin;  // first generated position of the block: the prefix cache recomputes from here on
  int64_t step;  // steps already taken in this block
};

struct StepPlan {
  std::vector<int32_t> rows;  // positions to compute, ascending
};

class CachePolicy {
 public:
  virtual ~CachePolicy() = default;

  // length: positions on the canvas. shift: 1 where token i is read from row i - 1 (ModelSpec::logit_shift).
  // The plan must contain row i - shift for every masked i of the block.
  virtual void plan(int32_t length, const BlockView& block, int shift, StepPlan& out) const = 0;
};

std::unique_ptr<CachePolicy> make_cache_policy(CacheKind kind);

}  // namespace dllm
