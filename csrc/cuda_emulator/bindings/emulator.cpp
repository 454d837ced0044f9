// The emulator's settings and counters for Python, in the module _C_emulated.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_emulator/device.h"

namespace py = pybind11;
using namespace dllm;

namespace {

void configure(const std::string& order, uint64_t seed, const std::string& copies, const std::string& queue) {
  emu::Config& c = emu::config();
  const auto choose = [](const std::string& name, const std::string& value, auto first, const char* first_name,
                         auto second, const char* second_name) {
    if (value == first_name) return first;
    if (value == second_name) return second;
    fail<ConfigError>(name, " = \"", value, "\" must be ", first_name, " or ", second_name);
  };
  c.seed = seed;
  if (order == "fifo")
    c.order = emu::Order::Fifo;
  else
    c.order = choose("order", order, emu::Order::Lifo, "lifo", emu::Order::Random, "random");
  c.copy_async = choose("copies", copies, emu::CopyAsync::Late, "late", emu::CopyAsync::Early, "early");
  emu::set_queue_mode(choose("queue", queue, emu::Queue::Mode::Lazy, "lazy", emu::Queue::Mode::Eager, "eager"));
}

emu::Queue& queue() {
  if (emu::Queue* q = emu::last_queue()) return *q;
  fail<UsageError>("no engine on the emulated device is alive");
}

// What the engine that was made last has asked of its stream.
py::dict counters() {
  const emu::Counters& c = queue().counters();
  py::dict d;
  for (int k = 0; k < emu::kKinds; ++k) d[emu::name_of(emu::Kind(k))] = c[emu::Kind(k)];
  d["graph_launches"] = c.graph_launches;
  d["synchronisations"] = c.synchronisations;
  d["waits"] = c.waits;
  return d;
}

}  // namespace

void bind_emulator(py::module_& m) {
  m.def("configure", &configure, py::arg("order") = "fifo", py::arg("seed") = 1, py::arg("copies") = "late",
        py::arg("queue") = "lazy", "Schedules of threads, of asynchronous copies, and of streams made from now on.");
  m.def("counters", &counters);
  m.def("reset_counters", [] { queue().reset_counters(); });
  m.def("trace", [](bool on) { queue().trace = on; }, py::arg("on"));
  m.def("executed", [] {
    std::vector<std::pair<std::string, std::string>> out;
    for (const auto& [name, kind] : queue().executed()) out.emplace_back(name, emu::name_of(kind));
    return out;
  });
}
