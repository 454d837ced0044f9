#include "model/cuda/cuda_model.h"

#include <algorithm>
#include <cmath>

#include "ops/cuda/attention.h"
#include "ops/cuda/dense_linear.h"
#include "ops/cuda/elementwise.h"
#include "ops/cuda/quant_linear.h"
#include "ops/cuda/rollout.h"
#include "runtime/buffer.h"
#include "runtime/error.h"
#include "runtime/nvtx.h"

namespace dllm {

namespace {

// Columns of the LM head whose logits exist at a time: 32 rows of them are 1 MB, which stays in L2.
constexpr int64_t kVocabTile = 8192;

int32_t round_up(int32_t x, int32_t to) { return (x + to - 1) / to * to; }

}  // namespace

std::unique_ptr<Model> load_cuda_model(const ModelSpec& spec, std::unique_ptr<Checkpoint> checkpoint, DType dtype,
                                       Quantization quantization, const LoadProgress& progress) {
  return std::make_unique<CudaModel>(spec, make_cuda_device(), *checkpoint, dtype, quantization, progress);
}

CudaModel::CudaModel(const ModelSpec& spec, std::unique_ptr<Device> device, const Checkpoint& checkpoint, DType dtype,
                     Quantization quantization, const LoadProgress& progress)
    : spec_(spec), device_(std::move(device)) {
  const NvtxRange range("load");
  if (dtype != DType::F32 && spec.head_dim != 64 && spec.head_dim != 128)
    fail<ConfigError>("dtype = \"", name_of(dtype), "\" on CUDA needs a head_dim of 64 or 128, the model has ",
                      spec.head_dim, "; use dtype = \"float32\"");
  weights_ = load_cuda_weights(spec, checkpoint, dtype, quantization, progress, *device_);
  for (const CudaLayer& l : weights_.layers) layer_bytes_ += int64_t(l.bytes());
}

// --- Memory -----------------------------------------------------------------------------------------------------------

void CudaModel::reserve(const StepSize& most) {
  StepCapacity c{int32_t(most.rows), int32_t(most.out_rows), int32_t(most.sequences), spec_.n_layers};
  const bool enough = capacity_.holds(c) && most.keys <= keys_ && (features_ || !most.features) &&
                      (captures_importance_ || !most.importance);
  if (!enough) {
    device_->synchronize();  // nothing that is still running may lose its memory
    c.rows = std::max(c.rows, capacity_.rows);
    c.out_rows = std::max(c.out_rows, capacity_.out_rows);
    c.sequences = std::max(c.sequences, capacity_.sequences);
    reserve_scratch(c, std::max(int32_t(most.keys), keys_), features_ || most.features,
                    captures_importance_ || most.importance);
  }
  if (most.logits) {
    const size_t elements = checked_bytes("logits", size_t(capacity_.out_rows), size_t(spec_.vocab_size)),
                 bytes = elements * 4;
    if (logits_.bytes() < bytes) {
      host_logits_ = Pinned<float>(*device_, elements, "logits");
      logits_ = DeviceBuffer(*device_, bytes, "logits");  // last: its size says that both are there
    }
  }
}

void CudaModel::reserve_scratch(const StepCapacity& c, int32_t keys, bool features, bool importance) {
  capacity_ = {};  // if memory runs out half way, the next reserve() begins again
  ++generation_;
  const size_t rows = size_t(c.rows), d = size_t(spec_.d_model), t = size_of(weights_.info.dtype);
  const size_t q = size_t(spec_.q_columns()), kv = size_t(spec_.kv_columns()), m = size_t(spec_.mlp_hidden);
  const auto take = [&](DeviceBuffer& b, const char* what, size_t n, size_t columns, size_t size) {
    b = DeviceBuffer();
    b = DeviceBuffer(*device_, checked_bytes(what, n, columns, size), what);
  };
  const size_t plan_bytes = StepMemory::at(nullptr, c).bytes;
  take(step_buffer_, "a step's plan", plan_bytes, 1, 1);
  step_ = StepMemory::at(step_buffer_.as(), c);
  host_plan_.resize(plan_bytes);
  take(x_, "the residual stream", rows, d, 4);
  take(h_, "normalised activations", rows, d, t);
  take(qkv_, "QKV", rows, q + 2 * kv, 4);
  take(q_, "queries", rows, q, t);
  take(attention_, "attention outputs", rows, q, t);
  take(gate_up_, "the MLP", rows, 2 * m, 4);
  take(act_, "the MLP", rows, m, t);
  take(lse_, "attention", rows, size_t(spec_.n_heads), 4);
  take(attention_scratch_, "attention",
       ops::cuda::attention_scratch_bytes(weights_.info.dtype, spec_.n_heads, spec_.head_dim, c.rows, keys), 1, 1);
  if (features) {
    take(y_, "a layer's outputs", rows, d, 4);
    take(values_, "values", rows, kv, 4);
    take(similarity_, "similarities", rows, 1, 8);
    const auto carve = [&](void* base) {
      Carver carver(base);
      for (ops::cuda::RowList* list : {&live_, &resting_}) {
        carver.take(list->count, 1);
        carver.take(list->sequences, c.sequences);
        for (int32_t** column : {&list->row, &list->position, &list->sequence}) carver.take(*column, c.rows);
        list->capacity = c.rows;
      }
      return carver.bytes();
    };
    take(lists_, "lists of rows", carve(nullptr), 1, 1);
    carve(lists_.as());
  }
  if (importance) {
    importance_ld_ = round_up(keys, 16);
    take(means_, "head means of attention", size_t(spec_.n_layers) * rows, size_t(importance_ld_), 4);
    for (DeviceBuffer& b : rollout_) take(b, "attention rollout", size_t(c.sequences), size_t(importance_ld_), 4);
    host_importance_ = {};
    host_importance_ = Pinned<float>(*device_, size_t(c.sequences) * size_t(importance_ld_), "attention rollout");
  }
  take(hidden_, "hidden states", size_t(c.out_rows), d, t);
  take(tile_, "logits of a tile", size_t(c.out_rows), size_t(kVocabTile), 4);
  take(stats_, "row statistics", size_t(c.out_rows), sizeof(ops::cuda::RowStatsState), 1);
  host_stats_ = {};
  host_stats_ = Pinned<ops::cuda::RowStatsState>(*device_, size_t(c.out_rows), "row statistics");
  capacity_ = c;
  keys_ = keys;
  features_ = features;
  captures_importance_ = importance;
}

// --- Layers: all of it works off the plan in device memory ----------------------------------------------------------------

// 16-bit and fp32 weights: one GEMM over the capacity; what it makes of rows beyond the count is never read.
void CudaModel::linear(const CudaLinear& w, const void* x, const ops::cuda::RowList& rows, int32_t capacity, float* out,
                       bool accumulate) {
  if (!w.quantized()) {
    ops::cuda::dense_linear(stream(), weights_.info.dtype,
                            {w.weight.as(), x, out, w.n, w.k, capacity, w.n, accumulate});
    return;
  }
  ops::cuda::quant_linear(stream(), weights_.info.dtype,
                          {w.weight.as(), w.format, w.n, w.k, x, rows.count, out, w.n, accumulate, capacity});
}

void CudaModel::run_layers(const StepShape& shape, bool check_finite) {
  ops::cuda::embedding(stream(), {weights_.embedding.as(), weights_.embedding_dtype, step_.tokens, step_.step.count,
                                  shape.rows, spec_.d_model, x_.as<float>()});
  for (int l = 0; l < spec_.n_layers; ++l) {
    const NvtxRange range("layer");
    run_layer(shape, l);
    if (check_finite) require_finite(shape, l);
  }
  if (shape.importance) find_importance(shape);
}

void CudaModel::run_layer(const StepShape& shape, int layer) {
  const CudaLayer& w = weights_.layers[size_t(layer)];
  const DType t = weights_.info.dtype;
  const bool keeps = !shape.layers.empty();
  const ops::cuda::RowList rows = keeps ? choose_rows(shape, layer) : step_.step;
  const int32_t n = keeps ? shape.layers[size_t(layer)].live : shape.rows;
  const int32_t* indices = keeps ? rows.row : nullptr;
  const size_t first = size_t(layer) * size_t(capacity_.sequences);
  const ops::cuda::KvView* slabs = step_.slabs + first;
  // x[rows] += W from, where features are kept by way of y, which is kept too.
  const auto add_to_stream = [&](const CudaLinear& linear_weights, const void* from, void** features) {
    linear(linear_weights, from, rows, n, keeps ? y_.as<float>() : x_.as<float>(), !keeps);
    if (keeps)
      ops::cuda::store_and_add(stream(), t, {y_.as<float>(), rows, features + first, spec_.d_model, x_.as<float>()});
  };
  if (n > 0) {
    const ops::cuda::RmsNormArgs norm{x_.as<float>(),          indices,        rows.count, n, spec_.d_model,
                                      w.attn_norm.as<float>(), spec_.norm_eps, h_.as()};
    ops::cuda::rms_norm(stream(), t, norm);
    linear(w.qkv, h_.as(), rows, n, qkv_.as<float>(), false);
    ops::cuda::rope_kv_write(
        stream(), t,
        {qkv_.as<float>(), w.qkv_bias.as<float>(), weights_.cos.as<float>(), weights_.sin.as<float>(), rows.position,
         rows.sequence, rows.count, n, spec_.n_heads, spec_.n_kv_heads, spec_.head_dim, slabs, q_.as()});
    const ops::cuda::AttentionArgs attention{q_.as(),
                                             spec_.q_columns(),
                                             attention_.as(),
                                             spec_.q_columns(),
                                             shape.importance ? lse_.as<float>() : nullptr,
                                             rows.sequences,
                                             slabs,
                                             shape.sequences,
                                             spec_.n_heads,
                                             spec_.n_kv_heads,
                                             spec_.head_dim,
                                             n,
                                             shape.keys,
                                             1.0f / std::sqrt(float(spec_.head_dim)),
                                             attention_scratch_.as()};
    ops::cuda::attention(stream(), t, attention);
    if (shape.importance)
      ops::cuda::head_mean(stream(), t,
                           {attention, means_.as<float>() + size_t(layer) * size_t(shape.rows) * size_t(importance_ld_),
                            importance_ld_});
    add_to_stream(w.attn_out, attention_.as(), step_.attention_features);
    ops::cuda::RmsNormArgs ffn_norm = norm;
    ffn_norm.weight = w.ffn_norm.as<float>();
    ops::cuda::rms_norm(stream(), t, ffn_norm);
    linear(w.gate_up, h_.as(), rows, n, gate_up_.as<float>(), false);
    ops::cuda::silu_mul(stream(), t, {gate_up_.as<float>(), rows.count, n, spec_.mlp_hidden, act_.as()});
    add_to_stream(w.down, act_.as(), step_.mlp_features);
  }
  if (keeps)
    ops::cuda::add_kept(
        stream(), t,
        {resting_, step_.attention_features + first, step_.mlp_features + first, spec_.d_model, x_.as<float>()});
}

// dLLM-Cache: the rows that the layer computes. Where some are chosen by similarity, fresh V of all candidates comes first.
ops::cuda::RowList CudaModel::choose_rows(const StepShape& shape, int layer) {
  const CudaLayer& w = weights_.layers[size_t(layer)];
  const DType t = weights_.info.dtype;
  const int32_t n = shape.layers[size_t(layer)].verified;
  const size_t first = size_t(layer) * size_t(capacity_.sequences);
  live_.capacity = shape.layers[size_t(layer)].live;
  resting_.capacity = shape.rows;
  if (n > 0) {
    ops::cuda::rms_norm(stream(), t,
                        {x_.as<float>(), step_.verified.row, step_.verified.count, n, spec_.d_model,
                         w.attn_norm.as<float>(), spec_.norm_eps, h_.as()});
    const int32_t v_begin = spec_.q_columns() + spec_.kv_columns();
    ops::cuda::RowList verified = step_.verified;
    verified.capacity = n;
    const float* bias = w.qkv_bias.as<float>();
    value_projection(w.qkv, verified, n);
    ops::cuda::verify_values(stream(), t,
                             {values_.as<float>(), bias ? bias + v_begin : nullptr, verified, step_.slabs + first,
                              spec_.n_kv_heads, spec_.head_dim, similarity_.as<double>()});
  }
  ops::cuda::RowList step = step_.step;
  step.capacity = shape.rows;
  ops::cuda::choose_rows(stream(), {step, step_.is_response, step_.plans + first, step_.verified,
                                    similarity_.as<double>(), shape.sequences, live_, resting_});
  return live_;
}

// V of the rows whose normalised activations are in h_: the last rows of the fused QKV matrix.
void CudaModel::value_projection(const CudaLinear& qkv, const ops::cuda::RowList& rows, int32_t n) {
  const int64_t columns = spec_.kv_columns(), begin = qkv.n - columns;
  if (!qkv.quantized()) {
    const char* w = qkv.weight.as<char>() + size_t(begin * qkv.k) * size_of(weights_.info.dtype);
    ops::cuda::dense_linear(stream(), weights_.info.dtype,
                            {w, h_.as(), values_.as<float>(), columns, qkv.k, n, columns, false});
    return;
  }
  ops::cuda::QuantLinearArgs args{qkv.weight.as(), qkv.format,          qkv.n,   qkv.k, h_.as(),
                                  rows.count,      values_.as<float>(), columns, false, n};
  args.column_begin = begin;
  ops::cuda::quant_linear(stream(), weights_.info.dtype, args);
}

// From the last layer to the first (ops/rollout.h).
void CudaModel::find_importance(const StepShape& shape) {
  const NvtxRange range("rollout");
  const float* c = nullptr;
  for (int l = spec_.n_layers; l-- > 0;) {
    float* out = rollout_[l % 2].as<float>();
    ops::cuda::rollout(
        stream(), {means_.as<float>() + size_t(l) * size_t(shape.rows) * size_t(importance_ld_), importance_ld_,
                   step_.step.sequences, step_.step.position, shape.sequences, shape.keys, c, out, importance_ld_});
    c = out;
  }
  importance_ = c;
}

// The final norm of the rows that are asked for.
void CudaModel::read_hidden(const StepShape& shape) {
  ops::cuda::rms_norm(stream(), weights_.info.dtype,
                      {x_.as<float>(), step_.out_rows, step_.out_count, shape.out_rows, spec_.d_model,
                       weights_.final_norm.as<float>(), spec_.norm_eps, hidden_.as()});
}

void CudaModel::head_stats(const StepShape& shape, const ops::RowStatsParams& params) {
  const NvtxRange range("LM head");
  read_hidden(shape);
  for (int64_t first = 0; first < spec_.vocab_size; first += kVocabTile) {
    const int64_t n = std::min(kVocabTile, spec_.vocab_size - first);
    head_tile(shape, first, n, tile_.as<float>(), kVocabTile);
    ops::cuda::row_stats_tile(
        stream(), {tile_.as<float>(), kVocabTile, int32_t(first), int32_t(n), first == 0, first + n == spec_.vocab_size,
                   step_.out_count, shape.out_rows, params, step_.keys, stats_.as<ops::cuda::RowStatsState>()});
  }
}

// Logits of ids [first, first + n).
void CudaModel::head_tile(const StepShape& shape, int64_t first, int64_t n, float* out, int64_t ld) {
  const CudaLinear& w = weights_.head;
  const DType t = weights_.info.dtype;
  if (!w.quantized()) {
    const char* rows = w.weight.as<char>() + size_t(first * w.k) * size_of(t);
    ops::cuda::dense_linear(stream(), t, {rows, hidden_.as(), out, n, w.k, shape.out_rows, ld, false});
    return;
  }
  ops::cuda::QuantLinearArgs args{w.weight.as(),   w.format, w.n, w.k,   hidden_.as(),
                                  step_.out_count, out,      ld,  false, shape.out_rows};
  args.column_begin = first;
  args.column_end = first + n;
  ops::cuda::quant_linear(stream(), t, args);
}

// --- Steps that the host plans ------------------------------------------------------------------------------------------

void CudaModel::send_plan(const StepInput& in) {
  const int32_t n = int32_t(in.tokens.size());
  StepMemory m = StepMemory::at(host_plan_.data(), capacity_);
  StepShape shape{n, int32_t(in.out_rows.size()), int32_t(in.sequences.size()), 0, false, {}};
  *m.step.count = n;
  *m.verified.count = 0;
  *m.out_count = shape.out_rows;
  std::copy(in.tokens.begin(), in.tokens.end(), m.tokens);
  std::copy(in.positions.begin(), in.positions.end(), m.step.position);
  std::copy(in.out_rows.begin(), in.out_rows.end(), m.out_rows);
  if (in.sequences[0].features) shape.layers.resize(size_t(spec_.n_layers));
  importance_keys_.assign(in.sequences.size(), 0);
  for (size_t s = 0; s < in.sequences.size(); ++s) {
    const StepInput::Sequence& q = in.sequences[s];
    const auto range = [&](int32_t begin, int32_t end) {
      return ops::cuda::SequenceRows{begin, end, int32_t(q.n_keys)};
    };
    m.step.sequences[s] = range(int32_t(q.row_begin), int32_t(q.row_end));
    for (int32_t r = int32_t(q.row_begin); r < int32_t(q.row_end); ++r) {
      m.step.row[r] = r;
      m.step.sequence[r] = int32_t(s);
      m.is_response[r] = 0;
    }
    shape.keys = std::max(shape.keys, int32_t(q.n_keys));
    shape.importance |= q.importance;
    if (q.importance) importance_keys_[s] = q.n_keys;
    for (size_t l = 0; l < size_t(spec_.n_layers); ++l) {
      const size_t i = l * size_t(capacity_.sequences) + s;
      m.slabs[i] = {q.slabs[l].k, q.slabs[l].v, int32_t(q.slabs[l].capacity)};
      if (!q.features) continue;
      m.attention_features[i] = q.feature_slabs[l].attention.data;
      m.mlp_features[i] = q.feature_slabs[l].mlp.data;
      const FeatureStep::Refresh refresh = q.features->layers[l];
      const int32_t n_verify = int32_t(q.features->n_verify);
      const int32_t prompt = int32_t(q.features->prompt_rows.size()),
                    response = int32_t(q.features->response_rows.size());
      m.plans[i] = {refresh.prompt, refresh.response, n_verify};
      StepShape::Layer& layer = shape.layers[l];
      layer.live += (refresh.prompt ? prompt : 0) + (refresh.response ? response : std::max(n_verify, 0));
      if (!refresh.response && n_verify >= 0) layer.verified += response;
    }
    int32_t* const count = m.verified.count;
    const int32_t begin = *count;
    if (q.features && q.features->n_verify >= 0)
      for (int32_t r : q.features->response_rows) {
        const int32_t row = int32_t(q.row_begin) + r;
        m.verified.row[*count] = row;
        m.verified.position[*count] = in.positions[size_t(row)];
        m.verified.sequence[*count] = int32_t(s);
        ++*count;
      }
    m.verified.sequences[s] = range(begin, *count);
    if (q.features)
      for (int32_t r : q.features->response_rows) m.is_response[q.row_begin + r] = 1;
  }
  device_->copy_in(step_buffer_.as(), host_plan_.data(), m.bytes);
  shape_ = std::move(shape);
}

// What the plan says that the step does; a layer that computes no row reads no weights.
void CudaModel::count_work(const StepInput& in) {
  work_.assign(in.sequences.size(), {});
  weight_bytes_ = 0;
  for (int l = 0; l < spec_.n_layers; ++l) {
    const StepShape::Layer* layer = shape_.layers.empty() ? nullptr : &shape_.layers[size_t(l)];
    const CudaLayer& w = weights_.layers[size_t(l)];
    if (!layer || layer->live > 0) weight_bytes_ += int64_t(w.bytes());
    if (layer && layer->verified > 0)
      weight_bytes_ += int64_t(w.attn_norm.bytes()) + int64_t(w.qkv.weight.bytes()) * spec_.kv_columns() / w.qkv.n;
    for (size_t s = 0; s < in.sequences.size(); ++s) {
      const StepInput::Sequence& q = in.sequences[s];
      int64_t rows = q.row_end - q.row_begin;
      if (q.features) {
        const FeatureStep::Refresh refresh = q.features->layers[size_t(l)];
        const bool verifies = !refresh.response && q.features->n_verify >= 0;
        const int64_t response = int64_t(q.features->response_rows.size());
        rows = (refresh.prompt ? int64_t(q.features->prompt_rows.size()) : 0) +
               (refresh.response ? response : std::max<int64_t>(q.features->n_verify, 0));
        if (verifies) work_[s].verify_rows += response;
      }
      work_[s].layer_rows += rows;
      work_[s].attention_pairs += rows * q.n_keys;
    }
  }
}

void CudaModel::forward(const StepInput& in, bool check_finite) {
  const NvtxRange range("step");
  StepSize size{int64_t(in.tokens.size()), int64_t(in.out_rows.size()), int64_t(in.sequences.size())};
  for (const StepInput::Sequence& s : in.sequences) {
    size.keys = std::max(size.keys, s.n_keys);
    size.features |= s.features != nullptr;
    size.importance |= s.importance;
  }
  reserve(size);
  send_plan(in);
  count_work(in);
  run_layers(shape_, check_finite);
  if (shape_.importance)
    device_->copy_out(host_importance_.data(), importance_,
                      size_t(shape_.sequences) * size_t(importance_ld_) * sizeof(float));
}

void CudaModel::row_stats(const ops::RowStatsParams& params, const NoiseKey* keys, ops::RowStats* out) {
  const size_t n = size_t(shape_.out_rows);
  if (n > 0) {
    weight_bytes_ += head_weight_bytes();
    if (params.noise_scale > 0) device_->copy_in(step_.keys, keys, n * sizeof(NoiseKey));
    head_stats(shape_, params);
    device_->copy_out(host_stats_.data(), stats_.as(), n * sizeof(ops::cuda::RowStatsState));
  }
  device_->synchronize();
  for (size_t i = 0; i < n; ++i) out[i] = host_stats_[i].stats;
}

float* CudaModel::logits(int64_t& ld) {
  ld = spec_.vocab_size;
  if (shape_.out_rows > 0) {
    weight_bytes_ += head_weight_bytes();
    const size_t bytes = size_t(shape_.out_rows) * size_t(ld) * sizeof(float);
    if (logits_.bytes() < bytes) {
      host_logits_ = Pinned<float>(*device_, bytes / sizeof(float), "logits");
      logits_ = DeviceBuffer(*device_, bytes, "logits");
    }
    read_hidden(shape_);
    head_tile(shape_, 0, spec_.vocab_size, logits_.as<float>(), ld);
    device_->copy_out(host_logits_.data(), logits_.as(), bytes);
  }
  device_->synchronize();
  return host_logits_.data();
}

std::span<const float> CudaModel::importance(size_t s) const {
  return {host_importance_.data() + s * size_t(importance_ld_), size_t(importance_keys_[s])};
}

// The rows that the step has: beyond their count lies anything.
void CudaModel::require_finite(const StepShape& shape, int layer) {
  const size_t capacity = size_t(shape.rows), d = size_t(spec_.d_model);
  if (host_x_.size() < capacity * d) host_x_ = Pinned<float>(*device_, capacity * d, "the residual stream");
  if (!host_count_.size()) host_count_ = Pinned<int32_t>(*device_, 1, "a number of rows");
  device_->copy_out(host_count_.data(), step_.step.count, sizeof(int32_t));
  device_->copy_out(host_x_.data(), x_.as(), capacity * d * sizeof(float));
  device_->synchronize();
  for (size_t i = 0; i < size_t(host_count_[0]) * d; ++i)
    if (!std::isfinite(host_x_[i])) fail<NumericalError>("layer ", layer, " of ", spec_.n_layers, " gave ", host_x_[i]);
}

}  // namespace dllm
