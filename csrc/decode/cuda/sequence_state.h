// A sequence on the device: its canvas, block and step, as the kernels of the loop keep them (cache/cuda/plan.cu,
// decode/cuda/commit.cu). The host follows one step behind, by the records.
#pragma once

#include <cstdint>

#include "decode/rules.h"

namespace dllm::cuda {

// Of a position.
enum Flag : uint8_t {
  kEditable = 1,  // this generation decides it
  kMasked = 2,  // not yet committed
  kFresh = 4,  // committed by the step before
};

// Certainty density (decode/density.h): its tables, and its values [length]. phi null: none is in force.
struct Density {
  const double *phi, *tail;
  double* value;
};

struct SequenceState {
  // Set by the host when the sequence takes its slot. Arrays are [length].
  int32_t active;  // the slot has a sequence
  int32_t length, prompt_length, first_editable, editable_count, n_blocks, block_length;
  int32_t* tokens;
  uint8_t* flags;
  Density prior;  // of the score (GenerationConfig::prior_sigma)
  Density d2;  // of d2Cache's choice
  double* certainty;  // d2Cache: when last computed
  float* importance;  // d2Cache: of the last step

  // Kept by the kernels.
  int32_t block;  // -1 before the first
  int32_t block_begin, block_end;  // generated positions; block 0 also owns what is to be filled in the prompt
  int32_t masked_at_start;
  uint32_t step;
  int32_t step_in_block;
  int32_t first_stop;  // lowest generated position with a committed stop id; the length, if there is none
  int32_t finished;

  DLLM_HD bool in_block(int32_t p) const {
    return (p >= block_begin && p < block_end) || (block == 0 && p < prompt_length && (flags[p] & kEditable));
  }
  DLLM_HD bool eligible(int32_t p) const { return in_block(p) && (flags[p] & kMasked) && p < first_stop; }
  DLLM_HD int32_t block_start() const {
    return block == 0 && first_editable < prompt_length ? first_editable : block_begin;
  }
};

// How much a launch has room for, or a step needs, in all sequences.
struct StepNeeds {
  int32_t rows, reads;
  int32_t live, verified;  // dLLM-Cache: of a layer that chooses its rows
  bool operator==(const StepNeeds&) const = default;
  DLLM_HD bool fits(const StepNeeds& limit) const {
    return rows <= limit.rows && reads <= limit.reads && live <= limit.live && verified <= limit.verified;
  }
};

// What a step did for one sequence, or why it did nothing.
struct StepRecord {
  int32_t ran;  // 0: the sequence was finished, or the step did not fit what was launched
  int32_t finished;  // nothing is left to decide
  int32_t step, block;
  int32_t rows, reads;  // computed; read by the LM head
  int32_t finite;  // 0: the statistics or the importance are not; nothing was committed
  int32_t committed;  // entries of the lists below
  StepNeeds needs;  // of the step
};
struct CommittedToken {
  int32_t position, token;
  float confidence;
};

}  // namespace dllm::cuda
