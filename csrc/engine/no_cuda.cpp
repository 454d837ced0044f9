// Builds without CUDA: what asks for it is told so.
#include "engine/loop.h"
#include "model/model.h"
#include "runtime/error.h"

namespace dllm {

std::unique_ptr<Model> load_cuda_model(const ModelSpec&, std::unique_ptr<Checkpoint>, DType, Quantization,
                                       const LoadProgress&) {
  fail<ConfigError>("device = \"cuda\" is not available: this build of dllm_ext has no CUDA code (dllm info says why)");
}

std::unique_ptr<Loop> make_device_loop(const ModelSpec&, Model&) { return nullptr; }

}  // namespace dllm
