// A denoising loop of its own for a device. The engine's loop (engine.cpp) runs everything everywhere, with the host
// choosing after every step; where a device can choose by itself, this takes over.
#pragma once

#include <memory>
#include <vector>

#include "decode/config.h"
#include "engine/events.h"
#include "engine/options.h"
#include "model/model.h"

namespace dllm {

class Loop {
 public:
  virtual ~Loop() = default;
  virtual bool supports(const GenerationConfig& config) const = 0;
  // As Engine::generate, which has checked the arguments.
  virtual std::vector<Result> generate(const std::vector<std::vector<int32_t>>& prompts, const GenerationConfig& config,
                                       const GenerateOptions& options) = 0;
};

// Null where the model's device leaves the choice to the host.
std::unique_ptr<Loop> make_device_loop(const ModelSpec& spec, Model& model);

}  // namespace dllm
