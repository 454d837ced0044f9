#include "cuda_emulator/stream.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>

#include "cuda_emulator/machine.h"
#include "cuda_emulator/races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, bytes) (void(p), void(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(p, bytes) (void(p), void(bytes))
#endif

namespace dllm::emu {

const char* name_of(Kind kind) {
  constexpr const char* kNames[kKinds] = {"kernel", "copy in", "copy out", "copy within", "fill", "gemm"};
  return kNames[size_t(kind)];
}

// --- Queue ------------------------------------------------------------------------------------------------------------

void Queue::push(std::string name, Kind kind, std::function<void()> work) {
  Work w{std::move(name), kind, std::move(work)};
  if (capture_)
    capture_->push_back(std::move(w));
  else
    submit(std::make_shared<const std::vector<Work>>(1, std::move(w)));
}

void Queue::replay(const Graph& graph) {
  if (capture_) stop("a graph is replayed into a stream that is being captured");
  ++counters_.graph_launches;
  submit(graph);
}

void Queue::submit(Graph work) {
  for (const Work& w : *work) ++counters_.work[size_t(w.kind)];
  pending_.push_back(std::move(work));
  ++submitted_;
  if (mode_ == Mode::Eager) run_next();
}

void Queue::run_next() {
  const Graph work = std::move(pending_.front());
  pending_.pop_front();
  ++completed_;
  const Arena::Access access;
  try {
    for (const Work& w : *work) {
      if (trace) executed_.push_back({w.name, w.kind});
      w.run();
    }
  } catch (...) {
    pending_.clear();
    completed_ = submitted_;
    throw;
  }
}

void Queue::run_until(uint64_t ticket) {
  ++counters_.waits;
  finish(ticket);
}

void Queue::finish(uint64_t ticket) {
  if (capture_) stop("a wait for a stream that is being captured");
  if (completed_ >= ticket) return;
  const Arena::Access access;  // once for all
  while (completed_ < ticket && !pending_.empty()) run_next();
}

void Queue::synchronize() {
  ++counters_.synchronisations;
  finish(submitted_);
}

void Queue::begin_capture() {
  if (capture_) stop("a stream that is being captured begins another capture");
  capture_ = std::make_shared<std::vector<Work>>();
}

Graph Queue::end_capture() {
  if (!capture_) stop("the end of a capture that was not begun");
  return std::exchange(capture_, nullptr);
}

void Queue::reset_counters() {
  counters_ = {};
  executed_.clear();
}

void submit_kernel(void* stream, const char* name, dim3 grid, dim3 block, LaunchShared shared,
                   std::function<void()> body) {
  check_launch(name, grid, block, shared);
  if (!stream) {
    const Arena::Access access;
    return run(name, grid, block, shared, body);
  }
  static_cast<Queue*>(stream)->push(name, Kind::Kernel,
                                    [=, body = std::move(body)] { run(name, grid, block, shared, body); });
}

// --- Device memory ----------------------------------------------------------------------------------------------------

namespace {

constexpr size_t kPage = 4096, kAlign = 256, kReserve = size_t(1) << 38;

char* map(void* at, size_t bytes, int flags, int file, size_t offset) {
  void* p = mmap(at, bytes, PROT_NONE, flags | MAP_NORESERVE, file, off_t(offset));
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

}  // namespace

Arena& arena() {
  static Arena* a = new Arena;  // lives until the end: buffers with static storage give their memory back late
  return *a;
}

void Arena::reserve() {
  guard_ = memfd_create("guard", MFD_CLOEXEC);
  if (guard_ < 0) throw std::bad_alloc();
  base_ = next_ = map(nullptr, kReserve, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  end_ = base_ + kReserve;
}

// A range of addresses: fresh as long as there are any, so that pointers to freed memory go on to fault.
char* Arena::place(size_t span) {
  if (size_t(end_ - next_) >= span) return std::exchange(next_, next_ + span);
  auto& slots = free_[span];
  if (slots.empty()) throw std::bad_alloc();
  char* slot = slots.front();
  slots.pop_front();
  return map(slot, span, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

void* Arena::take(size_t bytes) {
  if (bytes > capacity || used_ > capacity - bytes) return nullptr;
  if (!base_) reserve();
  const size_t body = (bytes + kPage - 1) / kPage * kPage, span = body + kPage;
  char* slot = place(span);
  map(slot + body, kPage, MAP_SHARED | MAP_FIXED, guard_, size_t(slot + body - base_));
  char* p = slot + (body - bytes) / kAlign * kAlign;
  if (body) {
    mprotect(slot, body, PROT_READ | PROT_WRITE);
    ASAN_UNPOISON_MEMORY_REGION(slot, span);
    std::memset(p, 0xFF, bytes);
    if (!open_) mprotect(slot, body, PROT_NONE);
  }
  ASAN_POISON_MEMORY_REGION(slot, size_t(p - slot));
  ASAN_POISON_MEMORY_REGION(p + bytes, size_t(slot + span - (p + bytes)));
  live_[p] = {bytes, span, slot};
  used_ += bytes;
  peak_ = std::max(peak_, used_);
  if constexpr (kRaces) races::add_device(p, bytes);
  return p;
}

void Arena::give(void* p) {
  if (!p) return;
  const auto at = live_.find(static_cast<char*>(p));
  if (at == live_.end()) stop("free of %p, which is no allocated device memory", p);
  const Allocation a = at->second;
  if constexpr (kRaces) races::drop_device(p);
  map(a.slot, a.span, MAP_SHARED | MAP_FIXED, guard_, size_t(a.slot - base_));
  free_[a.span].push_back(a.slot);
  used_ -= a.bytes;
  live_.erase(at);
}

bool Arena::holds(const void* p, size_t bytes) const {
  auto at = live_.upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (at == live_.begin()) return false;
  --at;
  return size_t(static_cast<const char*>(p) - at->first) + bytes <= at->second.bytes;
}

// One call for all that was ever used: guard pages fault under any protection.
void Arena::protect(bool open) {
  if (next_ > base_) mprotect(base_, size_t(next_ - base_), open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

Arena::Access::Access() {
  if (arena().open_++ == 0) arena().protect(true);
}
Arena::Access::~Access() {
  if (--arena().open_ == 0) arena().protect(false);
}

void copy(void* to, const void* from, size_t bytes) {
  if (bytes) std::memcpy(to, from, bytes);
  mark_written(to, bytes);
}
void fill(void* to, int byte, size_t bytes) {
  if (bytes) std::memset(to, byte, bytes);
  mark_written(to, bytes);
}
void mark_written(const void* p, size_t bytes) {
  if constexpr (kRaces)
    if (bytes) races::written(p, bytes);
}

}  // namespace dllm::emu
