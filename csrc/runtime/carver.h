// Cuts one block of memory into arrays, each aligned to 16 bytes. With a null base it only counts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dllm {

class Carver {
 public:
  explicit Carver(void* base) : begin_(static_cast<char*>(base)), next_(begin_) {}

  template <class T>
  void take(T*& p, int64_t count) {
    p = reinterpret_cast<T*>(next_);
    next_ += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
  }
  size_t bytes() const { return size_t(next_ - begin_); }

 private:
  char* begin_;
  char* next_;
};

}  // namespace dllm
