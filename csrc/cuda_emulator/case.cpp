#include "cuda_emulator/case.h"

#include <cstdio>
#include <cstring>
#include <new>

namespace dllm::emu {

std::vector<CaseEntry>& registered_cases() {
  static std::vector<CaseEntry> all;
  return all;
}

Registered::Registered(const char* name, void (*run)(Case&)) { registered_cases().push_back({name, run}); }

Case::~Case() {
  for (void* p : memory_) arena().give(p);
}

double Case::uniform() {  // splitmix64
  uint64_t z = random_ += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return double((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

void* Case::take(size_t bytes) {
  void* p = arena().take(bytes);
  if (!p) throw std::bad_alloc();
  memory_.push_back(p);
  return p;
}

void Case::copy_in(void* to, const void* from, size_t bytes) {
  const char* begin = static_cast<const char*>(from);
  queue_.push("copy in", Kind::CopyIn,
              [to, data = std::vector<char>(begin, begin + bytes)] { copy(to, data.data(), data.size()); });
}

void Case::copy_out(void* to, const void* from, size_t bytes) {
  queue_.push("copy out", Kind::CopyOut, [=] { copy(to, from, bytes); });
  queue_.synchronize();
}

void Case::hash(const void* p, size_t bytes) {  // FNV-1a
  for (size_t i = 0; i < bytes; ++i) hash_ = (hash_ ^ static_cast<const unsigned char*>(p)[i]) * 0x100000001b3ull;
}

void Case::expect(bool ok, const std::string& what) {
  if (!ok) failures_.push_back("numbers: " + what);
}

void Case::expect_close(double value, double expected, double tolerance, const std::string& what) {
  if (std::abs(value - expected) <= tolerance || value == expected) return;  // NaN is not close
  char text[160];
  std::snprintf(text, sizeof text, ": %.9g, expected %.9g within %.3g", value, expected, tolerance);
  failures_.push_back("numbers: " + what + text);
}

void Case::expect_report(const std::string& words) {
  queue_.synchronize();
  if constexpr (kRaces) {
    bool found = false;
    std::string all;
    for (const std::string& report : races::take_reports()) {
      found |= report.find(words) != report.npos;
      all += "\n  " + report;
    }
    if (!found) failures_.push_back("race: a report with \"" + words + "\" was expected; there were:" + all);
  }
}

void Case::budget(const std::string& what, double ratio) {
  if (what != "sectors" && what != "banks")
    stop("a budget for \"%s\": there are \"sectors\" and \"banks\"", what.c_str());
  budgets_.push_back({what, ratio});
}

void Case::finish() {
  queue_.synchronize();
  if constexpr (kRaces)
    for (const std::string& report : races::take_reports()) failures_.push_back("race: " + report);
}

std::vector<std::string> Case::over_budget(const std::vector<races::Site>& sites) const {
  constexpr uint64_t kFewest = 32;  // requests of a site that counts
  constexpr double kShare = 0.05;   // of all units, likewise: the tails of rows may be slow
  std::vector<std::string> over;
  for (const Budget& b : budgets_) {
    const bool shared = b.what == "banks";
    uint64_t units = 0;
    for (const races::Site& s : sites)
      if (s.shared == shared) units += s.units;
    for (const races::Site& s : sites) {
      if (s.shared != shared || s.requests < kFewest || double(s.units) < kShare * double(units)) continue;
      if (s.ratio() <= b.ratio) continue;
      char text[512];
      std::snprintf(text, sizeof text, "accesses: %s: %s of %u bytes: %.2f times the least %s, the budget is %.2f",
                    s.where.c_str(), s.store ? "stores" : "loads", s.bytes, s.ratio(), b.what.c_str(), b.ratio);
      over.push_back(text);
    }
  }
  return over;
}

}  // namespace dllm::emu
