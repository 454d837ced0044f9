// Numbers for places in the code, and their source lines.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dllm::emu::races {

// pc: where a call returns to. Numbers are small, from 1.
uint32_t place_of(const void* pc);
const void* pc_of(uint32_t place);

// "ops/cuda/attention.cu:120" for each pc: of the kernel file where a function of kernel.h was inlined into one.
std::vector<std::string> source_lines(const std::vector<const void*>& pcs);

}  // namespace dllm::emu::races
