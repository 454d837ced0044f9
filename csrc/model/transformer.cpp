#include "model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

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

void StepInput::clear() {
  tokens.clear();
  positions.clear();
  sequences.clear();
  out_rows.clear();
}

Transformer::Rows Transformer::scratch(Buffer& b, int64_t rows, int64_t cols, DType t, const char* what) {
  const int64_t ld = ops::activation_stride(cols, t);
  b.reserve(checked_bytes(what, size_t(rows), size_t(ld), size_of(t)), what);
  return {b.as(), ld};
}

// inv_freq, angle, cos and sin in fp32 as the published models compute them.
void Transformer::ensure_rope(int64_t positions) {
  if (positions <= rope_positions_) return;
  const int half = spec_.head_dim / 2;
  const int64_t n = std::min(std::max(positions, 2 * rope_positions_), std::max(positions, spec_.max_positions));
  cos_.resize(size_t(n * half));
  sin_.resize(size_t(n * half));
  const bool round = !spec_.rope_full_precision && weights_.dtype == DType::BF16;
  for (int i = 0; i < half; ++i) {
    const float inv_freq = 1.0f / std::pow(spec_.rope_theta, float(2 * i) / float(spec_.head_dim));
    for (int64_t p = rope_positions_; p < n; ++p) {
      const float angle = float(p) * inv_freq;
      float c = std::cos(angle), s = std::sin(angle);
      if (round) {
        c = bf16_to_float(float_to_bf16(c));
        s = bf16_to_float(float_to_bf16(s));
      }
      cos_[size_t(p * half + i)] = c;
      sin_[size_t(p * half + i)] = s;
    }
  }
  rope_positions_ = n;
}

void Transformer::forward(const StepInput& in, bool check_finite) {
  rows_ = int64_t(in.tokens.size());
  const int64_t n_seq = int64_t(in.sequences.size());
  const DType t = weights_.dtype;
  int64_t keys = 0;
  for (const auto& s : in.sequences) keys = std::max(keys, s.n_keys);
  ensure_rope(keys);

  x_ = scratch(x_buffer_, rows_, spec_.d_model, DType::F32, "the residual stream");
  h_ = scratch(h_buffer_, rows_, spec_.d_model, t, "normalised activations");
  q_ = scratch(q_buffer_, rows_, spec_.q_columns(), t, "queries");
  attn_ = scratch(attn_buffer_, rows_, spec_.q_columns(), t, "attention outputs");
  sequences_.resize(size_t(n_seq));
  layer_slabs_.resize(size_t(n_seq));
  row_to_slab_.resize(size_t(rows_));
  for (int64_t s = 0; s < n_seq; ++s) {
    const auto& q = in.sequences[size_t(s)];
    sequences_[size_t(s)] = {q.row_begin, q.row_end, q.n_keys, {}};
    std::fill(row_to_slab_.begin() + q.row_begin, row_to_slab_.begin() + q.row_end, int32_t(s));
  }

  ops::embedding({weights_.embedding, weights_.embedding_dtype, in.tokens.data(), rows_, spec_.d_model,
                  static_cast<float*>(x_.data), x_.ld});
  for (int l = 0; l < spec_.n_layers; ++l) {
    const LayerWeights& w = weights_.layers[size_t(l)];
    qkv(w, l, in);
    if (l + 1 == spec_.n_layers) keep_out_rows(in);
    attention_and_mlp(w, l, in);
    if (check_finite) require_finite(l);
  }
  ops::rms_norm({static_cast<const float*>(x_.data), rows_, spec_.d_model, x_.ld, weights_.final_norm.as<float>(),
                 spec_.norm_eps, h_.data, h_.ld, t});
}

