// The state of a launch: a block's threads, what each waits for, and who runs next.
//
// A thread gets a fiber when it first runs, and the fiber goes on with the next thread when it returns: a kernel without
// barriers never switches stacks. A thread that has to wait switches straight to the next one that can run.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda_emulator/emulator.h"
#include "cuda_emulator/fiber.h"
#include "cuda_emulator/memory.h"

namespace dllm::emu {

inline constexpr unsigned kMaxThreads = 1024;

// One warp operation under way: what the lanes of its mask posted.
struct Exchange {
  unsigned mask, posted, unread;  // unread: lanes that have yet to call exchange_done()
  WarpOp op;
  const char* file;
  int line;
  unsigned char slots[32 * 64];
};

struct Lane {  // a CUDA thread of the block that runs
  enum class State : uint8_t { Fresh, Ready, AtBarrier, InExchange, Returned };

  Thread thread;
  State state = State::Fresh;
  Fiber* fiber = nullptr;  // since its first run
  Exchange* exchange = nullptr;  // it is in, or has yet to leave
  const char* file = "";  // of the operation it waits in
  int line = 0;
  AsyncCopies copies;
};

class Machine {
 public:
  static Machine& get();

  void run(const char* name, dim3 grid, dim3 block, LaunchShared launch_shared, const std::function<void()>& body);

  int barrier(bool predicate, const char* file, int line);  // how many said yes
  Exchange& exchange(unsigned mask, const void* in, size_t n, WarpOp op, const char* file, int line);
  void leave_exchange();
  unsigned live_lanes() { return warps_[lane().thread.warp].live; }

  Lane& lane() { return lanes_[current->linear]; }
  const char* kernel() const { return name_; }
  bool running() const { return body_ != nullptr; }
  SharedMemory shared;

 private:
  struct Warp {
    unsigned live;
    std::vector<Exchange*> open;  // each with another mask
  };
  struct Barrier {
    unsigned arrived = 0, yes = 0;
    int result = 0;
    const char* file = "";
    int line = 0;
  };
  // Threads that can run: a ring that is also used as a stack.
  struct Ready {
    uint16_t ring[kMaxThreads];
    unsigned head = 0, count = 0;
    uint16_t& at(unsigned i) { return ring[(head + i) % kMaxThreads]; }
    void push(unsigned lane) { at(count++) = uint16_t(lane); }
  };

  static void fiber_main();
  void run_threads();  // a fiber's life
  bool begin_block();  // the next one; false: there is none
  Lane* next();  // who runs; null: the block is done
  void wait();  // until the calling thread is ready again
  Fiber& fiber_of(Lane& lane);
  void switch_from(Fiber& from, Fiber& to);
  void make_ready(Lane& lane);
  void returned(Lane& lane);
  void release_barrier();
  void complete(Warp& warp, Exchange& exchange, unsigned first_lane);
  [[noreturn]] void deadlock();
  void recover();
  uint64_t random();

  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  Barrier barrier_;
  Ready ready_;
  std::vector<std::unique_ptr<Exchange>> exchanges_;
  std::vector<Exchange*> free_exchanges_;

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;  // at the top of run_threads()
  Fiber caller_;  // of run()
  Fiber* fiber_ = nullptr;  // that runs
  std::exception_ptr failure_;

  const char* name_ = "";
  const std::function<void()>* body_ = nullptr;
  dim3 grid_;
  unsigned n_ = 0, alive_ = 0;  // threads of the block; those that have not returned
  uint64_t blocks_ = 0, next_block_ = 0, stride_ = 1;  // of the grid; begun so far; order of the random schedule
  uint64_t random_ = 1;
};

// Checks what a launch asks for; throws EmulatorError.
void check_launch(const char* name, dim3 grid, dim3 block, LaunchShared launch_shared);

}  // namespace dllm::emu
