// A checkpoint folder in Hugging Face's form: config.json and model.safetensors, or model.safetensors.index.json with
// its shards. Files are memory-mapped; every length, offset, shape and name is checked before it is used, because a
// checkpoint is input from a stranger. Format: https://github.com/huggingface/safetensors#format
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/mapped_file.h"

namespace dllm {

struct CheckpointTensor {
  std::string dtype;  // as the file spells it: "F32", "BF16", ...
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;
  size_t bytes = 0;
  const MappedFile* file = nullptr;
};

class Checkpoint {
 public:
  explicit Checkpoint(const std::string& folder);

  const std::string& config_text() const { return config_text_; }
  std::string config_path() const { return folder_ + "/config.json"; }

  // CheckpointError where the tensor is missing, or has another shape.
  const CheckpointTensor& tensor(const std::string& name, const std::vector<int64_t>& shape) const;
  std::vector<std::string> names() const;

 private:
  void open_file(const std::string& path);
  void open_sharded(const std::string& index_path);

  std::string folder_, config_text_;
  std::map<std::string, MappedFile> files_;
  std::map<std::string, CheckpointTensor> tensors_;
};

}  // namespace dllm