void Transformer::qkv(const LayerWeights& w, int layer, const StepInput& in) {
  const DType t = weights_.dtype;
  for (size_t s = 0; s < in.sequences.size(); ++s) layer_slabs_[s] = in.sequences[s].slabs[size_t(layer)];
  ops::rms_norm({static_cast<const float*>(x_.data), rows_, spec_.d_model, x_.ld, w.attn_norm.as<float>(),
                 spec_.norm_eps, h_.data, h_.ld, t});
  const int64_t columns = spec_.q_columns() + 2 * spec_.kv_columns();
  const Rows y = scratch(qkv_buffer_, std::min(rows_, kRowChunk), columns, DType::F32, "QKV");
  for (int64_t r = 0; r < rows_; r += kRowChunk) {
    const int64_t n = std::min(kRowChunk, rows_ - r);
    ops::linear({&w.qkv, row_ptr(h_.data, h_.ld, t, r), n, h_.ld, y.data, y.ld, DType::F32, ops::Epilogue::Store});
    ops::rope_kv_write({static_cast<const float*>(y.data), n, y.ld, spec_.n_heads, spec_.n_kv_heads, spec_.head_dim,
                        cos_.data(), sin_.data(), in.positions.data() + r, row_ptr(q_.data, q_.ld, t, r), q_.ld, t,
                        layer_slabs_.data(), row_to_slab_.data() + r});
  }
}

// Moves the wanted rows of x and q to the front and narrows the sequences' row ranges to them.
void Transformer::keep_out_rows(const StepInput& in) {
  const size_t q_bytes = size_t(spec_.q_columns()) * size_of(weights_.dtype);
  size_t next = 0;
  for (auto& s : sequences_) {
    const int64_t begin = int64_t(next), old_end = s.row_end;
    for (; next < in.out_rows.size() && in.out_rows[next] < old_end; ++next) {
      const int64_t from = in.out_rows[next], to = int64_t(next);
      if (from == to) continue;
      std::memcpy(row_ptr(x_.data, x_.ld, DType::F32, to), row_ptr(x_.data, x_.ld, DType::F32, from),
                  size_t(spec_.d_model) * 4);
      std::memcpy(row_ptr(q_.data, q_.ld, weights_.dtype, to), row_ptr(q_.data, q_.ld, weights_.dtype, from), q_bytes);
    }
    s.row_begin = begin;
    s.row_end = int64_t(next);
  }
  rows_ = int64_t(next);
}

void Transformer::attention_and_mlp(const LayerWeights& w, int layer, const StepInput& in) {
  const DType t = weights_.dtype;
  if (rows_ == 0) return;
  for (size_t s = 0; s < in.sequences.size(); ++s) sequences_[s].slab = in.sequences[s].slabs[size_t(layer)];
  ops::attention({q_.data, q_.ld, t, spec_.n_heads, spec_.n_kv_heads, spec_.head_dim,
                  1.0f / std::sqrt(float(spec_.head_dim)), sequences_.data(), int64_t(sequences_.size()), attn_.data,
                  attn_.ld});
  ops::linear({&w.attn_out, attn_.data, rows_, attn_.ld, x_.data, x_.ld, DType::F32, ops::Epilogue::AddTo});
  ops::rms_norm({static_cast<const float*>(x_.data), rows_, spec_.d_model, x_.ld, w.ffn_norm.as<float>(),
                 spec_.norm_eps, h_.data, h_.ld, t});
  const Rows m = scratch(mlp_buffer_, std::min(rows_, kRowChunk), spec_.mlp_hidden, t, "the MLP");
  for (int64_t r = 0; r < rows_; r += kRowChunk) {
    const int64_t n = std::min(kRowChunk, rows_ - r);
    ops::linear({&w.gate_up, row_ptr(h_.data, h_.ld, t, r), n, h_.ld, m.data, m.ld, t, ops::Epilogue::SiluMul});
    ops::linear(
        {&w.down, m.data, n, m.ld, row_ptr(x_.data, x_.ld, DType::F32, r), x_.ld, DType::F32, ops::Epilogue::AddTo});
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
  ops::lm_head_stats(weights_.head, h_.data, rows_, h_.ld, params, keys, out, stats_buffer_);
}

float* Transformer::logits(int64_t& ld) {
  const Rows y = scratch(logits_buffer_, rows_, spec_.vocab_size, DType::F32, "logits");
  ops::linear({&weights_.head, h_.data, rows_, h_.ld, y.data, y.ld, DType::F32, ops::Epilogue::Store});
  ld = y.ld;
  return static_cast<float*>(y.data);
}

}  // namespace dllm
