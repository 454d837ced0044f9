// dllm_ext._C.ops.time_steps(engine, rows, keys, repeats): seconds of single steps, without the decoding loop around
// them. For benchmarks. An untimed step caches all positions first.

#include "engine/measure.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace dllm;

void bind_measure(py::module_& m) {
  m.def("time_steps", &time_steps, py::arg("engine"), py::arg("rows"), py::arg("keys"), py::arg("repeats"),
        py::call_guard<py::gil_scoped_release>());
}
