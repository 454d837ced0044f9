// A tiny seeded random model on disk, for tests that need an engine without Python.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "model/spec.h"

namespace dllm::test {

class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "dllm-XXXXXX").string();
    if (!::mkdtemp(name.data())) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  std::string path() const { return path_; }
  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ + "/" + name, std::ios::binary) << bytes;
  }

 private:
  std::string path_;
};

inline std::string tiny_config(Family family) {
  return family == Family::LLaDA
             ? R"({"model_type": "llada", "d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2,
                   "mlp_hidden_size": 48, "max_sequence_length": 256, "vocab_size": 70, "rope_theta": 1e4,
                   "mask_token_id": 1, "eos_token_id": 0})"
             : R"({"model_type": "Dream", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256,
                   "vocab_size": 70, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "mask_token_id": 1, "eos_token_id": 0})";
}

// The bytes of a safetensors file.
inline std::string safetensors(const std::vector<std::pair<TensorSlot, std::string>>& tensors) {
  std::string header = "{", data;
  for (const auto& [slot, bytes] : tensors) {
    std::string shape;
    for (int64_t d : slot.shape) shape += (shape.empty() ? "" : ",") + std::to_string(d);
    header += (header.size() > 1 ? ",\"" : "\"") + slot.name + R"(":{"dtype":"F32","shape":[)" + shape +
              R"(],"data_offsets":[)" + std::to_string(data.size()) + "," + std::to_string(data.size() + bytes.size()) +
              "]}";
    data += bytes;
  }
  header += "}";
  while (header.size() % 8) header += ' ';
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i) out[size_t(i)] = char(uint64_t(header.size()) >> (8 * i));
  return out + header + data;
}

inline void write_tiny_model(const TempFolder& folder, Family family, float poison = 0) {
  const std::string config = tiny_config(family);
  const ModelSpec spec = ModelSpec::from_config(config, "config.json");
  std::mt19937 rng(1234);
  std::normal_distribution<float> normal;
  std::vector<std::pair<TensorSlot, std::string>> tensors;
  for (const TensorSlot& slot : tensors_of(spec)) {
    int64_t n = 1;
    for (int64_t d : slot.shape) n *= d;
    std::string bytes(size_t(n) * 4, '\0');
    for (int64_t i = 0; i < n; ++i) {
      // Norms near 1; matrices scaled by their fan-in, so that activations stay of order one.
      float f = slot.shape.size() == 1 ? 1.0f + 0.1f * normal(rng) : normal(rng) / std::sqrt(float(slot.shape.back()));
      if (slot.name.find("1.") != slot.name.npos && slot.shape.size() == 2 && i == 5 && poison != 0) f = poison;
      std::memcpy(bytes.data() + 4 * i, &f, 4);
    }
    tensors.emplace_back(slot, std::move(bytes));
  }
  folder.write("config.json", config);
  folder.write("model.safetensors", safetensors(tensors));
}

}  // namespace dllm::test
