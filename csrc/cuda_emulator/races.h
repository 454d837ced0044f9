// The race detector, in builds with DLLM_EMU_RACES. Kernels and cases are compiled with -fsanitize=thread but linked without
// its runtime: the compiler then calls __tsan_read4() and the like for each load and store, and races.cpp answers.
//
// It reports
// - two threads of a block on the same byte of shared or device memory, one of them writing, with no barrier between;
// - two blocks of a launch likewise on device memory: blocks are not ordered;
// - reads of shared memory that the block, or of device memory that nothing, has written;
// - accesses to host memory: what is neither device or shared memory nor the thread's own nor a constant.
// Atomics are exempt. And it counts what each warp's loads and stores cost, by source line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dllm::emu {

#if defined(DLLM_EMU_RACES)
inline constexpr bool kRaces = true;
#else
inline constexpr bool kRaces = false;
#endif

// Defined in race builds only: calls stand under `if constexpr (kRaces)`.
namespace races {

// --- What the emulator tells ------------------------------------------------------------------------------------------
void begin_launch(const char* kernel, unsigned threads, const void* body, size_t body_bytes);
void end_launch();
void begin_block();
void block_synchronised();
void warp_synchronised(unsigned warp);
void add_shared(const void* p, size_t bytes);
void drop_shared();
void add_device(const void* p, size_t bytes);
void drop_device(const void* p);
void parameters(const void* p, size_t bytes);  // where a kernel's arguments lie; it may read them

// The thread that runs reads or writes [p, p + bytes); pc: what the instruction would return to.
void access(const void* p, size_t bytes, bool write, const void* pc);
// Shared memory under a cp.async: written, but not to be read before it lands.
void overwritten(const void* p, size_t bytes, const void* pc);
// Device memory was written by something other than a kernel.
void written(const void* p, size_t bytes);

// --- Results ----------------------------------------------------------------------------------------------------------
std::vector<std::string> take_reports();  // each distinct pair of places once

// Loads or stores of one source line. A request is what a warp's lanes do together in one instruction. Units are 32-byte
// sectors of device memory or wavefronts (passes over the banks) of shared memory; ideal: the fewest that could do.
struct Site {
  std::string where, kernel;  // file:line
  bool shared, store;
  unsigned bytes;  // of a lane
  uint64_t requests, units, ideal;
  double ratio() const { return ideal ? double(units) / double(ideal) : 1.0; }
};
void count_accesses(bool on);
std::vector<Site> take_sites();

}  // namespace races
}  // namespace dllm::emu
