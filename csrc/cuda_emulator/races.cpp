#include "cuda_emulator/races.h"

#if defined(DLLM_EMU_RACES)

#include <link.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <tuple>

#include "cuda_emulator/access_counts.h"
#include "cuda_emulator/emulator.h"
#include "cuda_emulator/fiber.h"
#include "cuda_emulator/places.h"

namespace dllm::emu::races {
namespace {

// Time. The epoch grows at each launch, block and __syncthreads: two accesses of one epoch have no block barrier between.
// A warp's own epoch grows at each of its __syncwarp.
uint32_t epoch = 1, launch_begin = 1, block_begin = 1, warp_clock = 1;
std::array<uint32_t, 32> warp_epoch;
const char* kernel = "";

struct Access {
  uint32_t place = 0, epoch = 0, warp_epoch = 0;
  uint16_t thread = 0;
  uint8_t bytes = 0;  // of the cell
};

// The last accesses of one kind to a cell: two of the present block, by different threads or times, and one of an earlier
// block. What a third thread would have to clash with is among them.
struct History {
  Access last, before, other_block;

  void add(const Access& a) {
    if (last.epoch < block_begin) {
      if (last.epoch >= launch_begin) other_block = last;
      before = {};
      last = a;
    } else if (last.thread == a.thread && last.epoch == a.epoch && last.warp_epoch == a.warp_epoch) {
      last.bytes |= a.bytes;
      last.place = a.place;
    } else {
      before = last;
      last = a;
    }
  }
};

struct Cell {  // four bytes
  History writes, reads;
};

struct Memory {
  char* p;
  size_t bytes;
  bool shared;
  std::unique_ptr<Cell[], decltype(&std::free)> cells;
  std::vector<uint8_t> valid;  // by cell: the bytes that were written
  size_t n_cells() const { return valid.size(); }
};

Memory make_memory(const void* p, size_t bytes, bool shared) {
  const size_t n = (bytes + 3) / 4;
  // calloc: pages of it that are not touched cost nothing.
  return {static_cast<char*>(const_cast<void*>(p)),
          bytes,
          shared,
          {static_cast<Cell*>(std::calloc(n + 1, sizeof(Cell))), &std::free},
          std::vector<uint8_t>(n)};
}

std::vector<Memory> shared;
std::map<const char*, Memory> device;
Memory* last_device = nullptr;

bool in(const Memory& m, const void* p) { return p >= m.p && p < m.p + m.bytes; }

Memory* find(const void* p) {
  for (Memory& m : shared)
    if (in(m, p)) return &m;
  if (last_device && in(*last_device, p)) return last_device;
  auto at = device.upper_bound(static_cast<const char*>(p));
  if (at == device.begin()) return nullptr;
  --at;
  if (!in(at->second, p)) return nullptr;
  return last_device = &at->second;
}

// f(cell index, mask of its bytes) for [p, p + bytes) of m.
template <class F>
void for_cells(const Memory& m, const void* p, size_t bytes, F&& f) {
  const size_t begin = size_t(static_cast<const char*>(p) - m.p), end = std::min(begin + bytes, m.bytes);
  for (size_t i = begin; i < end;) {
    const size_t cell = i / 4, stop = std::min(end, cell * 4 + 4);
    f(cell, uint8_t((1u << (stop - cell * 4)) - (1u << (i - cell * 4))));
    i = stop;
  }
}

// --- Reports ----------------------------------------------------------------------------------------------------------

struct Report {
  std::string what, where;  // before and behind the places
  uint32_t place, other;
};
std::vector<Report> reports;
std::set<std::tuple<char, uint32_t, uint32_t>> reported;

bool first_time(char what, uint32_t place, uint32_t other) { return reported.insert({what, place, other}).second; }

std::string offset_in(const Memory& m, size_t cell) {
  return (m.shared ? "shared memory + " : "device memory + ") + std::to_string(cell * 4);
}
std::string here() {
  const uint3 b = current->block;
  return std::string(" [kernel ") + kernel + ", block (" + std::to_string(b.x) + "," + std::to_string(b.y) + "," +
         std::to_string(b.z) + "), thread " + std::to_string(current->linear) + "]";
}

void check(const Memory& m, size_t cell, const Access& a, bool write, const Access& old, bool old_write) {
  if (!(old.bytes & a.bytes) || old.epoch < launch_begin) return;
  const bool blocks = old.epoch < block_begin;
  if (blocks) {
    if (m.shared) return;
  } else if (old.epoch != a.epoch || old.thread == a.thread ||
             (old.thread / 32 == a.thread / 32 && old.warp_epoch != a.warp_epoch)) {
    return;
  }
  if (!first_time(blocks ? 'b' : 't', a.place, old.place)) return;
  const char* kinds = write ? old_write ? "write and write" : "write after read" : "read after write";
  reports.push_back(
      {std::string(kinds) + (blocks ? " by two blocks of " : " with no barrier between, of ") + offset_in(m, cell),
       ", the other thread: " + std::to_string(old.thread) + here(), a.place, old.place});
}

void record(Memory& m, const void* p, size_t bytes, bool write, uint32_t place) {
  Access a{place, epoch, warp_epoch[current->warp], uint16_t(current->linear), 0};
  for_cells(m, p, bytes, [&](size_t i, uint8_t mask) {
    a.bytes = mask;
    Cell& c = m.cells[i];
    for (const Access* old : {&c.writes.last, &c.writes.before, &c.writes.other_block})
      check(m, i, a, write, *old, true);
    if (write) {
      for (const Access* old : {&c.reads.last, &c.reads.before, &c.reads.other_block})
        check(m, i, a, true, *old, false);
      c.writes.add(a);
      m.valid[i] |= mask;
    } else {
      if (mask & ~m.valid[i] && first_time('u', place, 0))
        reports.push_back({"read of uninitialised " + offset_in(m, i), here(), place, 0});
      c.reads.add(a);
    }
  });
}

// --- What else a kernel may touch -------------------------------------------------------------------------------------

struct Range {
  const char* begin = nullptr;
  size_t bytes = 0;
  bool holds(const void* p) const { return p >= begin && p < begin + bytes; }
};
Range body, arguments;

const std::vector<Range>& program() {  // code and static data
  static const std::vector<Range> ranges = [] {
    std::vector<Range> r;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& h = info->dlpi_phdr[i];
            if (h.p_type == PT_LOAD)
              static_cast<std::vector<Range>*>(out)->push_back(
                  {reinterpret_cast<const char*>(info->dlpi_addr + h.p_vaddr), h.p_memsz});
          }
          return 0;
        },
        &r);
    return r;
  }();
  return ranges;
}

