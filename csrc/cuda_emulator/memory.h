// Shared memory of the block that runs, and cp.async.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_emulator/emulator.h"

namespace dllm::emu {

// Of a block of that launch, in bytes.
size_t shared_limit(const LaunchShared& launch);

// Each declared array is a heap block of exactly its size, so that ASan sees its ends; filled with 0xFF (NaN) for each block
// of threads, kept for the whole launch.
class SharedMemory {
 public:
  ~SharedMemory() { end_launch(); }
  void begin_launch(const LaunchShared& launch);
  void begin_block() { ++block_; }
  void end_launch();

  void* dynamic();
  void* named(const void* key, size_t bytes, size_t align);
  bool holds(const void* p, size_t bytes) const;

 private:
  struct Array {
    const void* key;  // null: the dynamic one
    char* p;
    size_t bytes;
    uint64_t block;  // it was last filled for
  };
  void* use(Array& array);
  void add(const void* key, size_t bytes, size_t align);

  std::vector<Array> arrays_;
  size_t dynamic_bytes_ = 0, static_bytes_ = 0, limit_ = 0;
  uint64_t block_ = 0;
};

// A thread's cp.async copies, in groups.
class AsyncCopies {
 public:
  struct Copy {
    char* to;
    const char* from;
    uint32_t bytes, source_bytes;  // the rest is zeroed
    bool landed;
    const void* pc;
  };
  void add(const Copy& copy) { copies_.push_back(copy); }
  void commit() { group_ends_.push_back(copies_.size()); }
  void wait(size_t groups_left);
  bool empty() const { return next_ == copies_.size(); }
  void clear();

 private:
  std::vector<Copy> copies_;        // [next_, ..) are not waited for
  std::vector<size_t> group_ends_;  // [waited_, ..)
  size_t next_ = 0, waited_ = 0;
};

}  // namespace dllm::emu
