#include "model/cuda/weights.h"

#include <cstring>

#include "model/rope.h"
#include "model/weight_reader.h"
#include "ops/cpu/source_rows.h"
#include "ops/cuda/quant_linear.h"
#include "runtime/buffer.h"
#include "runtime/error.h"

namespace dllm {

namespace {

// Rows of fp32 as elements of `type`.
void round_row(const float* from, int64_t n, DType type, void* to) {
  if (type == DType::F32) {
    std::memcpy(to, from, size_t(n) * 4);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) out[i] = type == DType::BF16 ? float_to_bf16(from[i]) : float_to_f16(from[i]);
}

class Uploader {
 public:
  Uploader(const ModelSpec& spec, WeightReader& reader, DType dtype, Quantization quantization, Device& device)
      : spec_(spec), reader_(reader), dtype_(dtype), quantization_(quantization), device_(device) {}

  DeviceBuffer upload(const void* data, size_t bytes, const std::string& name) {
    DeviceBuffer b(device_, bytes, name.c_str());
    device_.copy_in(b.as(), data, bytes);
    return b;
  }
  DeviceBuffer vector(const std::string& name, int64_t n) {
    const Buffer b = reader_.vector(name, n);
    return upload(b.as(), size_t(n) * 4, name);
  }

  // The rows of `names` stacked.
  CudaLinear linear(const std::vector<std::pair<std::string, int64_t>>& names, int64_t k, Quantization stored,
                    Quantization wanted) {
    std::vector<ops::WeightSource> sources;
    CudaLinear w;
    w.k = k;
    for (const auto& [name, n] : names) {
      sources.push_back(reader_.matrix(name, n, k, stored));
      w.n += n;
    }
    w.format = wanted == Quantization::None ? ops::WeightFormat::F32 : format_of(wanted, dtype_);
    const std::string& what = names[0].first;
    w.weight = w.quantized() ? quantized(sources, w, what) : dense(sources, w, what);
    reader_.done();
    return w;
  }

  DeviceBuffer dense(const std::vector<ops::WeightSource>& sources, const CudaLinear& w, const std::string& name) {
    const size_t row_bytes = size_t(w.k) * size_of(dtype_);
    staging_.reserve(checked_bytes(name.c_str(), size_t(w.n), row_bytes), name.c_str());
    char* to = staging_.as<char>();
    std::vector<float> row(static_cast<size_t>(w.k));
    for (const ops::WeightSource& s : sources)
      for (int64_t i = 0; i < s.n; ++i, to += row_bytes) {
        ops::cpu::read_row(s, i, row.data());
        round_row(row.data(), w.k, dtype_, to);
      }
    return upload(staging_.as(), size_t(w.n) * row_bytes, name);
  }

  DeviceBuffer quantized(const std::vector<ops::WeightSource>& sources, const CudaLinear& w, const std::string& name) {
    const size_t row = size_t(ops::quantized_row_bytes(w.format, w.k));
    const size_t scale = size_t(ops::quantized_scale_bytes(w.format, w.k));
    std::vector<char> values(size_t(w.n) * row), scales(size_t(w.n) * scale);
    size_t first = 0;
    for (const ops::WeightSource& s : sources) {
      char *v = values.data() + first * row, *z = scales.data() + first * scale;
      if (ops::is_quantized(s.format)) {
        std::memcpy(v, s.data, size_t(s.n) * row);
        std::memcpy(z, s.scales, size_t(s.n) * scale);
      } else {
        ops::quantize_matrix(s, w.format, v, z, name.c_str());
      }
      first += size_t(s.n);
    }
    const size_t bytes = ops::cuda::quant_bytes(w.format, w.n, w.k);
    staging_.reserve(bytes, name.c_str());
    ops::cuda::quant_pack({values.data(), w.format, w.n, w.k, w.k, scales.data()}, staging_.as());
    return upload(staging_.as(), bytes, name);
  }

  CudaLayer layer(const LayerNames& n) {
    const int64_t d = spec_.d_model, q = spec_.q_columns(), kv = spec_.kv_columns(), m = spec_.mlp_hidden;
    const Quantization stored = spec_.stored;
    CudaLayer w;
    w.attn_norm = vector(n.attn_norm + ".weight", d);
    w.qkv = linear({{n.q, q}, {n.k, kv}, {n.v, kv}}, d, stored, quantization_);
    if (spec_.qkv_bias) {
      std::vector<float> bias(static_cast<size_t>(q + 2 * kv));
      reader_.vector(n.q + ".bias", q, bias.data());
      reader_.vector(n.k + ".bias", kv, bias.data() + q);
      reader_.vector(n.v + ".bias", kv, bias.data() + q + kv);
      w.qkv_bias = upload(bias.data(), bias.size() * 4, "QKV bias");
    }
    w.attn_out = linear({{n.out, d}}, q, stored, quantization_);
    w.ffn_norm = vector(n.ffn_norm + ".weight", d);
    w.gate_up = linear({{n.gate, m}, {n.up, m}}, d, stored, quantization_);
    w.down = linear({{n.down, d}}, m, stored, quantization_);
    return w;
  }

  void rope(CudaWeights& w) {
    const int64_t elements = spec_.max_positions * (spec_.head_dim / 2);
    std::vector<float> cos(static_cast<size_t>(elements)), sin(static_cast<size_t>(elements));
    rope_tables(spec_, dtype_, 0, spec_.max_positions, cos.data(), sin.data());
    w.cos = upload(cos.data(), cos.size() * 4, "rotary tables");
    w.sin = upload(sin.data(), sin.size() * 4, "rotary tables");
  }

 private:
  const ModelSpec& spec_;
  WeightReader& reader_;
  DType dtype_;
  Quantization quantization_;
  Device& device_;
  Buffer staging_;
};

}  // namespace

size_t CudaLayer::bytes() const {
  return attn_norm.bytes() + qkv.weight.bytes() + qkv_bias.bytes() + attn_out.weight.bytes() + ffn_norm.bytes() +
         gate_up.weight.bytes() + down.weight.bytes();
}

CudaWeights load_cuda_weights(const ModelSpec& spec, const Checkpoint& checkpoint, DType dtype,
                              Quantization quantization, const LoadProgress& progress, Device& device) {
  quantization = resolve_quantization(spec, quantization);
  CudaWeights w;
  WeightReader reader(spec, checkpoint, progress);
  Uploader up(spec, reader, dtype, quantization, device);
  const ModelNames names = names_of(spec);
  const CheckpointTensor& table = reader.embedding(names.embedding + ".weight");
  w.embedding_dtype = WeightReader::dtype_of(table, names.embedding);
  w.embedding = up.upload(table.data, table.bytes, names.embedding);
  up.rope(w);
  for (const LayerNames& n : names.layers) w.layers.push_back(up.layer(n));
  w.final_norm = up.vector(names.final_norm + ".weight", spec.d_model);
  w.head =
      up.linear({{spec.tied_head ? names.embedding : names.head, spec.vocab_size}}, spec.d_model,
                spec.tied_head ? Quantization::None : head_quantization(spec.stored), head_quantization(quantization));
  w.info = {dtype, quantization, 0, unused_tensors(spec, checkpoint)};
  for (const CudaLayer& l : w.layers) w.info.resident_bytes += l.bytes();
  w.info.resident_bytes += w.embedding.bytes() + w.final_norm.bytes() + w.head.weight.bytes();
  return w;
}

}  // namespace dllm
