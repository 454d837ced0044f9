// A step's plan in device memory: which rows, of which sequences, and where those keep what they cache. It lies in one
// allocation, so that the host can send a whole plan in one copy (cuda_model.cpp), and kernels can write it where the loop
// runs on the device (engine/cuda).
#pragma once

#include <cstdint>

#include "ops/cuda/features.h"
#include "ops/cuda/step.h"
#include "ops/philox.h"
#include "runtime/carver.h"

namespace dllm {

// How large a plan may get.
struct StepCapacity {
  int32_t rows = 0, out_rows = 0, sequences = 0, layers = 0;
  bool holds(const StepCapacity& c) const {
    return c.rows <= rows && c.out_rows <= out_rows && c.sequences <= sequences && c.layers <= layers;
  }
};

struct StepMemory {
  ops::cuda::RowList step;  // every row of the step; row[i] = i
  ops::cuda::RowList verified;  // rows whose V is compared (dLLM-Cache)
  int32_t* tokens;  // [rows]
  int32_t* is_response;  // [rows]
  int32_t* out_rows;  // [out_rows]: rows whose final hidden state is wanted
  int32_t* out_count;
  NoiseKey* keys;  // [out_rows]
  ops::cuda::LayerPlan* plans;  // [layers][sequences]
  ops::cuda::KvView* slabs;  // [layers][sequences]
  void** attention_features;  // [layers][sequences]
  void** mlp_features;
  size_t bytes;  // of all

  // The same layout wherever it lies: in device memory at `base`, or in the host's copy of it.
  static StepMemory at(void* base, const StepCapacity& c) {
    StepMemory m{};
    Carver carver(base);
    const auto list = [&](ops::cuda::RowList& l) {
      carver.take(l.count, 1);
      carver.take(l.sequences, c.sequences);
      carver.take(l.row, c.rows);
      carver.take(l.position, c.rows);
      carver.take(l.sequence, c.rows);
      l.capacity = c.rows;
    };
    list(m.step);
    list(m.verified);
    carver.take(m.tokens, c.rows);
    carver.take(m.is_response, c.rows);
    carver.take(m.out_rows, c.out_rows);
    carver.take(m.out_count, 1);
    carver.take(m.keys, c.out_rows);
    carver.take(m.plans, int64_t(c.layers) * c.sequences);
    carver.take(m.slabs, int64_t(c.layers) * c.sequences);
    carver.take(m.attention_features, int64_t(c.layers) * c.sequences);
    carver.take(m.mlp_features, int64_t(c.layers) * c.sequences);
    m.bytes = carver.bytes();
    return m;
  }
};

}  // namespace dllm
