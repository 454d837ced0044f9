#include "model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "model/rope.h"
#include "ops/elementwise.h"
#include "runtime/error.h"

namespace dllm {

namespace {

// QKV and MLP intermediates exist for this many rows at a time, so that a full pass over a long canvas needs no more
// scratch than a short one. Large enough that streaming the weights again is hidden behind arithmetic.
constexpr int64_t kRowChunk = 512;

void* row_ptr(void* data, int64_t ld, DType t, int64_t row) {
  return static_cast<char*>(data) + size_t(row * ld) * size_of(t);
}

}  // namespace

Transformer::Rows Transformer::scratch(Buffer& b, int64_t rows, int64_t cols, DType t, const char* what) {
  const int64_t ld = ops::activation_stride(cols, t);
  b.reserve(checked_bytes(what, size_t(rows), size_t(ld), size_of(t)), what);
  return {b.as(), ld};
}

void Transformer::ensure_rope(int64_t positions) {
  if (positions <= rope_positions_) return;
  const int half = spec_.head_dim / 2;
  const int64_t n = std::min(std::max(positions, 2 * rope_positions_), std::max(positions, spec_.max_positions));
  cos_.resize(size_t(n * half));
  sin_.resize(size_t(n * half));
  rope_tables(spec_, weights_.dtype, rope_positions_, n, cos_.data(), sin_.data());
  rope_positions_ = n;
}

void Transformer::forward(const StepInput& in, bool check_finite) {
  prepare(in);
  ops::embedding({weights_.embedding, weights_.embedding_dtype, in.tokens.data(), rows_, spec_.d_model,
                  static_cast<float*>(x_.data), x_.ld});
  for (int l = 0; l < spec_.n_layers; ++l) {
    const bool last = l + 1 == spec_.n_layers;
    choose_rows(in, l);
    qkv(in, l);
    // Nothing reads what the last layer makes of the other rows, except that rollout wants their attention.
    if (last && !wants_importance_) keep_last_rows(in, q_, size_t(spec_.q_columns()) * size_of(weights_.dtype));
    attention(in, l);
    if (last && wants_importance_) keep_last_rows(in, attn_, size_t(spec_.q_columns()) * size_of(weights_.dtype));
    mlp(in, l);
    if (keeps_features_) add_kept_features(in, l);
    if (check_finite) require_finite(l);
  }
  if (wants_importance_) find_importance(in);
  ops::rms_norm({static_cast<const float*>(x_.data), out_rows_, spec_.d_model, x_.ld, weights_.final_norm.as<float>(),
                 spec_.norm_eps, h_.data, h_.ld, weights_.dtype, in.out_rows.data()});
}

void Transformer::reserve(const StepSize& most) {
  const DType t = weights_.dtype;
  const int64_t chunk = std::min(most.rows, kRowChunk);
  ensure_rope(most.keys);
  x_ = scratch(x_buffer_, most.rows, spec_.d_model, DType::F32, "the residual stream");
  h_ = scratch(h_buffer_, most.rows, spec_.d_model, t, "normalised activations");
  q_ = scratch(q_buffer_, most.rows, spec_.q_columns(), t, "queries");
  attn_ = scratch(attn_buffer_, most.rows, spec_.q_columns(), t, "attention outputs");
  scratch(qkv_buffer_, chunk, spec_.q_columns() + 2 * spec_.kv_columns(), DType::F32, "QKV");
  scratch(mlp_buffer_, chunk, spec_.mlp_hidden, t, "the MLP");
  if (most.logits) scratch(logits_buffer_, most.out_rows, spec_.vocab_size, DType::F32, "logits");
  for (std::vector<int32_t>* list : {&live_, &live_positions_, &live_slab_}) list->reserve(size_t(most.rows));
  sequences_.reserve(size_t(most.sequences));
  layer_slabs_.reserve(size_t(most.sequences));
  work_.reserve(size_t(most.sequences));
  if (most.features) reserve_features(most);
  if (most.importance) reserve_importance(most);
}

void Transformer::prepare(const StepInput& in) {
  rows_ = int64_t(in.tokens.size());
  out_rows_ = int64_t(in.out_rows.size());
  const size_t n_seq = in.sequences.size();
  StepSize size{rows_, out_rows_, int64_t(n_seq)};
  for (const auto& s : in.sequences) {
    size.keys = std::max(size.keys, s.n_keys);
    size.features |= s.features != nullptr;
    size.importance |= s.importance;
  }
  weight_bytes_ = 0;
  keeps_features_ = size.features;
  wants_importance_ = size.importance;
  reserve(size);
  sequences_.resize(n_seq);
  layer_slabs_.resize(n_seq);
  work_.assign(n_seq, {});
  if (wants_importance_) prepare_captures(in);
}

void Transformer::qkv(const StepInput& in, int layer) {
  const LayerWeights& w = weights_.layers[size_t(layer)];
  const DType t = weights_.dtype;
  const int64_t n = int64_t(live_.size());
  if (n == 0) return;
  weight_bytes_ += int64_t(w.projection_bytes());
  ops::rms_norm({static_cast<const float*>(x_.data), n, spec_.d_model, x_.ld, w.attn_norm.as<float>(), spec_.norm_eps,
                 h_.data, h_.ld, t, live_.data()});
  const int64_t columns = spec_.q_columns() + 2 * spec_.kv_columns();
  const Rows y = scratch(qkv_buffer_, std::min(n, kRowChunk), columns, DType::F32, "QKV");
  for (int64_t r = 0; r < n; r += kRowChunk) {
    const int64_t here = std::min(kRowChunk, n - r);
    ops::linear(
        {&w.qkv, row_ptr(h_.data, h_.ld, t, r), t, here, h_.ld, y.data, y.ld, DType::F32, ops::Epilogue::Store});
    ops::rope_kv_write({static_cast<const float*>(y.data), here, y.ld, spec_.n_heads, spec_.n_kv_heads, spec_.head_dim,
                        cos_.data(), sin_.data(), live_positions_.data() + r, row_ptr(q_.data, q_.ld, t, r), q_.ld, t,
                        layer_slabs_.data(), live_slab_.data() + r});
  }
  for (size_t s = 0; s < in.sequences.size(); ++s)
    work_[s].layer_rows += sequences_[s].row_end - sequences_[s].row_begin;
}

// Narrows live_ to the rows that are wanted of the last layer, and moves the rows of m (one for each of live_) along.
void Transformer::keep_last_rows(const StepInput& in, const Rows& m, size_t row_bytes) {
  size_t next = 0, out = 0;
  for (size_t s = 0; s < sequences_.size(); ++s) {
    const auto& q = in.sequences[s];
    const int64_t begin = int64_t(next);
    const auto keep = [&](int32_t row) {
      if (q.features) {
        const std::vector<int32_t>& rows = q.features->last_rows;
        return std::binary_search(rows.begin(), rows.end(), row - int32_t(q.row_begin));
      }
      while (out < in.out_rows.size() && in.out_rows[out] < row) ++out;
      return out < in.out_rows.size() && in.out_rows[out] == row;
    };
    if (q.features) std::erase_if(resting_[s], [&](int32_t row) { return !keep(row); });
    for (int64_t from = sequences_[s].row_begin; from < sequences_[s].row_end; ++from) {
      if (!keep(live_[size_t(from)])) continue;
      if (size_t(from) != next)
        std::memcpy(row_ptr(m.data, m.ld, weights_.dtype, int64_t(next)), row_ptr(m.data, m.ld, weights_.dtype, from),
                    row_bytes);
      live_[next] = live_[size_t(from)];
      live_positions_[next++] = live_positions_[size_t(from)];
    }
    sequences_[s].row_begin = begin;
    sequences_[s].row_end = int64_t(next);
  }
  live_.resize(next);
}

void Transformer::attention(const StepInput& in, int layer) {
  for (size_t s = 0; s < in.sequences.size(); ++s) {
    ops::AttentionSequence& q = sequences_[s];
    const int64_t rows = q.row_end - q.row_begin;
    work_[s].attention_pairs += rows * q.n_keys;
    if (!in.sequences[s].importance) continue;
    q.ld_mean = capture_stride(q.n_keys);
    q.mean = captures_[s] + layer * rows * q.ld_mean;
  }
  if (live_.empty()) return;
  ops::attention({q_.data, q_.ld, weights_.dtype, spec_.n_heads, spec_.n_kv_heads, spec_.head_dim,
                  1.0f / std::sqrt(float(spec_.head_dim)), sequences_.data(), int64_t(sequences_.size()), attn_.data,
                  attn_.ld});
}

void Transformer::mlp(const StepInput& in, int layer) {
  const LayerWeights& w = weights_.layers[size_t(layer)];
  const DType t = weights_.dtype;
  const int64_t n = int64_t(live_.size());
  if (n == 0) return;
  weight_bytes_ += int64_t(w.mlp_bytes());
  add_to_stream(in, layer, w.attn_out, attn_.data, attn_.ld, 0, n, &LayerFeatures::attention);
  ops::rms_norm({static_cast<const float*>(x_.data), n, spec_.d_model, x_.ld, w.ffn_norm.as<float>(), spec_.norm_eps,
                 h_.data, h_.ld, t, live_.data()});
  const Rows m = scratch(mlp_buffer_, std::min(n, kRowChunk), spec_.mlp_hidden, t, "the MLP");
  for (int64_t r = 0; r < n; r += kRowChunk) {
    const int64_t here = std::min(kRowChunk, n - r);
    ops::linear({&w.gate_up, row_ptr(h_.data, h_.ld, t, r), t, here, h_.ld, m.data, m.ld, t, ops::Epilogue::SiluMul});
    add_to_stream(in, layer, w.down, m.data, m.ld, r, here, &LayerFeatures::mlp);
  }
}

// x[live] += W rows, for the entries [begin, begin + rows) of live_; where features are kept, the sums are kept too.
void Transformer::add_to_stream(const StepInput& in, int layer, const ops::PackedLinear& w, const void* rows,
                                int64_t ld, int64_t begin, int64_t n, ops::FeatureSlab LayerFeatures::* slab) {
  if (!keeps_features_) {
    ops::linear(
        {&w, rows, weights_.dtype, n, ld, x_.data, x_.ld, DType::F32, ops::Epilogue::AddTo, live_.data() + begin});
    return;
  }
  const Rows y = scratch(feature_buffer_, n, spec_.d_model, DType::F32, "a layer's outputs");
  ops::linear({&w, rows, weights_.dtype, n, ld, y.data, y.ld, DType::F32, ops::Epilogue::Store});
  for (size_t s = 0; s < in.sequences.size(); ++s) {
    const int64_t from = std::max(begin, sequences_[s].row_begin), to = std::min(begin + n, sequences_[s].row_end);
    if (from >= to) continue;
    ops::store_and_add({static_cast<const float*>(y.data) + (from - begin) * y.ld, to - from, spec_.d_model, y.ld,
                        in.sequences[s].feature_slabs[size_t(layer)].*slab, live_positions_.data() + from,
                        static_cast<float*>(x_.data), x_.ld, live_.data() + from});
  }
}

void Transformer::require_finite(int layer) const {
  for (int64_t r = 0; r < rows_; ++r) {
    const float* row = static_cast<const float*>(x_.data) + r * x_.ld;
    for (int i = 0; i < spec_.d_model; ++i)
      if (!std::isfinite(row[i])) fail<NumericalError>("layer ", layer, " of ", spec_.n_layers, " gave ", row[i]);
  }
}

void Transformer::row_stats(const ops::RowStatsParams& params, const NoiseKey* keys, ops::RowStats* out) {
  if (out_rows_ > 0) weight_bytes_ += int64_t(weights_.head_bytes());
  ops::lm_head_stats(weights_.head, h_.data, weights_.dtype, out_rows_, h_.ld, params, keys, out, stats_buffer_);
}

float* Transformer::logits(int64_t& ld) {
  if (out_rows_ > 0) weight_bytes_ += int64_t(weights_.head_bytes());
  const Rows y = scratch(logits_buffer_, out_rows_, spec_.vocab_size, DType::F32, "logits");
  ops::linear(
      {&weights_.head, h_.data, weights_.dtype, out_rows_, h_.ld, y.data, y.ld, DType::F32, ops::Epilogue::Store});
  ld = y.ld;
  return static_cast<float*>(y.data);
}

}  // namespace dllm
