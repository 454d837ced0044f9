#include "model/weights.h"

#include <cmath>
#include <cstring>
#include <set>

#include "runtime/error.h"

namespace dllm {

namespace {

class Loader {
 public:
  Loader(const ModelSpec& spec, const Checkpoint& ckpt, DType dtype, const LoadProgress& progress)
      : spec_(spec), ckpt_(ckpt), dtype_(dtype), progress_(progress) {
    for (const TensorSlot& slot : tensors_of(spec)) total_ += ckpt.tensor(slot.name, slot.shape).bytes;
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
  ops::WeightSource matrix(const std::string& name, int64_t n, int64_t k) {
    const CheckpointTensor& t = ckpt_.tensor(name, {n, k});
    const DType dt = dtype_of(t, name);
    const void* data = t.data;
    if (uintptr_t(data) % size_of(dt)) {
      aligned_.emplace_back(t.bytes, name.c_str());
      std::memcpy(aligned_.back().as(), data, t.bytes);
      data = aligned_.back().as();
    }
    pending_.push_back(&t);
    return {data, dt, n, k, k};
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
    const ops::WeightSource qkv[] = {matrix(n.q + ".weight", q, d), matrix(n.k + ".weight", kv, d),
                                     matrix(n.v + ".weight", kv, d)};
    w.qkv = ops::pack_linear(qkv, 3, dtype_);
    done_packing();
    if (spec_.qkv_bias) {
      w.qkv.bias = Buffer(size_t(w.qkv.panels()) * ops::kPanel * 4, "QKV bias");
      float* b = w.qkv.bias.as<float>();
      read_vector(n.q + ".bias", q, b);
      read_vector(n.k + ".bias", kv, b + q);
      read_vector(n.v + ".bias", kv, b + q + kv);
    }
    w.attn_out = packed(n.out + ".weight", d, q);
    w.ffn_norm = vector(n.ffn_norm + ".weight", d);
    const ops::WeightSource gate = matrix(n.gate + ".weight", m, d), up = matrix(n.up + ".weight", m, d);
    w.gate_up = ops::pack_gate_up(gate, up, dtype_);
    done_packing();
    w.down = packed(n.down + ".weight", d, m);
    return w;
  }

  ops::PackedLinear packed(const std::string& name, int64_t n, int64_t k) {
    const ops::WeightSource s = matrix(name, n, k);
    ops::PackedLinear p = ops::pack_linear(&s, 1, dtype_);
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
  void finish(const CheckpointTensor& t) {
    done_ += t.bytes;
    if (progress_) progress_(done_, total_);
  }

  const ModelSpec& spec_;
  const Checkpoint& ckpt_;
  DType dtype_;
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
                     const LoadProgress& progress) {
  Weights w;
  w.dtype = dtype;
  Loader loader(spec, *checkpoint, dtype, progress);
  const ModelNames names = names_of(spec);
  loader.embedding(names.embedding + ".weight", w);
  for (const LayerNames& n : names.layers) w.layers.push_back(loader.layer(n));
  w.final_norm = loader.vector(names.final_norm + ".weight", spec.d_model);
  w.head = loader.packed((spec.tied_head ? names.embedding : names.head) + ".weight", spec.vocab_size, spec.d_model);

  std::set<std::string> used;
  for (const TensorSlot& s : tensors_of(spec)) used.insert(s.name);
  for (const std::string& name : checkpoint->names())
    if (!used.count(name)) w.unused_tensors.push_back(name);
  w.checkpoint = std::move(checkpoint);
  return w;
}

}  // namespace dllm
