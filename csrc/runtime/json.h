// A strict reader for the JSON of checkpoints (config.json, safetensors headers, shard indexes), so that the engine loads
// models without Python. Every malformed text is a CheckpointError that names the source and the byte offset.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dllm {

class Json {
 public:
  enum class Kind { Null, Bool, Number, String, Array, Object };

  static Json parse(std::string_view text, const std::string& source);

  Kind kind() const { return kind_; }
  bool is_null() const { return kind_ == Kind::Null; }

  // Typed access; the wrong kind is a CheckpointError that names `what`.
  bool as_bool(const std::string& what) const;
  double as_number(const std::string& what) const;
  int64_t as_integer(const std::string& what) const;  // whole and within +-2^53
  const std::string& as_string(const std::string& what) const;
  const std::vector<Json>& as_array(const std::string& what) const;
  const std::vector<std::pair<std::string, Json>>& as_object(const std::string& what) const;

  // The member's value, or nullptr where it is absent (or this is no object).
  const Json* find(std::string_view key) const;

 private:
  friend class JsonParser;
  Kind kind_ = Kind::Null;
  bool bool_ = false;
  double number_ = 0;
  std::string string_;
  std::vector<Json> array_;
  std::vector<std::pair<std::string, Json>> object_;
};

}  // namespace dllm
