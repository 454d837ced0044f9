#include "runtime/isa.h"

#include <atomic>
#include <cstdlib>

#include "runtime/error.h"

namespace dllm {
namespace {

constexpr Isa kAll[] = {Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Avx512Bf16};

// What the build has kernels for (DLLM_HAVE_*, set by CMake for x86-64) and the CPU can run. __builtin_cpu_supports also
// asks XGETBV, so an operating system that does not save the wide registers counts as "no".
bool supported(Isa isa) {
  switch (isa) {
    case Isa::Portable:
      return true;
    case Isa::Avx2:
#ifdef DLLM_HAVE_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::Avx512:
#ifdef DLLM_HAVE_AVX512
      return supported(Isa::Avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
      return false;
#endif
    case Isa::Avx512Vnni:
#ifdef DLLM_HAVE_AVX512_VNNI
      return supported(Isa::Avx512) && __builtin_cpu_supports("avx512vnni");
#else
      return false;
#endif
    case Isa::Avx512Bf16:  // every CPU that has it has VNNI
#ifdef DLLM_HAVE_AVX512_BF16
      return supported(Isa::Avx512Vnni) && __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
  }
  return false;
}

Isa parse(const std::string& name) {
  if (name == "auto") return best_isa();
  for (Isa isa : kAll) {
    if (name != name_of(isa)) continue;
    if (!supported(isa))
      fail<ConfigError>("instruction set ", name, " is not available; the best is ", name_of(best_isa()));
    return isa;
  }
  fail<ConfigError>("unknown instruction set \"", name, "\": auto, portable, avx2, avx512, avx512_vnni or avx512_bf16");
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa = [] {
    const char* env = std::getenv("DLLM_ISA");
    return env && *env ? parse(env) : best_isa();
  }();
  return isa;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::Portable:
      return "portable";
    case Isa::Avx2:
      return "avx2";
    case Isa::Avx512:
      return "avx512";
    case Isa::Avx512Vnni:
      return "avx512_vnni";
    case Isa::Avx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

Isa best_isa() {
  static const Isa best = [] {
    Isa found = Isa::Portable;
    for (Isa isa : kAll)
      if (supported(isa)) found = isa;
    return found;
  }();
  return best;
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : kAll)
    if (supported(isa)) isas.push_back(isa);
  return isas;
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { current().store(parse(name), std::memory_order_relaxed); }

}  // namespace dllm
