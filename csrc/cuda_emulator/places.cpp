#include "cuda_emulator/places.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <unordered_map>

namespace dllm::emu::races {
namespace {

std::unordered_map<const void*, uint32_t> numbers;
std::vector<const void*> pcs{nullptr};
std::map<const void*, std::string> lines;  // those known

struct Module {
  const void* base = nullptr;
  std::string path;
};
Module module_of(const void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info) || !info.dli_fbase) return {};
  return {info.dli_fbase, info.dli_fname};
}

std::string unresolved(const void* pc) {
  char text[64];
  std::snprintf(text, sizeof text, "%p", pc);
  return text;
}

bool is_wrapper(const std::string& line) {
  for (const char* part : {"/kernel.h:", "/emulator.h:", "/c++/", "??"})
    if (line.find(part) != line.npos) return true;
  return false;
}

// Asks addr2line for places of one module.
void resolve(const Module& module, const std::vector<const void*>& wanted) {
  std::string command = "addr2line -a -i -e '" + module.path + "'";
  std::map<unsigned long long, const void*> by_offset;
  for (const void* pc : wanted) {
    const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(module.base) - 1;  // in the call itself
    by_offset[static_cast<unsigned long long>(offset)] = pc;
    char text[32];
    std::snprintf(text, sizeof text, " %llx", static_cast<unsigned long long>(offset));
    command += text;
  }
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (!pipe) return;
  char text[4096];
  const void* pc = nullptr;
  while (std::fgets(text, sizeof text, pipe)) {
    std::string line = text;
    while (!line.empty() && (line.back() == '\n' || line.back() == ' ')) line.pop_back();
    if (line.starts_with("0x")) {
      const auto at = by_offset.find(std::strtoull(line.c_str(), nullptr, 16));
      pc = at == by_offset.end() ? nullptr : at->second;
      continue;
    }
    if (const size_t note = line.find(" (discriminator"); note != line.npos) line.resize(note);
    if (const size_t root = line.rfind("csrc/"); root != line.npos) line = line.substr(root + 5);
    if (!pc || line.starts_with("??")) continue;
    std::string& known = lines[pc];
    if (known.empty() || (is_wrapper("/" + known) && !is_wrapper("/" + line))) known = line;
  }
  pclose(pipe);
}

}  // namespace

uint32_t place_of(const void* pc) {
  static const void* last = nullptr;
  static uint32_t last_number = 0;
  if (pc == last) return last_number;
  const auto [at, added] = numbers.insert({pc, uint32_t(pcs.size())});
  if (added) pcs.push_back(pc);
  last = pc;
  return last_number = at->second;
}

const void* pc_of(uint32_t place) { return pcs[place]; }

std::vector<std::string> source_lines(const std::vector<const void*>& wanted) {
  std::map<std::string, std::pair<Module, std::vector<const void*>>> unknown;
  for (const void* pc : wanted)
    if (pc && !lines.contains(pc))
      if (const Module m = module_of(pc); m.base) {
        auto& [module, list] = unknown[m.path];
        module = m;
        list.push_back(pc);
      }
  constexpr size_t kBatch = 1000;  // of a command line
  for (const auto& [path, entry] : unknown)
    for (size_t i = 0; i < entry.second.size(); i += kBatch)
      resolve(entry.first,
              {entry.second.begin() + long(i), entry.second.begin() + long(std::min(entry.second.size(), i + kBatch))});
  std::vector<std::string> result;
  for (const void* pc : wanted) result.push_back(lines.contains(pc) ? lines[pc] : unresolved(pc));
  return result;
}

}  // namespace dllm::emu::races
