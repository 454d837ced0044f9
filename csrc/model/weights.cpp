#include "model/weights.h"

#include <cmath>
#include <cstring>
#include <set>

#include "runtime/error.h"

namespace dllm {

namespace {

class Loader {
 public:
  Loader(const ModelSpec& spec, const Checkpoint& ckpt, DType dtype, Quantization quantization,
         const LoadProgress& progress)
      : spec_(spec), ckpt_(ckpt), dtype_(dtype), quantization_(quantization), progress_(progress) {
    for (const TensorSlot& slot : tensors_of(spec)) total_ += ckpt.tensor(slot.name, slot.shape).bytes;
    if (spec.tied_head)  // it is read twice
      total_ += ckpt.tensor(names_of(spec).embedding + ".weight", {spec.vocab_size, spec.d_model}).bytes;
  }

  DType dtype_of(const CheckpointTensor& t, const std::string& name) const {
    if (t.dtype == "F32") return DType::F32;
    if (t.dtype == "BF16") return DType::BF16;
    fail<CheckpointError>("tensor \"", name, "\" has dtype ", t.dtype, "; F32 and BF16 are supported");
  }

  // A vector as fp32 (norms, biases).
  void read_vector(const std::string& name, int64_t n, float* out) {
    const CheckpointTensor& t = ckpt_.tensor(name, {n});
    const DType dt = dtype_of(t, name);
    for (int64_t i = 0; i < n; ++i) {
      uint16_t h;
      if (dt == DType::F32) {
        std::memcpy(out + i, t.data + 4 * i, 4);
      } else {
        std::memcpy(&h, t.data + 2 * i, 2);
        out[i] = bf16_to_float(h);
      }
      if (!std::isfinite(out[i])) fail<CheckpointError>("tensor \"", name, "\" holds ", out[i], " at index ", i);
    }
    finish(t);
  }
  Buffer vector(const std::string& name, int64_t n) {
    Buffer b(size_t(n) * 4, name.c_str());
    read_vector(name, n, b.as<float>());
    return b;
  }

  // A matrix where it is mapped; copied only if the file has it misaligned.
  ops::WeightSource matrix(const std::string& name, int64_t n, int64_t k, Quantization stored) {
    if (stored != Quantization::None) return quantized_matrix(name, n, k, stored);
    const CheckpointTensor& t = ckpt_.tensor(name + ".weight", {n, k});
    const DType dt = dtype_of(t, name + ".weight");
    const void* data = t.data;
    if (uintptr_t(data) % size_of(dt)) {
      aligned_.emplace_back(t.bytes, name.c_str());
      std::memcpy(aligned_.back().as(), data, t.bytes);
      data = aligned_.back().as();
    }
    pending_.push_back(&t);
    return {data, ops::format_of(dt), n, k, k};
  }

  ops::WeightSource quantized_matrix(const std::string& name, int64_t n, int64_t k, Quantization stored) {
    const ops::WeightFormat format = format_of(stored);
    const bool wide = format == ops::WeightFormat::I8;
    const auto part = [&](const std::string& full, const std::vector<int64_t>& shape, const char* dtype) {
      const CheckpointTensor& t = ckpt_.tensor(full, shape);
      if (t.dtype != dtype)
        fail<CheckpointError>("tensor \"", full, "\" has dtype ", t.dtype, "; ", name_of(stored), " has ", dtype);
      pending_.push_back(&t);
      return t.data;
    };
    const std::vector<int64_t> shape{n, ops::quantized_row_bytes(format, k)};
    std::vector<int64_t> scales{n};
    if (!wide) scales.push_back(ops::quantized_scale_bytes(format, k) / 2);
    const void* values = part(name + ".weight", shape, wide ? "I8" : "U8");
    return {values, format, n, k, k, part(name + ".weight_scale", scales, wide ? "F32" : "BF16")};
  }

  // After packing: the sources' pages need not stay resident.
  void done_packing() {
    for (const CheckpointTensor* t : pending_) {
      t->file->release(t->data, t->bytes);
      finish(*t);
    }
    pending_.clear();
    aligned_.clear();
  }

