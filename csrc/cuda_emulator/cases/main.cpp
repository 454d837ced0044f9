// cuda_cases: runs the cases (case.h) whose name contains FILTER. Exit status 1 if one of them fails.
//
//   cuda_cases [FILTER] [--list] [--order fifo|lifo|random] [--seed N] [--copy late|early] [--stats]
//
// Without --order or --copy every schedule is run, and the outputs of a case must be the same bits in all of them. Race build:
// two schedules, and races, reads of uninitialised memory and budgets of accesses too; --stats prints the accesses.

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <optional>
#include <string>

#include "cuda_emulator/case.h"
#include "cuda_emulator/machine.h"

namespace dllm::emu {
namespace {

struct Options {
  std::string filter;
  bool list = false, stats = false;
  std::optional<Order> order;
  std::optional<CopyAsync> copy;
  uint64_t seed = 1;
};

struct Schedule {
  Order order;
  uint64_t seed;
  CopyAsync copy;
  std::string text() const {
    std::string s = order == Order::Fifo ? "fifo" : order == Order::Lifo ? "lifo" : "random " + std::to_string(seed);
    return s + (copy == CopyAsync::Late ? ", late" : ", early");
  }
};

[[noreturn]] void usage() {
  std::fputs("cuda_cases [FILTER] [--list] [--order fifo|lifo|random] [--seed N] [--copy late|early] [--stats]\n",
             stderr);
  std::exit(2);
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    const auto value = [&] {
      if (++i == argc) usage();
      return std::string(argv[i]);
    };
    const auto one_of = [](const std::string& v, std::initializer_list<const char*> names) {
      int k = 0;
      for (const char* name : names) {
        if (v == name) return k;
        ++k;
      }
      usage();
    };
    if (a == "--list")
      o.list = true;
    else if (a == "--stats")
      o.stats = true;
    else if (a == "--seed")
      o.seed = std::strtoull(value().c_str(), nullptr, 10);
    else if (a == "--order")
      o.order = Order(one_of(value(), {"fifo", "lifo", "random"}));
    else if (a == "--copy")
      o.copy = CopyAsync(one_of(value(), {"late", "early"}));
    else if (a[0] == '-' || !o.filter.empty())
      usage();
    else
      o.filter = a;
  }
  return o;
}

std::vector<Schedule> schedules(const Options& o) {
  if (kRaces && !o.order && !o.copy)  // what it finds depends little on the schedule
    return {{Order::Fifo, o.seed, CopyAsync::Late}, {Order::Random, o.seed, CopyAsync::Early}};
  std::vector<Schedule> all;
  for (const Order order : {Order::Fifo, Order::Lifo, Order::Random})
    for (const CopyAsync copy : {CopyAsync::Late, CopyAsync::Early})
      for (uint64_t seed = o.seed; seed <= o.seed + (order == Order::Random && !o.order); ++seed)
        if (o.order.value_or(order) == order && o.copy.value_or(copy) == copy) all.push_back({order, seed, copy});
  return all;
}

const char* running_case = "";

// Memory beyond an allocation's guard page, or device memory touched by the host.
#if !defined(__SANITIZE_ADDRESS__)
void on_fault(int, siginfo_t* info, void*) {
  char text[512];
  int n = std::snprintf(text, sizeof text, "FAILED %s: fault: access to %p", running_case, info->si_addr);
  if (current)
    n += std::snprintf(text + n, sizeof text - size_t(n), " in kernel %s, block (%u,%u,%u), thread (%u,%u,%u)",
                       Machine::get().kernel(), current->block.x, current->block.y, current->block.z, current->thread.x,
                       current->thread.y, current->thread.z);
  text[n++] = '\n';
  if (write(STDOUT_FILENO, text, size_t(n)) < 0) _exit(3);
  _exit(1);
}
void report_faults() {
  static char stack[64 * 1024];
  const stack_t alternative{stack, 0, sizeof stack};
  sigaltstack(&alternative, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}
#else
void report_faults() {}  // ASan's report says more
#endif

void print_sites(const std::vector<races::Site>& sites) {
  std::printf("  %-7s %-6s %5s %9s %10s %10s %6s  %-20s %s\n", "memory", "", "bytes", "requests", "units", "ideal",
              "ratio", "kernel", "where");
  for (const races::Site& s : sites)
    std::printf("  %-7s %-6s %5u %9llu %10llu %10llu %6.2f  %-20s %s\n", s.shared ? "shared" : "device",
                s.store ? "stores" : "loads", s.bytes, static_cast<unsigned long long>(s.requests),
                static_cast<unsigned long long>(s.units), static_cast<unsigned long long>(s.ideal), s.ratio(),
                s.kernel.c_str(), s.where.c_str());
}

// Every schedule of one case.
bool run_case(const CaseEntry& entry, const Options& o) {
  running_case = entry.name;
  std::optional<uint64_t> hash;
  std::string first;
  std::vector<std::string> failures;
  const auto begin = std::chrono::steady_clock::now();
  for (const Schedule& s : schedules(o)) {
    config() = {};
    config().order = s.order;
    config().seed = s.seed;
    config().copy_async = s.copy;
    const auto failed = [&](const std::string& what) { failures.push_back(what + " [" + s.text() + "]"); };
    Case c;
    try {
      entry.run(c);
      c.finish();
    } catch (const std::exception& e) {
      failed("error: " + std::string(e.what()));
    }
    for (const std::string& f : c.failures()) failed(f);
    if constexpr (kRaces) {
      const std::vector<races::Site> sites = races::take_sites();
      if (!hash) {
        for (const std::string& f : c.over_budget(sites)) failed(f);
        if (o.stats) print_sites(sites);
      }
    }
    if (!hash) {
      hash = c.hash();
      first = s.text();
    } else if (*hash != c.hash()) {
      failed("order: the outputs differ from those of the schedule " + first);
    }
  }
  const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%-44s %016llx %8.1f ms\n", entry.name, static_cast<unsigned long long>(*hash), ms);
  constexpr int kMost = 4;  // of a kind: "numbers", "race", ...
  std::map<std::string, int> printed;
  for (const std::string& f : failures)
    if (++printed[f.substr(0, f.find(':'))] <= kMost) std::printf("FAILED %s: %s\n", entry.name, f.c_str());
  for (const auto& [kind, n] : printed)
    if (n > kMost) std::printf("FAILED %s: %s: and %d more\n", entry.name, kind.c_str(), n - kMost);
  std::fflush(stdout);
  return failures.empty();
}

int run_all(const Options& o) {
  std::vector<CaseEntry> all = registered_cases();
  std::sort(all.begin(), all.end(),
            [](const CaseEntry& a, const CaseEntry& b) { return std::strcmp(a.name, b.name) < 0; });
  if constexpr (kRaces) races::count_accesses(true);
  report_faults();
  int passed = 0, failed = 0;
  for (const CaseEntry& entry : all) {
    if (std::string(entry.name).find(o.filter) == std::string::npos) continue;
    if (o.list)
      std::puts(entry.name);
    else
      ++(run_case(entry, o) ? passed : failed);
  }
  if (!o.list) std::printf("%d passed, %d failed\n", passed, failed);
  return failed || (!o.list && passed == 0) ? 1 : 0;
}

}  // namespace
}  // namespace dllm::emu

int main(int argc, char** argv) { return dllm::emu::run_all(dllm::emu::parse(argc, argv)); }
