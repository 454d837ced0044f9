// Which rows of which sequence a block of attention.cu has. Sequences lie one after the other in a list of packed rows, each
// of any length, in device memory: a block, or a thread, looks for its own.
#pragma once

#include <cstdint>

#include "ops/cuda/attention.h"
#include "ops/cuda/kernel.h"
#include "runtime/host_device.h"

namespace dllm::ops::cuda {

DLLM_HD constexpr int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

struct Tile {
  int32_t sequence;  // -1: none, beyond the last
  int32_t first;  // unit of the sequence
  SequenceRows rows;
};
// Tiles of `height` units cut each sequence anew; a row has `units_per_row`.
DLLM_DEVICE Tile find_tile(const AttentionArgs& a, int32_t units_per_row, int32_t height, int32_t tile) {
  for (int32_t s = 0; s < a.n_sequences; ++s) {
    const SequenceRows rows = a.sequences[s];
    const int32_t tiles = ceil_div((rows.end - rows.begin) * units_per_row, height);
    if (tile < tiles) return {s, tile * height, rows};
    tile -= tiles;
  }
  return {-1, 0, {0, 0, 0}};
}
// How many tiles there can be, however max_rows are dealt to the sequences.
inline int32_t max_tiles(const AttentionArgs& a, int32_t units_per_row, int32_t height) {
  return (a.max_rows * units_per_row + a.n_sequences * (height - 1)) / height;
}

// -1: the row is beyond the count.
DLLM_DEVICE int32_t find_sequence(const AttentionArgs& a, int32_t row) {
  for (int32_t s = 0; s < a.n_sequences; ++s)
    if (row >= a.sequences[s].begin && row < a.sequences[s].end) return s;
  return -1;
}

}  // namespace dllm::ops::cuda
