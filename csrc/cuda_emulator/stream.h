// The emulated CUDA runtime: a stream, captured graphs, and device memory that only work in a stream may touch.
// Not thread-safe, as the whole emulator.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_emulator/emulator.h"

namespace dllm::emu {

enum class Kind { Kernel, CopyIn, CopyOut, CopyWithin, Fill, Gemm };
inline constexpr int kKinds = 6;
const char* name_of(Kind kind);

struct Work {
  std::string name;
  Kind kind;
  std::function<void()> run;
};
using Graph = std::shared_ptr<const std::vector<Work>>;

// What the host asked for, counted when it is submitted; work of a replayed graph counts each time.
struct Counters {
  std::array<uint64_t, kKinds> work{};
  uint64_t graph_launches = 0;
  uint64_t synchronisations = 0;  // of everything submitted, whether or not anything was left to do
  uint64_t waits = 0;  // run_until(): for an event, while later work may go on
  uint64_t operator[](Kind kind) const { return work[size_t(kind)]; }
};

// A stream. Eager: work runs when it is pushed. Lazy: as late as the host lets it, when synchronize() or run_until() needs
// it, which shows up host code that reads results, reuses staging memory or frees buffers too early.
// An error of the work is thrown from where it runs; what was still to run is dropped.
class Queue {
 public:
  enum class Mode { Eager, Lazy };
  explicit Queue(Mode mode = Mode::Eager) : mode_(mode) {}
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  void push(std::string name, Kind kind, std::function<void()> work);
  void synchronize();

  // An event is the ticket submitted() at its record: run_until() waits for it.
  uint64_t submitted() const { return submitted_; }
  uint64_t completed() const { return completed_; }
  void run_until(uint64_t ticket);

  // Between the two, what is pushed is recorded and does not run. A graph is one submission at each replay.
  void begin_capture();
  Graph end_capture();
  bool capturing() const { return capture_ != nullptr; }
  void replay(const Graph& graph);

  const Counters& counters() const { return counters_; }
  // (name, kind) of all that ran, while `trace` is on.
  bool trace = false;
  const std::vector<std::pair<std::string, Kind>>& executed() const { return executed_; }
  void reset_counters();

 private:
  void submit(Graph work);
  void run_next();
  void finish(uint64_t ticket);

  Mode mode_;
  std::deque<Graph> pending_;
  std::shared_ptr<std::vector<Work>> capture_;
  uint64_t submitted_ = 0, completed_ = 0;
  Counters counters_;
  std::vector<std::pair<std::string, Kind>> executed_;
};

// Device memory. Each allocation has its own pages: its end lies at a page that faults (as near as an alignment of 256
// bytes allows; under ASan what is left between is poisoned too), and memory that was given back faults. All of it faults
// while no work runs, so host code cannot touch it. New memory is filled with 0xFF: NaN, and an index out of any range.
class Arena {
 public:
  void* take(size_t bytes);  // null beyond the capacity
  void give(void* p);        // null is allowed

  bool is_device(const void* p) const { return p >= base_ && p < end_; }
  // Whether [p, p + bytes) lies in one live allocation.
  bool holds(const void* p, size_t bytes) const;

  size_t capacity = size_t(16) << 30;  // of memory taken at a time
  size_t used() const { return used_; }
  size_t peak() const { return peak_; }

  // While one of these lives, device memory can be touched. Queue holds one around the work it runs.
  class Access {
   public:
    Access();
    ~Access();
    Access(const Access&) = delete;
    Access& operator=(const Access&) = delete;
  };

 private:
  friend class Access;
  void reserve();
  char* place(size_t span);
  void protect(bool open);

  struct Allocation {
    size_t bytes, span;  // asked for; with its guard page
    char* slot;
  };
  char* base_ = nullptr;
  char* end_ = nullptr;
  char* next_ = nullptr;  // what lies behind was never used
  int guard_ = -1;        // an empty file: its pages fault whatever their protection
  std::map<char*, Allocation> live_;
  std::map<size_t, std::deque<char*>> free_;  // by span; used again once the address space is used up
  size_t used_ = 0, peak_ = 0;
  int open_ = 0;
};
Arena& arena();

// Memory traffic of work that is not a kernel: copies, and results that a stand-in for a library (a GEMM) has written.
// The race detector has to know what was initialised.
void copy(void* to, const void* from, size_t bytes);
void fill(void* to, int byte, size_t bytes);
void mark_written(const void* p, size_t bytes);

}  // namespace dllm::emu
