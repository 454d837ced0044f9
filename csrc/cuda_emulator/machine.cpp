#include "cuda_emulator/machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <utility>

#include "cuda_emulator/races.h"

namespace dllm::emu {

thread_local Thread* current = nullptr;

Config& config() {
  static Config c;
  return c;
}

Machine& Machine::get() {
  static Machine m;
  return m;
}

void stop(const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  const int n = std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (current && n >= 0 && size_t(n) < sizeof text)
    std::snprintf(text + n, sizeof text - size_t(n), " [kernel %s, block (%u,%u,%u), thread (%u,%u,%u)]",
                  Machine::get().kernel(), current->block.x, current->block.y, current->block.z, current->thread.x,
                  current->thread.y, current->thread.z);
  current = nullptr;  // what follows is not the kernel's
  throw EmulatorError(text);
}

void check_launch(const char* name, dim3 grid, dim3 block, LaunchShared launch_shared) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    stop("kernel %s: a block of (%u,%u,%u) threads", name, block.x, block.y, block.z);
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff)
    stop("kernel %s: a grid of (%u,%u,%u) blocks", name, grid.x, grid.y, grid.z);
  const size_t limit = shared_limit(launch_shared);
  if (launch_shared.dynamic > limit)
    stop("kernel %s: %zu bytes of dynamic shared memory, the limit is %zu", name, launch_shared.dynamic, limit);
}

// --- Launch -----------------------------------------------------------------------------------------------------------

void Machine::run(const char* name, dim3 grid, dim3 block, LaunchShared launch_shared,
                  const std::function<void()>& body) {
  if (running()) stop("launch of kernel %s from inside a kernel", name);
  check_launch(name, grid, block, launch_shared);
  name_ = name;
  body_ = &body;
  grid_ = grid;
  n_ = block.x * block.y * block.z;
  if (lanes_.size() < n_) lanes_.resize(n_);
  warps_.resize((n_ + 31) / 32);
  for (unsigned i = 0; i < n_; ++i)
    lanes_[i].thread = {
        {i % block.x, i / block.x % block.y, i / (block.x * block.y)}, {}, block, grid, i % 32, i / 32, i};
  random_ = config().seed * 0x9E3779B97F4A7C15ull + 1;
  blocks_ = uint64_t(grid.x) * grid.y * grid.z;
  next_block_ = 0;
  // A stride without common divisor with the number of blocks visits each once.
  stride_ = random() % blocks_ + 1;
  while (std::gcd(stride_, blocks_) != 1) ++stride_;
  shared.begin_launch(launch_shared);
  if constexpr (kRaces) races::begin_launch(name, n_, &body, sizeof body);

  begin_block();
  Lane& first = *next();
  current = &first.thread;
  switch_from(caller_, fiber_of(first));
  current = nullptr;

  if constexpr (kRaces) races::end_launch();
  shared.end_launch();
  body_ = nullptr;
  if (failure_) {
    recover();
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }
}

// After an error: threads that still waited are dropped.
void Machine::recover() {
  idle_.clear();
  for (const auto& f : fibers_) {
    f->restart();
    idle_.push_back(f.get());
  }
  for (Lane& l : lanes_) l.copies.clear();
  free_exchanges_.clear();
  for (const auto& e : exchanges_) free_exchanges_.push_back(e.get());
}

bool Machine::begin_block() {
  if (next_block_ == blocks_) return false;
  uint64_t k = next_block_++;
  if (config().order == Order::Lifo) k = blocks_ - 1 - k;
  if (config().order == Order::Random) k = k * stride_ % blocks_;
  const uint3 block{unsigned(k % grid_.x), unsigned(k / grid_.x % grid_.y), unsigned(k / grid_.x / grid_.y)};
  for (unsigned i = 0; i < n_; ++i) {
    lanes_[i].thread.block = block;
    lanes_[i].state = Lane::State::Fresh;
    lanes_[i].fiber = nullptr;
    ready_.ring[i] = uint16_t(i);
  }
  ready_.head = 0;
  ready_.count = alive_ = n_;
  for (size_t w = 0; w < warps_.size(); ++w) {
    const size_t lanes = n_ - 32 * w;
    warps_[w].live = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
    warps_[w].open.clear();
  }
  barrier_ = {};
  shared.begin_block();
  if constexpr (kRaces) races::begin_block();
  return true;
}

