// The engine: a model and the denoising loop. This is the whole C++ API; Python's dllm_ext.Engine adds tokenizers.
//
//   dllm::Engine engine("path/to/model", dllm::DType::BF16);   // on a GPU: , Quantization::None, {}, "cuda"
//   dllm::GenerationConfig config;                       // prefix cache, block 32, threshold 0.9
//   auto results = engine.generate({prompt_ids}, config);
//   results[0].token_ids;
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "decode/config.h"
#include "engine/events.h"
#include "engine/loop.h"
#include "engine/options.h"
#include "engine/sequence.h"
#include "model/model.h"

namespace dllm {

class Engine {
 public:
  // Loads a checkpoint folder (config.json and safetensors).
  // device: "cpu" or "cuda".
  Engine(const std::string& folder, DType dtype, Quantization quantization = Quantization::None,
         const LoadProgress& progress = {}, const std::string& device = "cpu");
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const ModelSpec& spec() const { return spec_; }
  Model& model() { return *model_; }

  // One result per prompt, in order. Prompts are token ids; lengths may differ. Calls from several threads take turns;
  // a call from within on_step is a UsageError. After any exception the engine can be used again.
  std::vector<Result> generate(const std::vector<std::vector<int32_t>>& prompts, const GenerationConfig& config,
                               const GenerateOptions& options = {});

  // Natural logarithms of the probabilities of tokens that are hidden: hidden[i] are ascending positions of sequences[i],
  // which the model sees masked, all of them at once, beside the other tokens. The softmax is over the whole vocabulary,
  // in fp64 over fp32 logits. Takes hidden x vocab x 4 bytes.
  std::vector<std::vector<double>> log_probs(const std::vector<std::vector<int32_t>>& sequences,
                                             const std::vector<std::vector<int32_t>>& hidden);

 private:
  // Calls take turns; one from within on_step is a UsageError.
  class Exclusive {
   public:
    Exclusive(Engine& engine, const char* function);
    ~Exclusive();

   private:
    Engine& engine_;
    std::unique_lock<std::mutex> lock_;
  };

  Engine(std::unique_ptr<Checkpoint> checkpoint, DType dtype, Quantization quantization, const LoadProgress& progress,
         const std::string& device);
  void check_prompt(size_t index, const std::vector<int32_t>& prompt, const GenerationConfig& config,
                    bool infill) const;
  void reserve(const StepSize& most, const GenerationConfig& config);
  void step(const GenerationConfig& config, const GenerateOptions& options);
  void evaluate(const GenerationConfig& config);
  void combine_logits(const GenerationConfig& config);
  void fill_blanks(const GenerationConfig& config);
  void require_finite();

  ModelSpec spec_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Loop> device_loop_;  // or null

  std::mutex mutex_;
  std::atomic<std::thread::id> running_;

  // Of the step in progress; kept so that their memory is reused.
  std::vector<Sequence*> active_;  // the sequences that take part
  std::vector<CachePolicy*> policies_;
  std::vector<StepPlan*> plans_;
  StepInput input_;
  std::vector<NoiseKey> keys_;
  std::vector<ops::RowStats> stats_, blank_stats_;  // of the sequences' reads() and blanks(), one after the other
  std::vector<float> blank_logits_;  // reference_quirks: [vocab], filtered
  int64_t bytes_taken_ = 0;  // buffers_taken() when the step before ended
};

}  // namespace dllm
