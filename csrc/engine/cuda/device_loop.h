// The denoising loop on the device: planning, the layers, choosing and committing are launches in one stream, and the plan,
// the canvas and the counts stay in device memory. The host submits steps and follows one step behind by the records they
// leave in pinned memory; inside a block it waits for nothing but the step before the one under way.
//
// A launch is sized by what the host expects. Where a step needs more (the block ended earlier than expected and the next
// begins with a full pass; d2Cache chose more rows than before), it does nothing and says what it needs. So a block costs at
// most one step in vain, and a result never depends on what the host expected.
//
// A step's launches are captured as a graph when their shape comes up for the second time, and replayed from then on.
// DLLM_CUDA_GRAPHS=0 in the environment switches that off.
#pragma once

#include <deque>
#include <optional>

#include "engine/cuda/loop_memory.h"
#include "engine/loop.h"
#include "engine/sequence.h"
#include "model/cuda/cuda_model.h"
#include "runtime/nvtx.h"

namespace dllm {

class DeviceLoop final : public Loop {
 public:
  DeviceLoop(const ModelSpec& spec, CudaModel& model);

  // All but what needs whole rows of logits, and the quirks of released code.
  bool supports(const GenerationConfig& config) const override;
  std::vector<Result> generate(const std::vector<std::vector<int32_t>>& prompts, const GenerationConfig& config,
                               const GenerateOptions& options) override;

 private:
  // A place in the batch, and the host's copy of its sequence, one step behind.
  struct Slot {
    std::unique_ptr<Sequence> sequence;
    DeviceBuffer memory;
    int32_t rows = 0;  // of its last step
    int32_t blocks = 0, first_editable = 0;
    NvtxSpan block;
  };
  // Where a sequence will be, as far as the host knows.
  struct Place {
    int64_t block, step, step_in_block;
    int64_t eligible;  // positions of the block that may still be committed, at most; 0: it is finished
  };
  struct Flight {
    Device::Mark mark;
    size_t ring;
    StepShape shape;
    cuda::StepNeeds limits;
    std::vector<const Sequence*> sequences;  // per slot; null: none
    // Finished while it was under way: it may still write to their slabs.
    std::vector<std::unique_ptr<Sequence>> retired;
  };
  struct Cleanup {
    DeviceLoop& loop;
    ~Cleanup();
  };
  // What of a call's settings is baked into launches, beside shapes.
  struct LaunchConfig {
    ops::RowStatsParams params;
    uint64_t seed;
    CacheKind cache;
    DLLMCacheConfig dllm;
    D2CacheConfig d2;
    bool operator==(const LaunchConfig&) const = default;
  };
  struct CachedGraph {
    StepShape shape;
    cuda::StepNeeds limits;
    LaunchConfig config;
    int64_t generation;  // of the model's memory (an address would not tell: allocators give the same one again)
    std::unique_ptr<Graph> graph;  // null: seen once
  };

  void prepare(const std::vector<std::vector<int32_t>>& prompts, const GenerationConfig& config,
               const GenerateOptions& options);
  void admit(size_t slot, std::unique_ptr<Sequence> sequence);
  Place after(const Slot& slot, Place place) const;
  cuda::StepNeeds needs_of(const Slot& slot, const Place& place) const;
  cuda::StepNeeds needs_at(const std::vector<std::optional<Place>>& places) const;
  cuda::StepNeeds expected_needs() const;
  StepShape shape_of(const cuda::StepNeeds& limits) const;
  void submit(const GenerateOptions& options);
  void launch_plan(const cuda::StepNeeds& limits);
  void launch_commit();
  void launch(const StepShape& shape, const cuda::StepNeeds& limits);
  void run_or_replay(const StepShape& shape, const cuda::StepNeeds& limits);
  LaunchConfig launch_config() const;
  void complete(const GenerateOptions& options, std::vector<Result>& results);
  bool is_full(const Slot& slot, const cuda::StepRecord& record) const;
  StepStats counters_of(const Slot& slot, const cuda::StepRecord& record, double seconds) const;
  [[noreturn]] void report_not_finite(int64_t step);

  const ModelSpec& spec_;
  CudaModel& model_;
  Device& device_;

  // Of the call in progress.
  const GenerationConfig* config_ = nullptr;
  ops::RowStatsParams params_;
  std::vector<uint8_t> always_refresh_;
  std::vector<Slot> slots_;
  std::deque<Flight> flights_;
  std::optional<cuda::StepNeeds> demanded_;  // by a step that did not fit
  size_t next_ring_ = 0;
  double last_completion_ = 0;

  LoopSize size_;
  DeviceBuffer memory_buffer_, frequencies_;
  LoopMemory memory_{};
  Pinned<cuda::StepRecord> records_;  // [rings][sequences]
  Pinned<cuda::CommittedToken> committed_;  // [rings][sequences][reads]
  Pinned<int32_t> computed_;  // [rings][sequences][length]; brought over where somebody listens
  std::vector<ops::cuda::KvView> slabs_;  // [layers][sequences], as on the device
  std::vector<void*> attention_features_, mlp_features_;
  std::vector<CachedGraph> graphs_;
  bool uses_graphs_;
};

}  // namespace dllm