  LayerWeights layer(const LayerNames& n) {
    const int64_t d = spec_.d_model, q = spec_.q_columns(), kv = spec_.kv_columns(), m = spec_.mlp_hidden;
    LayerWeights w;
    w.attn_norm = vector(n.attn_norm + ".weight", d);
    const Quantization stored = spec_.stored;
    const ops::WeightSource qkv[] = {matrix(n.q, q, d, stored), matrix(n.k, kv, d, stored), matrix(n.v, kv, d, stored)};
    w.qkv = ops::pack_linear(qkv, 3, format_of(quantization_));
    done_packing();
    if (spec_.qkv_bias) {
      w.qkv.bias = Buffer(size_t(w.qkv.panels()) * ops::kPanel * 4, "QKV bias");
      float* b = w.qkv.bias.as<float>();
      read_vector(n.q + ".bias", q, b);
      read_vector(n.k + ".bias", kv, b + q);
      read_vector(n.v + ".bias", kv, b + q + kv);
    }
    w.attn_out = packed(n.out, d, q, stored, quantization_);
    w.ffn_norm = vector(n.ffn_norm + ".weight", d);
    const ops::WeightSource gate = matrix(n.gate, m, d, stored), up = matrix(n.up, m, d, stored);
    w.gate_up = ops::pack_gate_up(gate, up, format_of(quantization_));
    done_packing();
    w.down = packed(n.down, d, m, stored, quantization_);
    return w;
  }

  ops::PackedLinear packed(const std::string& name, int64_t n, int64_t k, Quantization stored, Quantization wanted) {
    const ops::WeightSource s = matrix(name, n, k, stored);
    ops::PackedLinear p = ops::pack_linear(&s, 1, format_of(wanted));
    done_packing();
    return p;
  }

  void embedding(const std::string& name, Weights& w) {
    const CheckpointTensor& t = ckpt_.tensor(name, {spec_.vocab_size, spec_.d_model});
    w.embedding_dtype = dtype_of(t, name);
    w.embedding = t.data;
    if (uintptr_t(t.data) % size_of(w.embedding_dtype)) {
      w.embedding_copy = Buffer(t.bytes, name.c_str());
      std::memcpy(w.embedding_copy.as(), t.data, t.bytes);
      w.embedding = w.embedding_copy.as();
    }
    finish(t);
  }

 private:
  ops::WeightFormat format_of(Quantization q) const {
    switch (q) {
      case Quantization::None:
        break;
      case Quantization::Int8:
        return ops::WeightFormat::I8;
      case Quantization::Int4:
        return ops::WeightFormat::I4;
    }
    return ops::format_of(dtype_);
  }

  void finish(const CheckpointTensor& t) {
    done_ += t.bytes;
    if (progress_) progress_(done_, total_);
  }

  const ModelSpec& spec_;
  const Checkpoint& ckpt_;
  DType dtype_;
  Quantization quantization_;
  const LoadProgress& progress_;
  size_t total_ = 0, done_ = 0;
  std::vector<const CheckpointTensor*> pending_;
  std::vector<Buffer> aligned_;
};

}  // namespace

size_t Weights::layer_bytes() const {
  size_t n = 0;
  for (const LayerWeights& l : layers) n += l.projection_bytes() + l.mlp_bytes();
  return n;
}

size_t Weights::resident_bytes() const {
  return layer_bytes() + head_bytes() + final_norm.bytes() + embedding_copy.bytes();
}

Weights load_weights(const ModelSpec& spec, std::unique_ptr<Checkpoint> checkpoint, DType dtype,
                     Quantization quantization, const LoadProgress& progress) {
  if (quantization == Quantization::None) quantization = spec.stored;
  if (spec.stored != Quantization::None && quantization != spec.stored)
    fail<ConfigError>("quantization = \"", name_of(quantization), "\" is not allowed: the checkpoint is ",
                      name_of(spec.stored), " already");
  Weights w;
  w.dtype = dtype;
  w.quantization = quantization;
  Loader loader(spec, *checkpoint, dtype, quantization, progress);
  const ModelNames names = names_of(spec);
  loader.embedding(names.embedding + ".weight", w);
  for (const LayerNames& n : names.layers) w.layers.push_back(loader.layer(n));
  w.final_norm = loader.vector(names.final_norm + ".weight", spec.d_model);
  w.head = loader.packed(spec.tied_head ? names.embedding : names.head, spec.vocab_size, spec.d_model,
                         spec.tied_head ? Quantization::None : head_quantization(spec.stored),
                         head_quantization(quantization));

  std::set<std::string> used;
  for (const TensorSlot& s : tensors_of(spec)) used.insert(s.name);
  for (const std::string& name : checkpoint->names())
    if (!used.count(name)) w.unused_tensors.push_back(name);
  w.checkpoint = std::move(checkpoint);
  return w;
}

}  // namespace dllm
