// What one step gives the transformer: rows of several sequences, packed one after the other without padding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "ops/features.h"
#include "ops/kv_layout.h"

namespace dllm {

// dLLM-Cache (arXiv 2506.06295): a layer computes some of the step's rows, the others get the outputs that its attention
// and MLP had when they were last computed. Rows are numbered within the sequence's part of the step.
struct FeatureStep {
  struct Refresh {
    bool prompt, response;  // every row of the part is computed
  };
  std::vector<Refresh> layers;
  std::vector<int32_t> prompt_rows, response_rows;  // ascending, together all rows of the step
  // Where the response is not refreshed: V of all of its rows is written, and this many of them are computed, those whose V
  // was least similar before. -1: neither.
  int64_t n_verify = -1;
  std::vector<int32_t> last_rows;  // ascending: rows whose final hidden state is or may yet be read
};

// The kept outputs of one layer.
struct LayerFeatures {
  ops::FeatureSlab attention, mlp;
};

// How large a step may get: what memory is reserved for before it is needed.
struct StepSize {
  int64_t rows = 0, out_rows = 0, sequences = 0;  // of StepInput, in all
  int64_t keys = 0;  // of the longest sequence
  bool logits = false, features = false, importance = false;  // asked for

  void add(const StepSize& s) {
    rows += s.rows;
    out_rows += s.out_rows;
    sequences += s.sequences;
    keys = std::max(keys, s.keys);
    logits |= s.logits;
    features |= s.features;
    importance |= s.importance;
  }
};

struct StepInput {
  struct Sequence {
    int64_t row_begin, row_end;
    int64_t n_keys;  // slots that hold a position of this sequence
    std::span<const ops::KvSlab> slabs;  // one per layer
    bool importance = false;  // report attention rollout (ops/rollout.h)
    const FeatureStep* features = nullptr;  // or null: every layer computes every row
    std::span<const LayerFeatures> feature_slabs = {};  // one per layer
  };
  std::vector<int32_t> tokens, positions;  // [rows]; positions ascend within a sequence
  std::vector<Sequence> sequences;
  std::vector<int32_t> out_rows;  // rows whose final hidden state is wanted, ascending

  void clear() {
    tokens.clear();
    positions.clear();
    sequences.clear();
    out_rows.clear();
  }
  void reserve(const StepSize& most) {
    tokens.reserve(size_t(most.rows));
    positions.reserve(size_t(most.rows));
    sequences.reserve(size_t(most.sequences));
    out_rows.reserve(size_t(most.out_rows));
  }
};

}  // namespace dllm
