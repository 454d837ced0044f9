#include "cuda_emulator/memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "cuda_emulator/machine.h"
#include "cuda_emulator/races.h"

namespace dllm::emu {
namespace {

Machine& machine() { return Machine::get(); }

bool misaligned(const void* p, size_t align) { return reinterpret_cast<uintptr_t>(p) % align != 0; }

void land(const AsyncCopies::Copy& c) {
  if constexpr (kRaces) {
    races::access(c.from, c.source_bytes, false, c.pc);
    races::access(c.to, c.bytes, true, c.pc);
  }
  if (c.source_bytes) std::memcpy(c.to, c.from, c.source_bytes);
  std::memset(c.to + c.source_bytes, 0, c.bytes - c.source_bytes);
}

}  // namespace

// --- Shared memory ----------------------------------------------------------------------------------------------------

size_t shared_limit(const LaunchShared& launch) { return launch.more ? config().shared_limit : 48 * 1024; }

void SharedMemory::begin_launch(const LaunchShared& launch) {
  end_launch();
  dynamic_bytes_ = launch.dynamic;
  limit_ = shared_limit(launch);
}

void SharedMemory::end_launch() {
  for (const Array& a : arrays_) std::free(a.p);
  arrays_.clear();
  static_bytes_ = dynamic_bytes_ = 0;
  if constexpr (kRaces) races::drop_shared();
}

void SharedMemory::add(const void* key, size_t bytes, size_t align) {
  void* p = nullptr;
  if (posix_memalign(&p, align, bytes) != 0) throw std::bad_alloc();
  arrays_.push_back({key, static_cast<char*>(p), bytes, block_ - 1});
  if constexpr (kRaces) races::add_shared(p, bytes);
}

void* SharedMemory::use(Array& a) {
  if (a.block != block_) {
    std::memset(a.p, 0xFF, a.bytes);
    a.block = block_;
  }
  return a.p;
}

void* SharedMemory::dynamic() {
  if (dynamic_bytes_ == 0) stop("dynamic shared memory, but the kernel was launched with 0 bytes of it");
  for (Array& a : arrays_)
    if (!a.key) return use(a);
  add(nullptr, dynamic_bytes_, 128);
  return use(arrays_.back());
}

void* SharedMemory::named(const void* key, size_t bytes, size_t align) {
  for (Array& a : arrays_)
    if (a.key == key) return use(a);
  static_bytes_ += bytes;
  if (static_bytes_ > 48 * 1024) stop("%zu bytes of static shared memory, the limit is 48 KiB", static_bytes_);
  if (static_bytes_ + dynamic_bytes_ > limit_)
    stop("%zu bytes of shared memory, the limit is %zu", static_bytes_ + dynamic_bytes_, limit_);
  add(key, bytes, align < sizeof(void*) ? sizeof(void*) : align);
  return use(arrays_.back());
}

bool SharedMemory::holds(const void* p, size_t bytes) const {
  for (const Array& a : arrays_)
    if (p >= a.p && static_cast<const char*>(p) + bytes <= a.p + a.bytes) return true;
  return false;
}

void* dynamic_shared() { return machine().shared.dynamic(); }
void* static_shared(const void* key, size_t bytes, size_t align) { return machine().shared.named(key, bytes, align); }

// --- cp.async ---------------------------------------------------------------------------------------------------------

void AsyncCopies::wait(size_t groups_left) {
  while (group_ends_.size() - waited_ > groups_left) {
    for (const size_t end = group_ends_[waited_++]; next_ < end; ++next_)
      if (!copies_[next_].landed) land(copies_[next_]);
  }
  if (empty() && waited_ == group_ends_.size()) clear();
}

void AsyncCopies::clear() {
  copies_.clear();
  group_ends_.clear();
  next_ = waited_ = 0;
}

void copy_async(void* to, const void* from, size_t bytes, size_t source_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) stop("cp.async of %zu bytes", bytes);
  if (misaligned(to, bytes)) stop("cp.async: destination is not aligned to %zu", bytes);
  if (source_bytes && misaligned(from, bytes)) stop("cp.async: source is not aligned to %zu", bytes);
  if (!machine().shared.holds(to, bytes)) stop("cp.async: destination is not in shared memory");
  const AsyncCopies::Copy c{
      static_cast<char*>(to), static_cast<const char*>(from),          uint32_t(bytes),
      uint32_t(source_bytes), config().copy_async == CopyAsync::Early, __builtin_return_address(0)};
  if (c.landed) {
    land(c);
  } else {  // garbage until the wait
    if constexpr (kRaces) races::overwritten(to, bytes, c.pc);
    std::memset(to, 0xFF, bytes);
  }
  machine().lane().copies.add(c);
}
void copy_async_commit() { machine().lane().copies.commit(); }
void copy_async_wait(int groups_left) { machine().lane().copies.wait(size_t(groups_left)); }

// --- Vector access, ldmatrix ------------------------------------------------------------------------------------------

namespace {

template <class V>
V load(const void* p, const void* pc) {
  if (misaligned(p, sizeof(V))) stop("load of %zu bytes at %p, which is not aligned to it", sizeof(V), p);
  if constexpr (kRaces) races::access(p, sizeof(V), false, pc);
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
void store(void* p, const V& v, const void* pc) {
  if (misaligned(p, sizeof(V))) stop("store of %zu bytes at %p, which is not aligned to it", sizeof(V), p);
  if constexpr (kRaces) races::access(p, sizeof(V), true, pc);
  std::memcpy(p, &v, sizeof v);
}

}  // namespace

uint2 load64(const void* p) { return load<uint2>(p, __builtin_return_address(0)); }
uint4 load128(const void* p) { return load<uint4>(p, __builtin_return_address(0)); }
void store64(void* p, uint2 x) { store(p, x, __builtin_return_address(0)); }
void store128(void* p, uint4 x) { store(p, x, __builtin_return_address(0)); }

// Each lane posts the row that it names.
void load_matrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  if (misaligned(row, 16)) stop("ldmatrix: row %p is not aligned to 16", row);
  if (!machine().shared.holds(row, 16)) stop("ldmatrix: row is not in shared memory");
  if constexpr (kRaces) races::access(row, 16, false, __builtin_return_address(0));
  unsigned posted;
  const unsigned char* slots =
      exchange(0xffffffffu, row, 16, transposed ? WarpOp::LoadMatrixTransposed : WarpOp::LoadMatrix, __FILE__, __LINE__,
               &posted);
  const auto element = [&](int matrix, int i, int j) {
    uint16_t x;
    std::memcpy(&x, slots + 64 * (8 * matrix + i) + 2 * j, 2);
    return uint32_t(x);
  };
  const int g = int(current->lane) >> 2, t = int(current->lane) & 3;
  for (int m = 0; m < 4; ++m)
    r[m] = transposed ? element(m, 2 * t, g) | element(m, 2 * t + 1, g) << 16
                      : element(m, g, 2 * t) | element(m, g, 2 * t + 1) << 16;
  exchange_done();
}

}  // namespace dllm::emu
