// What a call of generate() is given beside the prompts and the GenerationConfig.
#pragma once

#include <atomic>
#include <cstdint>

#include "engine/events.h"

namespace dllm {

struct GenerateOptions {
  bool infill = false;  // prompt positions that hold the mask id are to be filled
  int64_t batch_size = 8;  // sequences that run at a time; no result depends on it (but with reference_quirks and d2)
  StepCallback on_step;
  const std::atomic<bool>* interrupt = nullptr;  // polled before every step
};

}  // namespace dllm