void check_other(const void* p, bool write, uint32_t place) {
  if (Range{reinterpret_cast<const char*>(current), sizeof *current}.holds(p) || p == &current) return;
  if (body.holds(p) || arguments.holds(p)) return;
  if (!write)
    for (const Range& r : program())
      if (r.holds(p)) return;
  if (first_time('h', place, 0))
    reports.push_back({write ? "write to host memory" : "read of host memory", here(), place, 0});
}

}  // namespace

// --- What the emulator tells ------------------------------------------------------------------------------------------

void begin_launch(const char* name, unsigned threads, const void* function, size_t function_bytes) {
  kernel = name;
  launch_begin = ++epoch;
  body = {static_cast<const char*>(function), function_bytes};
  arguments = {};
  counts::begin_launch(name, threads);
}
void end_launch() { counts::end_block(); }
void begin_block() {
  block_begin = ++epoch;
  warp_epoch.fill(++warp_clock);
  for (Memory& m : shared) std::fill(m.valid.begin(), m.valid.end(), uint8_t(0));
  counts::end_block();
}
void block_synchronised() { ++epoch; }
void warp_synchronised(unsigned warp) { warp_epoch[warp] = ++warp_clock; }
void add_shared(const void* p, size_t bytes) { shared.push_back(make_memory(p, bytes, true)); }
void drop_shared() { shared.clear(); }
void add_device(const void* p, size_t bytes) {
  device.insert_or_assign(static_cast<const char*>(p), make_memory(p, bytes, false));
}
void drop_device(const void* p) {
  last_device = nullptr;
  device.erase(static_cast<const char*>(p));
}
void parameters(const void* p, size_t bytes) { arguments = {static_cast<const char*>(p), bytes}; }