// --- Threads ----------------------------------------------------------------------------------------------------------

uint64_t Machine::random() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_;
}

void Machine::make_ready(Lane& l) {
  l.state = Lane::State::Ready;
  ready_.push(l.thread.linear);
}

Lane* Machine::next() {
  if (ready_.count == 0) {
    if (alive_) deadlock();
    return nullptr;
  }
  if (config().order == Order::Fifo) {
    const unsigned i = ready_.at(0);
    ready_.head = (ready_.head + 1) % kMaxThreads;
    --ready_.count;
    return &lanes_[i];
  }
  uint16_t& last = ready_.at(ready_.count - 1);
  if (config().order == Order::Random) std::swap(ready_.at(unsigned(random() % ready_.count)), last);
  --ready_.count;
  return &lanes_[last];
}

void Machine::fiber_main() { get().run_threads(); }

// Runs `current`, and thread after thread from then on.
void Machine::run_threads() {
  Fiber& own = *fiber_;
  for (;;) {
    Lane* next_lane = nullptr;
    try {
      lane().fiber = &own;
      (*body_)();
      returned(lane());
      next_lane = next();
      if (!next_lane && begin_block()) next_lane = next();
    } catch (...) {
      failure_ = std::current_exception();
      next_lane = nullptr;
    }
    if (next_lane && !next_lane->fiber) {
      current = &next_lane->thread;
      continue;
    }
    idle_.push_back(&own);
    if (next_lane) current = &next_lane->thread;
    switch_from(own, next_lane ? *next_lane->fiber : caller_);
  }
}

Fiber& Machine::fiber_of(Lane& l) {
  if (l.fiber) return *l.fiber;
  if (idle_.empty()) {
    fibers_.push_back(std::make_unique<Fiber>(&Machine::fiber_main));
    return *fibers_.back();
  }
  Fiber* f = idle_.back();
  idle_.pop_back();
  return *f;
}

void Machine::switch_from(Fiber& from, Fiber& to) {
  fiber_ = &to;
  Fiber::switch_to(from, to);
}

void Machine::wait() {
  Fiber& own = *fiber_;
  Lane* l = next();
  if (&l->thread == current) return;
  current = &l->thread;
  switch_from(own, fiber_of(*l));
}

void Machine::returned(Lane& l) {
  l.state = Lane::State::Returned;
  --alive_;
  if (!l.copies.empty()) stop("the thread returns while a cp.async has not been waited for");
  l.copies.clear();
  Warp& w = warps_[l.thread.warp];
  w.live &= ~(1u << l.thread.lane);
  for (size_t i = w.open.size(); i-- > 0;) complete(w, *w.open[i], l.thread.warp * 32);
  release_barrier();
}

// --- Barriers ---------------------------------------------------------------------------------------------------------

int Machine::barrier(bool predicate, const char* file, int line) {
  Lane& l = lane();
  Barrier& b = barrier_;
  if (b.arrived && (b.line != line || std::strcmp(b.file, file) != 0))
    stop("__syncthreads at %s:%d while other threads wait in the one at %s:%d", file, line, b.file, b.line);
  l.file = b.file = file;
  l.line = b.line = line;
  ++b.arrived;
  b.yes += predicate;
  l.state = Lane::State::AtBarrier;
  release_barrier();
  wait();
  return b.result;
}

void Machine::release_barrier() {
  Barrier& b = barrier_;
  if (b.arrived == 0 || b.arrived < alive_) return;
  if (alive_ < n_)
    stop("__syncthreads at %s:%d is reached by %u threads while %u threads of the block have returned", b.file, b.line,
         b.arrived, n_ - alive_);
  b.result = int(b.yes);
  b.arrived = b.yes = 0;
  if constexpr (kRaces) races::block_synchronised();
  for (unsigned i = 0; i < n_; ++i) make_ready(lanes_[i]);
}

// --- Warp operations --------------------------------------------------------------------------------------------------

