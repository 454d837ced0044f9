#include "model/checkpoint.h"

#include <sys/stat.h>

#include <cstring>

#include "runtime/error.h"
#include "runtime/json.h"

namespace dllm {

namespace {

constexpr size_t kMaxHeader = size_t(100) << 20;  // the format's own limit
constexpr size_t kMaxConfig = size_t(64) << 20;

bool exists(const std::string& path) {
  struct stat st;
  return ::stat(path.c_str(), &st) == 0;
}

size_t element_bytes(const std::string& dtype) {
  static const std::map<std::string, size_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
      {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"I64", 8},     {"U64", 8}, {"F64", 8}};
  const auto it = sizes.find(dtype);
  return it == sizes.end() ? 0 : it->second;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

CheckpointTensor parse_entry(const Json& entry, const std::string& what, const MappedFile& file, size_t data_begin) {
  entry.as_object(what);
  const Json *dtype = entry.find("dtype"), *shape = entry.find("shape"), *offsets = entry.find("data_offsets");
  if (!dtype || !shape || !offsets) fail<CheckpointError>(what, " lacks dtype, shape or data_offsets");
  CheckpointTensor t;
  t.dtype = dtype->as_string(what + " dtype");
  t.file = &file;
  const size_t element = element_bytes(t.dtype);
  if (!element) fail<CheckpointError>(what, " has the unknown dtype \"", t.dtype, "\"");

  size_t bytes = element;
  for (const Json& d : shape->as_array(what + " shape")) {
    const int64_t n = d.as_integer(what + " shape");
    if (n < 0 || __builtin_mul_overflow(bytes, size_t(n), &bytes))
      fail<CheckpointError>(what, " has an impossible shape");
    t.shape.push_back(n);
  }
  const auto& range = offsets->as_array(what + " data_offsets");
  if (range.size() != 2) fail<CheckpointError>(what, " data_offsets must be two numbers");
  const int64_t begin = range[0].as_integer(what + " data_offsets"), end = range[1].as_integer(what + " data_offsets");
  const size_t available = file.size() - data_begin;
  if (begin < 0 || end < begin || size_t(end) > available)
    fail<CheckpointError>(what, " lies outside its file (bytes ", begin, " to ", end, " of ", available,
                          "): truncated or corrupt");
  if (size_t(end - begin) != bytes)
    fail<CheckpointError>(what, " has ", end - begin, " bytes but shape ", shape_text(t.shape), " ", t.dtype, " needs ",
                          bytes);
  t.data = file.data() + data_begin + size_t(begin);
  t.bytes = bytes;
  return t;
}

}  // namespace

Checkpoint::Checkpoint(const std::string& folder) : folder_(folder) {
  if (!exists(folder)) fail<CheckpointError>("model folder ", folder, " does not exist");
  config_text_ = read_text_file(config_path(), kMaxConfig);
  const std::string single = folder + "/model.safetensors", index = folder + "/model.safetensors.index.json";
  if (exists(single))
    open_file(single);
  else if (exists(index))
    open_sharded(index);
  else
    fail<CheckpointError>(folder, " holds neither model.safetensors nor model.safetensors.index.json");
}

void Checkpoint::open_file(const std::string& path) {
  const MappedFile& file = files_.emplace(path, MappedFile(path)).first->second;
  uint64_t header = 0;
  if (file.size() < 8) fail<CheckpointError>(path, " is too short for a safetensors file (", file.size(), " bytes)");
  std::memcpy(&header, file.data(), 8);
  if (header > kMaxHeader || header > file.size() - 8)
    fail<CheckpointError>(path, " is truncated or not a safetensors file (header of ", header, " bytes, file of ",
                          file.size(), ")");
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, header);
  const Json json = Json::parse(text, path + " (header)");
  for (const auto& [name, entry] : json.as_object(path + " (header)")) {
    if (name == "__metadata__") continue;
    const std::string what = path + ": tensor \"" + name + "\"";
    if (!tensors_.emplace(name, parse_entry(entry, what, file, 8 + size_t(header))).second)
      fail<CheckpointError>(what, " appears twice");
  }
}

void Checkpoint::open_sharded(const std::string& index_path) {
  const Json json = Json::parse(read_text_file(index_path, kMaxHeader), index_path);
  const Json* map = json.find("weight_map");
  if (!map) fail<CheckpointError>(index_path, " has no weight_map");
  for (const auto& [name, file] : map->as_object(index_path + ": weight_map")) {
    const std::string& shard = file.as_string(index_path + ": " + name);
    // A shard is a file beside the index, never a path that leads elsewhere.
    if (shard.empty() || shard.find('/') != shard.npos || shard[0] == '.')
      fail<CheckpointError>(index_path, ": \"", shard, "\" is not the name of a shard");
    const std::string path = folder_ + "/" + shard;
    if (!files_.count(path)) open_file(path);
  }
}

const CheckpointTensor& Checkpoint::tensor(const std::string& name, const std::vector<int64_t>& shape) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) fail<CheckpointError>(folder_, ": tensor \"", name, "\" is missing");
  if (it->second.shape != shape)
    fail<CheckpointError>(folder_, ": tensor \"", name, "\" has shape ", shape_text(it->second.shape),
                          "; config.json asks for ", shape_text(shape));
  return it->second;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> out;
  for (const auto& [name, t] : tensors_) out.push_back(name);
  return out;
}

}  // namespace dllm
