// Named ranges in Nsight's timeline. Where no tool is attached a range costs two nanoseconds; where NVTX's headers are
// missing (they come with CUDA and with a CUDA torch), nothing.
#pragma once

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

}  // namespace dllm
