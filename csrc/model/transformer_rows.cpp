// Which rows a layer computes, and what becomes of the others: kept features (dLLM-Cache) and attention rollout (d2Cache).

#include <algorithm>
#include <cmath>
#include <numeric>

#include "model/transformer.h"
#include "ops/elementwise.h"
#include "ops/linear.h"
#include "ops/rollout.h"
#include "ops/similarity.h"
#include "runtime/order.h"
#include "runtime/stopwatch.h"

namespace dllm {

int64_t Transformer::capture_stride(int64_t keys) { return (keys + 15) / 16 * 16; }

// Head means of every layer, [n_layers][rows][keys] per sequence. Only a full pass over a long canvas needs much; that is
// not kept for the next step.
constexpr size_t kKeptCaptureBytes = size_t(64) << 20;

void Transformer::reserve_importance(const StepSize& most) {
  captures_.reserve(size_t(most.sequences));
  if (int64_t(importance_.size()) < most.sequences) importance_.resize(size_t(most.sequences));
  for (std::vector<float>& c : importance_) c.reserve(size_t(most.keys));
  const size_t bytes = checked_bytes("head means of attention", size_t(spec_.n_layers), size_t(most.rows),
                                     size_t(capture_stride(most.keys)), sizeof(float));
  capture_buffer_.reserve(std::min(bytes, kKeptCaptureBytes), "head means of attention");
}

void Transformer::prepare_captures(const StepInput& in) {
  captures_.assign(in.sequences.size(), nullptr);
  const auto elements = [&](const StepInput::Sequence& s) {
    return s.importance ? size_t(spec_.n_layers * (s.row_end - s.row_begin) * capture_stride(s.n_keys)) : 0;
  };
  size_t total = 0;
  for (const auto& s : in.sequences) total += elements(s);
  const size_t bytes = checked_bytes("head means of attention", total, sizeof(float));
  capture_buffer_.reserve(bytes, "head means of attention");
  float* next = capture_buffer_.as<float>();
  for (size_t s = 0; s < in.sequences.size(); ++s) {
    captures_[s] = next;
    next += elements(in.sequences[s]);
  }
}

void Transformer::find_importance(const StepInput& in) {
  for (size_t s = 0; s < in.sequences.size(); ++s) {
    const auto& q = in.sequences[s];
    if (!q.importance) continue;
    const Stopwatch watch(work_[s].selection_seconds);
    importance_[s].resize(size_t(q.n_keys));
    const int64_t rows = q.row_end - q.row_begin, ld = capture_stride(q.n_keys);
    ops::rollout({captures_[s], rows * ld, ld, spec_.n_layers, in.positions.data() + q.row_begin, rows, q.n_keys,
                  importance_[s].data()});
  }
  if (capture_buffer_.bytes() > kKeptCaptureBytes) {
    capture_buffer_ = Buffer();
    capture_buffer_.reserve(kKeptCaptureBytes, "head means of attention");
  }
}

void Transformer::reserve_features(const StepSize& most) {
  if (int64_t(resting_.size()) < most.sequences) resting_.resize(size_t(most.sequences));
  for (std::vector<int32_t>& rows : resting_) rows.reserve(size_t(most.keys));
  for (std::vector<int32_t>* list : {&verified_, &verified_positions_, &changed_, &resting_positions_})
    list->reserve(size_t(most.keys));
  similarity_.reserve(size_t(most.keys));
  scratch(feature_buffer_, most.rows, spec_.d_model, DType::F32, "a layer's outputs");
  scratch(value_buffer_, most.keys, ops::kPanel + spec_.kv_columns(), DType::F32, "values");  // V begins within a panel
}

void Transformer::choose_rows(const StepInput& in, int layer) {
  live_.clear();
  live_positions_.clear();
  live_slab_.clear();
  for (size_t s = 0; s < in.sequences.size(); ++s) {
    const auto& q = in.sequences[s];
    const size_t begin = live_.size();
    layer_slabs_[s] = q.slabs[size_t(layer)];
    if (!q.features) {
      live_.resize(begin + size_t(q.row_end - q.row_begin));
      std::iota(live_.begin() + int64_t(begin), live_.end(), int32_t(q.row_begin));
    } else {
      const FeatureStep& f = *q.features;
      resting_[s].clear();
      const FeatureStep::Refresh refresh = f.layers[size_t(layer)];
      const auto take = [&](const std::vector<int32_t>& rows, bool all) {
        for (int32_t r : rows) (all ? live_ : resting_[s]).push_back(int32_t(q.row_begin) + r);
      };
      take(f.prompt_rows, refresh.prompt);
      if (refresh.response || f.n_verify < 0) {
        take(f.response_rows, refresh.response);
      } else {
        const std::span<const int32_t> changed = least_similar(in, s, layer);
        for (int32_t r : f.response_rows) {
          const int32_t row = int32_t(q.row_begin) + r;
          (std::binary_search(changed.begin(), changed.end(), row) ? live_ : resting_[s]).push_back(row);
        }
      }
      std::sort(live_.begin() + int64_t(begin), live_.end());
      std::sort(resting_[s].begin(), resting_[s].end());
    }
    sequences_[s] = {int64_t(begin), int64_t(live_.size()), q.n_keys, layer_slabs_[s]};
    for (size_t i = begin; i < live_.size(); ++i) {
      live_positions_.push_back(in.positions[size_t(live_[i])]);
      live_slab_.push_back(int32_t(s));
    }
  }
}

// V-verify: fresh V of all response rows, written to the slab; returns the n_verify rows whose V had the least cosine with
// the cached one, ascending. Equal ones: the lowest position.
std::span<const int32_t> Transformer::least_similar(const StepInput& in, size_t s, int layer) {
  const LayerWeights& w = weights_.layers[size_t(layer)];
  const auto& q = in.sequences[s];
  const FeatureStep& f = *q.features;
  const int64_t n = int64_t(f.response_rows.size());
  std::vector<int32_t>&rows = verified_, &positions = verified_positions_;
  rows.clear();
  positions.clear();
  for (int32_t r : f.response_rows) {
    rows.push_back(int32_t(q.row_begin) + r);
    positions.push_back(in.positions[size_t(rows.back())]);
  }
  // The panels of the fused projection that hold V; the first may begin with columns of K.
  const int64_t first_column = spec_.q_columns() + spec_.kv_columns(), panel = first_column / ops::kPanel;
  const int64_t panels = w.qkv.panels();
  weight_bytes_ += int64_t(w.attn_norm.bytes() + w.qkv.bytes() * size_t(panels - panel) / size_t(panels));
  const Rows v = scratch(value_buffer_, n, w.qkv.n - panel * ops::kPanel, DType::F32, "values");
  ops::rms_norm({static_cast<const float*>(x_.data), n, spec_.d_model, x_.ld, w.attn_norm.as<float>(), spec_.norm_eps,
                 h_.data, h_.ld, weights_.dtype, rows.data()});
  ops::linear(
      {&w.qkv, h_.data, weights_.dtype, n, h_.ld, v.data, v.ld, DType::F32, ops::Epilogue::Store, nullptr, panel});
  const float* values = static_cast<const float*>(v.data) + first_column % ops::kPanel;

  const Stopwatch watch(work_[s].selection_seconds);
  similarity_.resize(size_t(n));
  ops::value_similarity({values, n, v.ld, positions.data(), layer_slabs_[s], similarity_.data()});
  ops::write_values({values, n, v.ld, positions.data(), layer_slabs_[s]});
  work_[s].verify_rows += n;

  changed_.resize(size_t(n));
  std::iota(changed_.begin(), changed_.end(), 0);
  // A NaN counts as changed: the step will report it.
  const auto change = [&](int32_t i) { return std::isnan(similarity_[size_t(i)]) ? 2.0 : -similarity_[size_t(i)]; };
  std::nth_element(changed_.begin(), changed_.begin() + f.n_verify, changed_.end(), by_falling(change));
  changed_.resize(size_t(f.n_verify));
  for (int32_t& i : changed_) i = rows[size_t(i)];
  std::sort(changed_.begin(), changed_.end());
  return changed_;
}

// Rows that this layer did not compute: x + A + F, as they were when they last were.
void Transformer::add_kept_features(const StepInput& in, int layer) {
  std::vector<int32_t>& positions = resting_positions_;
  for (size_t s = 0; s < in.sequences.size(); ++s) {
    positions.clear();
    for (int32_t row : resting_[s]) positions.push_back(in.positions[size_t(row)]);
    const LayerFeatures& f = in.sequences[s].feature_slabs[size_t(layer)];
    ops::add_kept({f.attention, f.mlp, int64_t(positions.size()), spec_.d_model, positions.data(),
                   static_cast<float*>(x_.data), x_.ld, resting_[s].data()});
  }
}

}  // namespace dllm
