// A file mapped read-only into memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace dllm {

class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);  // CheckpointError where it cannot be opened
  ~MappedFile();
  MappedFile(MappedFile&& o) noexcept : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  MappedFile& operator=(MappedFile&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
    return *this;
  }

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

  // Lets the kernel drop the pages of a range that has been read: what was packed need not stay resident twice.
  void release(const void* begin, size_t bytes) const;

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// The whole of a small text file; CheckpointError where it is missing or larger than `limit`.
std::string read_text_file(const std::string& path, size_t limit);

}  // namespace dllm