Exchange& Machine::exchange(unsigned mask, const void* in, size_t n, WarpOp op, const char* file, int line) {
  Lane& l = lane();
  Warp& w = warps_[l.thread.warp];
  const unsigned bit = 1u << l.thread.lane, first = l.thread.warp * 32;
  // In a short last warp __syncwarp() names lanes that never were.
  if (op == WarpOp::Barrier && n_ - first < 32) mask &= (1u << (n_ - first)) - 1;
  if (!(mask & bit)) stop("%s:%d: mask %08x does not name the calling lane %u", file, line, mask, l.thread.lane);
  Exchange* e = nullptr;
  for (Exchange* open : w.open)
    if (open->mask == mask) e = open;
  if (!e) {
    if (free_exchanges_.empty()) {
      exchanges_.push_back(std::make_unique<Exchange>());
      free_exchanges_.push_back(exchanges_.back().get());
    }
    e = free_exchanges_.back();
    free_exchanges_.pop_back();
    e->mask = mask;
    e->posted = e->unread = 0;
    e->op = op;
    e->file = file;
    e->line = line;
    w.open.push_back(e);
  } else if (e->op != op) {
    stop("%s:%d: a warp operation other than the one that lanes wait in (%s:%d)", file, line, e->file, e->line);
  }
  std::memcpy(e->slots + 64 * l.thread.lane, in, n);
  e->posted |= bit;
  ++e->unread;
  l.exchange = e;
  l.state = Lane::State::InExchange;
  l.file = file;
  l.line = line;
  complete(w, *e, first);
  wait();
  return *e;
}

void Machine::complete(Warp& w, Exchange& e, unsigned first) {
  const unsigned need = e.mask & w.live;
  if ((e.posted & need) != need) return;
  if (need != e.mask)
    stop("%s:%d: a warp operation names lanes %08x, of which %08x do not exist or have returned", e.file, e.line,
         e.mask, e.mask & ~w.live);
  std::erase(w.open, &e);
  if constexpr (kRaces)
    if (e.op == WarpOp::Barrier) races::warp_synchronised(first / 32);
  for (unsigned lanes = e.posted; lanes; lanes &= lanes - 1) make_ready(lanes_[first + unsigned(__builtin_ctz(lanes))]);
}

void Machine::leave_exchange() {
  Lane& l = lane();
  if (--l.exchange->unread == 0) free_exchanges_.push_back(l.exchange);
  l.exchange = nullptr;
}

void Machine::deadlock() {
  current = nullptr;  // nobody runs
  struct Group {
    unsigned first, n;
  };
  std::map<std::string, Group> groups;
  for (unsigned i = 0; i < n_; ++i) {
    const Lane& l = lanes_[i];
    if (l.state == Lane::State::Returned) continue;
    char where[512];
    if (l.state == Lane::State::AtBarrier)
      std::snprintf(where, sizeof where, "in __syncthreads at %s:%d", l.file, l.line);
    else
      std::snprintf(where, sizeof where, "in a warp operation of lanes %08x at %s:%d", l.exchange->mask, l.file,
                    l.line);
    const auto [at, added] = groups.insert({where, {i, 0}});
    ++at->second.n;
  }
  const uint3 block = lanes_[0].thread.block;
  std::string text = "deadlock in kernel " + std::string(name_) + ", block (" + std::to_string(block.x) + "," +
                     std::to_string(block.y) + "," + std::to_string(block.z) + "):";
  for (const auto& [where, group] : groups)
    text += "\n  " + std::to_string(group.n) + " threads, the first of them " + std::to_string(group.first) +
            ", wait " + where;
  throw EmulatorError(text);
}

// --- emulator.h -------------------------------------------------------------------------------------------------------

void run(const char* name, dim3 grid, dim3 block, LaunchShared shared, const std::function<void()>& body) {
  Machine::get().run(name, grid, block, shared, body);
}
void block_barrier(const char* file, int line) { Machine::get().barrier(false, file, line); }
int block_vote(int predicate, const char* file, int line) { return Machine::get().barrier(predicate != 0, file, line); }
void warp_barrier(unsigned mask, const char* file, int line) {
  const char nothing = 0;
  Machine::get().exchange(mask, &nothing, 1, WarpOp::Barrier, file, line);
  Machine::get().leave_exchange();
}
unsigned active_lanes() { return Machine::get().live_lanes(); }
const unsigned char* exchange(unsigned mask, const void* in, size_t n, WarpOp op, const char* file, int line,
                              unsigned* posted) {
  Exchange& e = Machine::get().exchange(mask, in, n, op, file, line);
  *posted = e.posted;
  return e.slots;
}
void exchange_done() { Machine::get().leave_exchange(); }

}  // namespace dllm::emu
