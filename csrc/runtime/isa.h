// Instruction sets of this CPU, chosen once at run time. DLLM_ISA=portable|avx2|avx512|avx512_vnni|avx512_bf16 lowers the choice
// (for tests and for measuring); asking for more than the CPU has is a ConfigError.
#pragma once

#include <string>
#include <vector>

namespace dllm {

enum class Isa { Portable, Avx2, Avx512, Avx512Vnni, Avx512Bf16 };

const char* name_of(Isa isa);
Isa best_isa();  // the best this CPU (and this build) can run
std::vector<Isa> available_isas();  // from Portable up to best_isa()
Isa current_isa();  // what the kernels use
void set_isa(const std::string& name);  // by name, or "auto"

}  // namespace dllm
