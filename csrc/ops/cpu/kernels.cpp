#include "ops/cpu/kernels.h"

#include "runtime/isa.h"

namespace dllm::ops::cpu {

const Kernels& kernels() {
  switch (current_isa()) {
    case Isa::Portable:
      break;
    case Isa::Avx2:
#ifdef DLLM_HAVE_AVX2
      return avx2::table;
#else
      break;
#endif
    case Isa::Avx512:
#ifdef DLLM_HAVE_AVX512
      return avx512::table;
#else
      break;
#endif
    case Isa::Avx512Vnni:
#ifdef DLLM_HAVE_AVX512_VNNI
      return avx512_vnni::table;
#else
      break;
#endif
    case Isa::Avx512Bf16:
#ifdef DLLM_HAVE_AVX512_BF16
      return avx512_bf16::table;
#else
      break;
#endif
  }
  return portable::table;
}

}  // namespace dllm::ops::cpu
