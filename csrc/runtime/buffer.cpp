#include "runtime/buffer.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "runtime/error.h"

namespace dllm {

namespace {
std::atomic<int64_t> taken_bytes = 0, taken_blocks = 0;
}

BufferCount buffers_taken() {
  return {taken_bytes.load(std::memory_order_relaxed), taken_blocks.load(std::memory_order_relaxed)};
}

void* take_memory(size_t bytes, const char* what) {
  const size_t rounded = (bytes + 63) / 64 * 64;
  void* data = rounded >= bytes ? std::aligned_alloc(64, rounded) : nullptr;
  if (!data) fail<OutOfMemoryError>("out of memory: ", what, " asked for ", bytes, " bytes");
  std::memset(data, 0, rounded);
  taken_bytes.fetch_add(int64_t(rounded), std::memory_order_relaxed);
  taken_blocks.fetch_add(1, std::memory_order_relaxed);
  return data;
}

Buffer::Buffer(size_t bytes, const char* what) {
  if (bytes == 0) return;
  data_ = take_memory(bytes, what);
  bytes_ = (bytes + 63) / 64 * 64;
}

Buffer::~Buffer() { std::free(data_); }

size_t checked_bytes(const char* what, size_t a, size_t b, size_t c, size_t d) {
  size_t n = a;
  for (size_t f : {b, c, d})
    if (__builtin_mul_overflow(n, f, &n))
      fail<OutOfMemoryError>("out of memory: ", what, " asked for more bytes than can be addressed (", a, " x ", b,
                             " x ", c, " x ", d, ")");
  return n;
}

}  // namespace dllm
