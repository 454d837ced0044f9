#include "model/weight_reader.h"

#include <cmath>
#include <cstring>
#include <set>

#include "runtime/error.h"

namespace dllm {

ops::WeightFormat format_of(Quantization quantization, DType dtype) {
  switch (quantization) {
    case Quantization::None:
      break;
    case Quantization::Int8:
      return ops::WeightFormat::I8;
    case Quantization::Int4:
      return ops::WeightFormat::I4;
  }
  return ops::format_of(dtype);
}

WeightReader::WeightReader(const ModelSpec& spec, const Checkpoint& checkpoint, const LoadProgress& progress)
    : spec_(spec), checkpoint_(checkpoint), progress_(progress) {
  for (const TensorSlot& slot : tensors_of(spec)) total_ += checkpoint.tensor(slot.name, slot.shape).bytes;
  if (spec.tied_head)  // it is read twice
    total_ += checkpoint.tensor(names_of(spec).embedding + ".weight", {spec.vocab_size, spec.d_model}).bytes;
}

DType WeightReader::dtype_of(const CheckpointTensor& t, const std::string& name) {
  if (t.dtype == "F32") return DType::F32;
  if (t.dtype == "BF16") return DType::BF16;
  fail<CheckpointError>("tensor \"", name, "\" has dtype ", t.dtype, "; F32 and BF16 are supported");
}

void WeightReader::vector(const std::string& name, int64_t n, float* out) {
  const CheckpointTensor& t = checkpoint_.tensor(name, {n});
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

Buffer WeightReader::vector(const std::string& name, int64_t n) {
  Buffer b(size_t(n) * 4, name.c_str());
  vector(name, n, b.as<float>());
  return b;
}

ops::WeightSource WeightReader::matrix(const std::string& name, int64_t n, int64_t k, Quantization stored) {
  if (stored != Quantization::None) return quantized_matrix(name, n, k, stored);
  const CheckpointTensor& t = checkpoint_.tensor(name + ".weight", {n, k});
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

ops::WeightSource WeightReader::quantized_matrix(const std::string& name, int64_t n, int64_t k, Quantization stored) {
  const ops::WeightFormat format = format_of(stored, DType::F32);
  const bool wide = format == ops::WeightFormat::I8;
  const auto part = [&](const std::string& full, const std::vector<int64_t>& shape, const char* dtype) {
    const CheckpointTensor& t = checkpoint_.tensor(full, shape);
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

void WeightReader::done() {
  for (const CheckpointTensor* t : pending_) {
    t->file->release(t->data, t->bytes);
    finish(*t);
  }
  pending_.clear();
  aligned_.clear();
}

const CheckpointTensor& WeightReader::embedding(const std::string& name) {
  const CheckpointTensor& t = checkpoint_.tensor(name, {spec_.vocab_size, spec_.d_model});
  finish(t);
  return t;
}

void WeightReader::finish(const CheckpointTensor& t) {
  done_ += t.bytes;
  if (progress_) progress_(done_, total_);
}

Quantization resolve_quantization(const ModelSpec& spec, Quantization asked) {
  if (asked == Quantization::None) return spec.stored;
  if (spec.stored != Quantization::None && asked != spec.stored)
    fail<ConfigError>("quantization = \"", name_of(asked), "\" is not allowed: the checkpoint is ",
                      name_of(spec.stored), " already");
  return asked;
}

std::vector<std::string> unused_tensors(const ModelSpec& spec, const Checkpoint& checkpoint) {
  std::set<std::string> used;
  for (const TensorSlot& s : tensors_of(spec)) used.insert(s.name);
  std::vector<std::string> unused;
  for (const std::string& name : checkpoint.names())
    if (!used.count(name)) unused.push_back(name);
  return unused;
}

}  // namespace dllm