void access(const void* p, size_t bytes, bool write, const void* pc) {
  // Library templates may be linked as the watched copies of them, and then this file calls itself.
  static bool busy = false;
  if (!current || bytes == 0 || busy || Fiber::on_a_stack(p)) return;
  busy = true;
  const uint32_t place = place_of(pc);
  Memory* m = find(p);
  if (m) {
    record(*m, p, bytes, write, place);
    counts::add(p, bytes, write, m->shared, place);
  } else {
    check_other(p, write, place);
  }
  busy = false;
}

void overwritten(const void* p, size_t bytes, const void* pc) {
  Memory* m = find(p);
  if (!m) return;
  record(*m, p, bytes, true, place_of(pc));
  for_cells(*m, p, bytes, [&](size_t i, uint8_t mask) { m->valid[i] &= uint8_t(~mask); });
}

void written(const void* p, size_t bytes) {
  Memory* m = find(p);
  if (m) for_cells(*m, p, bytes, [&](size_t i, uint8_t mask) { m->valid[i] |= mask; });
}

std::vector<std::string> take_reports() {
  std::vector<const void*> pcs;
  for (const Report& r : reports) {
    pcs.push_back(pc_of(r.place));
    pcs.push_back(pc_of(r.other));
  }
  const std::vector<std::string> lines = source_lines(pcs);
  std::vector<std::string> texts;
  for (size_t i = 0; i < reports.size(); ++i) {
    const Report& r = reports[i];
    std::string text = r.what + ": " + lines[2 * i];
    if (r.other) text += " and " + lines[2 * i + 1];
    text += r.where;
    texts.push_back(text);
  }
  reports.clear();
  reported.clear();
  return texts;
}

}  // namespace dllm::emu::races

// --- What the compiler calls ------------------------------------------------------------------------------------------

#define DLLM_PC __builtin_return_address(0)
#define DLLM_WATCH(kind, bytes)                                                                    \
  void __tsan_##kind##read##bytes(void* p) { dllm::emu::races::access(p, bytes, false, DLLM_PC); } \
  void __tsan_##kind##write##bytes(void* p) { dllm::emu::races::access(p, bytes, true, DLLM_PC); }
#define DLLM_WATCH_ALL(kind) \
  DLLM_WATCH(kind, 1)        \
  DLLM_WATCH(kind, 2)        \
  DLLM_WATCH(kind, 4)        \
  DLLM_WATCH(kind, 8)        \
  DLLM_WATCH(kind, 16)
// Atomics of host code in instrumented files, such as shared_ptr's counts. Those of kernels are atomic_update().
#define DLLM_ATOMIC(bits)                                                                                              \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) { return __atomic_load_n(p, 5); }   \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t x, int) { __atomic_store_n(p, x, 5); }   \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t x, int) {                   \
    return __atomic_exchange_n(p, x, 5);                                                                               \
  }                                                                                                                    \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t x, int) {                  \
    return __atomic_fetch_add(p, x, 5);                                                                                \
  }                                                                                                                    \
  uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* p, uint##bits##_t x, int) {                  \
    return __atomic_fetch_sub(p, x, 5);                                                                                \
  }                                                                                                                    \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* p, uint##bits##_t* old, uint##bits##_t x, \
                                                    int, int) {                                                        \
    return __atomic_compare_exchange_n(p, old, x, false, 5, 5);                                                        \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_read_range(void* p, size_t n) { dllm::emu::races::access(p, n, false, DLLM_PC); }
void __tsan_write_range(void* p, size_t n) { dllm::emu::races::access(p, n, true, DLLM_PC); }
DLLM_WATCH_ALL()
DLLM_WATCH_ALL(unaligned_)
DLLM_WATCH_ALL(volatile_)
DLLM_ATOMIC(8)
DLLM_ATOMIC(32)
DLLM_ATOMIC(64)
}

#endif
