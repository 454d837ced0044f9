// Owned, 64-byte aligned memory. Failing to get it is an OutOfMemoryError that names the bytes. What Buffers take is
// counted, so that the loop can show that it takes nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace dllm {

// Zero-filled memory for std::free.
void* take_memory(size_t bytes, const char* what);

class Buffer {
 public:
  Buffer() = default;
  // Zero-filled, so that padding never holds a NaN. `what` names the owner in the error.
  Buffer(size_t bytes, const char* what);
  ~Buffer();
  Buffer(Buffer&& o) noexcept : data_(std::exchange(o.data_, nullptr)), bytes_(std::exchange(o.bytes_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    return *this;
  }

  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

  // Keeps what is there if it is large enough; otherwise a new zero-filled block (contents are lost).
  void reserve(size_t bytes, const char* what) {
    if (bytes > bytes_) *this = Buffer(bytes, what);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Bytes that Buffers of this process have taken so far, and how often; never counted down.
struct BufferCount {
  int64_t bytes, blocks;
};
BufferCount buffers_taken();

// rows * cols * element size with overflow checked.
size_t checked_bytes(const char* what, size_t a, size_t b, size_t c = 1, size_t d = 1);

}  // namespace dllm
