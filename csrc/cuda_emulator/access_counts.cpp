#include "cuda_emulator/access_counts.h"

#include <algorithm>
#include <array>
#include <bit>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "cuda_emulator/emulator.h"
#include "cuda_emulator/places.h"
#include "cuda_emulator/races.h"

namespace dllm::emu::races {
namespace {

constexpr int kLanes = 32;

// What a warp's lanes do at their n-th run of one instruction.
struct Request {
  uint32_t lanes = 0;
  std::array<uintptr_t, kLanes> address;
  std::array<uint16_t, kLanes> bytes;
};

// One instruction in one warp of the block that runs.
struct Warp {
  std::array<uint64_t, kLanes> runs{};  // by lane
  uint64_t first = 0;                   // run that open[0] is
  std::deque<Request> open;
};

struct Instruction {
  uint32_t place = 0;
  bool shared = false, store = false;
  unsigned bytes = 0;
  const char* kernel = "";
  uint64_t requests = 0, units = 0, ideal = 0;
  std::map<unsigned, Warp> warps;
};

bool counting = false;
const char* kernel_name = "";
unsigned n_threads = 0;
std::vector<std::unique_ptr<Instruction>> instructions;  // two a place: loads, stores
std::vector<Instruction*> in_use;                        // by this block

struct Cost {
  uint64_t units = 0, ideal = 0;
};

Cost device_cost(const Request& r) {
  std::array<std::pair<uintptr_t, uintptr_t>, kLanes> spans;
  size_t n = 0;
  for (uint32_t left = r.lanes; left; left &= left - 1) {
    const int i = std::countr_zero(left);
    spans[n++] = {r.address[size_t(i)], r.address[size_t(i)] + r.bytes[size_t(i)]};
  }
  std::sort(spans.begin(), spans.begin() + long(n));
  Cost c;
  uintptr_t bytes = 0, end = 0, next_sector = 0;
  for (size_t i = 0; i < n; ++i) {
    const auto [from, to] = spans[i];
    if (to > end) bytes += to - std::max(from, end);
    end = std::max(end, to);
    const uintptr_t begin = std::max(from / 32, next_sector), stop = (to + 31) / 32;
    if (stop > begin) c.units += stop - begin;
    next_sector = std::max(next_sector, stop);
  }
  c.ideal = (bytes + 31) / 32;
  return c;
}

// Lanes share a pass as long as no bank has to give two words; 8 and 16 bytes take two and four passes at least.
Cost shared_cost(const Request& r, unsigned bytes) {
  const int per_pass = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
  Cost c;
  for (int begin = 0; begin < kLanes; begin += per_pass) {
    std::array<uintptr_t, 32 * 8> words;  // at most 8 lanes of 4 words, or 32 of one that lies across two
    size_t n = 0;
    for (int i = begin; i < begin + per_pass; ++i)
      if (r.lanes >> i & 1)
        for (uintptr_t w = r.address[size_t(i)] / 4; w <= (r.address[size_t(i)] + r.bytes[size_t(i)] - 1) / 4; ++w)
          if (n < words.size()) words[n++] = w;
    if (n == 0) continue;
    std::sort(words.begin(), words.begin() + long(n));
    const size_t distinct = size_t(std::unique(words.begin(), words.begin() + long(n)) - words.begin());
    std::array<int, 32> of_bank{};
    for (size_t i = 0; i < distinct; ++i) ++of_bank[words[i] % 32];
    c.units += uint64_t(*std::max_element(of_bank.begin(), of_bank.end()));
    c.ideal += 1;
  }
  return c;
}

void close(Instruction& i, const Request& r) {
  const Cost c = i.shared ? shared_cost(r, i.bytes) : device_cost(r);
  ++i.requests;
  i.units += c.units;
  i.ideal += c.ideal;
}

}  // namespace

void counts::begin_launch(const char* kernel, unsigned threads) {
  kernel_name = kernel;
  n_threads = threads;
}

void counts::end_block() {
  for (Instruction* i : in_use) {
    for (auto& [warp, w] : i->warps)
      for (const Request& r : w.open)
        if (r.lanes) close(*i, r);
    i->warps.clear();
  }
  in_use.clear();
}

void counts::add(const void* p, size_t bytes, bool write, bool shared, uint32_t place) {
  if (!counting || bytes > 16) return;
  const size_t index = 2 * size_t(place) + write;  // a cp.async does both
  if (index >= instructions.size()) instructions.resize(index + 1);
  auto& slot = instructions[index];
  if (!slot) {
    slot = std::make_unique<Instruction>();
    slot->place = place;
    slot->shared = shared;
    slot->store = write;
    slot->bytes = unsigned(bytes);
    slot->kernel = kernel_name;
  }
  Instruction& i = *slot;
  if (i.shared != shared) return;  // a generic pointer that points to both: counted as what it was first
  if (i.warps.empty()) in_use.push_back(&i);
  Warp& w = i.warps[current->warp];
  const unsigned lane = current->lane;
  const size_t k = size_t(w.runs[lane]++ - w.first);
  if (k >= w.open.size()) w.open.resize(k + 1);
  Request& r = w.open[k];
  r.lanes |= 1u << lane;
  r.address[lane] = reinterpret_cast<uintptr_t>(p);
  r.bytes[lane] = uint16_t(bytes);
  const unsigned lanes = n_threads - current->warp * kLanes;
  const uint32_t all = lanes >= kLanes ? 0xffffffffu : (1u << lanes) - 1;
  while (!w.open.empty() && w.open.front().lanes == all) {
    close(i, w.open.front());
    w.open.pop_front();
    ++w.first;
  }
}

void count_accesses(bool on) { counting = on; }

std::vector<Site> take_sites() {
  std::vector<const Instruction*> list;
  std::vector<const void*> pcs;
  for (const auto& i : instructions)
    if (i && i->requests) {
      list.push_back(i.get());
      pcs.push_back(pc_of(i->place));
    }
  const std::vector<std::string> lines = source_lines(pcs);
  std::map<std::tuple<std::string, std::string, bool, bool, unsigned>, Site> sites;  // an unrolled line is one site
  for (size_t k = 0; k < list.size(); ++k) {
    const Instruction& i = *list[k];
    Site& s = sites[{lines[k], i.kernel, i.shared, i.store, i.bytes}];
    s.where = lines[k];
    s.kernel = i.kernel;
    s.shared = i.shared;
    s.store = i.store;
    s.bytes = i.bytes;
    s.requests += i.requests;
    s.units += i.units;
    s.ideal += i.ideal;
  }
  instructions.clear();
  std::vector<Site> result;
  for (auto& [key, site] : sites) result.push_back(std::move(site));
  return result;
}

}  // namespace dllm::emu::races
