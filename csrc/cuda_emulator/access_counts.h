// What the loads and stores of warps cost: sectors of device memory, passes over the banks of shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dllm::emu::races::counts {

void begin_launch(const char* kernel, unsigned threads);
void end_block();
void add(const void* p, size_t bytes, bool write, bool shared, uint32_t place);

}  // namespace dllm::emu::races::counts
