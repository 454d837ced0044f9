// Named ranges in Nsight's timeline. Where no tool is attached a range costs two nanoseconds; where NVTX's headers are
// missing (they come with CUDA and with a CUDA torch), nothing.
#pragma once

#include <cstdint>
#include <utility>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#endif

namespace dllm {

class NvtxRange {
 public:
#if __has_include(<nvtx3/nvToolsExt.h>)
  explicit NvtxRange(const char* name) { nvtxRangePushA(name); }
  ~NvtxRange() { nvtxRangePop(); }
#else
  explicit NvtxRange(const char*) {}
#endif
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};

// A range that others may overlap, and that ends where it is told to. Only for files that are compiled with CUDA's headers.
class NvtxSpan {
 public:
  NvtxSpan() = default;
  NvtxSpan(NvtxSpan&& other) noexcept : id_(std::exchange(other.id_, 0)) {}
  ~NvtxSpan() { end(); }

#if __has_include(<nvtx3/nvToolsExt.h>)
  void begin(const char* name) {
    end();
    id_ = nvtxRangeStartA(name);
  }
  void end() {
    if (const uint64_t id = std::exchange(id_, 0)) nvtxRangeEnd(id);
  }
#else
  void begin(const char*) {}
  void end() {}
#endif

 private:
  uint64_t id_ = 0;  // 0: none, or no tool is attached
};

}  // namespace dllm
