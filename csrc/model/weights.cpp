#include "model/weights.h"

#include <cstring>

#include "model/transformer.h"
#include "model/weight_reader.h"

namespace dllm {

namespace {

class Packer {
 public:
  Packer(const ModelSpec& spec, WeightReader& reader, DType dtype, Quantization quantization)
      : spec_(spec), reader_(reader), dtype_(dtype), quantization_(quantization) {}

  LayerWeights layer(const LayerNames& n) {
    const int64_t d = spec_.d_model, q = spec_.q_columns(), kv = spec_.kv_columns(), m = spec_.mlp_hidden;
    LayerWeights w;
    w.attn_norm = reader_.vector(n.attn_norm + ".weight", d);
    const Quantization stored = spec_.stored;
    const ops::WeightSource qkv[] = {reader_.matrix(n.q, q, d, stored), reader_.matrix(n.k, kv, d, stored),
                                     reader_.matrix(n.v, kv, d, stored)};
    w.qkv = ops::pack_linear(qkv, 3, format_of(quantization_, dtype_));
    reader_.done();
    if (spec_.qkv_bias) {
      w.qkv.bias = Buffer(size_t(w.qkv.panels()) * ops::kPanel * 4, "QKV bias");
      float* b = w.qkv.bias.as<float>();
      reader_.vector(n.q + ".bias", q, b);
      reader_.vector(n.k + ".bias", kv, b + q);
      reader_.vector(n.v + ".bias", kv, b + q + kv);
    }
    w.attn_out = packed(n.out, d, q, stored, quantization_);
    w.ffn_norm = reader_.vector(n.ffn_norm + ".weight", d);
    const ops::WeightSource gate = reader_.matrix(n.gate, m, d, stored), up = reader_.matrix(n.up, m, d, stored);
    w.gate_up = ops::pack_gate_up(gate, up, format_of(quantization_, dtype_));
    reader_.done();
    w.down = packed(n.down, d, m, stored, quantization_);
    return w;
  }

  ops::PackedLinear packed(const std::string& name, int64_t n, int64_t k, Quantization stored, Quantization wanted) {
    const ops::WeightSource s = reader_.matrix(name, n, k, stored);
    ops::PackedLinear p = ops::pack_linear(&s, 1, format_of(wanted, dtype_));
    reader_.done();
    return p;
  }

  void embedding(const std::string& name, Weights& w) {
    const CheckpointTensor& t = reader_.embedding(name);
    w.embedding_dtype = WeightReader::dtype_of(t, name);
    w.embedding = t.data;
    if (uintptr_t(t.data) % size_of(w.embedding_dtype)) {
      w.embedding_copy = Buffer(t.bytes, name.c_str());
      std::memcpy(w.embedding_copy.as(), t.data, t.bytes);
      w.embedding = w.embedding_copy.as();
    }
  }

 private:
  const ModelSpec& spec_;
  WeightReader& reader_;
  DType dtype_;
  Quantization quantization_;
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
  quantization = resolve_quantization(spec, quantization);
  Weights w;
  w.dtype = dtype;
  w.quantization = quantization;
  WeightReader reader(spec, *checkpoint, progress);
  Packer packer(spec, reader, dtype, quantization);
  const ModelNames names = names_of(spec);
  packer.embedding(names.embedding + ".weight", w);
  for (const LayerNames& n : names.layers) w.layers.push_back(packer.layer(n));
  w.final_norm = reader.vector(names.final_norm + ".weight", spec.d_model);
  w.head = packer.packed(spec.tied_head ? names.embedding : names.head, spec.vocab_size, spec.d_model,
                         spec.tied_head ? Quantization::None : head_quantization(spec.stored),
                         head_quantization(quantization));
  w.unused_tensors = unused_tensors(spec, *checkpoint);
  w.checkpoint = std::move(checkpoint);
  return w;
}

std::unique_ptr<Model> load_cpu_model(const ModelSpec& spec, std::unique_ptr<Checkpoint> checkpoint, DType dtype,
                                      Quantization quantization, const LoadProgress& progress) {
  return std::make_unique<Transformer>(
      spec, std::make_unique<const Weights>(load_weights(spec, std::move(checkpoint), dtype, quantization, progress)));
}

}  // namespace dllm
