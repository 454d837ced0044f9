// What a sequence looks like while it is being decoded. A position is masked because its bit says so, never because its
// token equals the mask id: a literal mask token in a prompt is data.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/bitmap.h"

namespace dllm {

struct Canvas {
  int32_t prompt_length = 0;
  std::vector<int32_t> tokens;  // masked positions hold the mask id
  Bitmap editable;  // positions this generation decides: the generated ones, and infills of the prompt
  Bitmap masked;  // editable positions not yet committed

  int32_t length() const { return int32_t(tokens.size()); }
};

}  // namespace dllm
