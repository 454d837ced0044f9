// Schedules, transfer rules and bitmaps on plain values, so that tests can put random cases to them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/convert.h"
#include "decode/density.h"
#include "decode/schedule.h"
#include "decode/transfer.h"
#include "runtime/bitmap.h"

namespace py = pybind11;
using namespace dllm;

void bind_decode(py::module_& m) {
  m.def("llada_transfer_count", &llada_transfer_count, py::arg("masked"), py::arg("steps"), py::arg("step"));
  m.def("dream_transfer_count", &dream_transfer_count, py::arg("masked"), py::arg("eps"), py::arg("steps"),
        py::arg("step"));
  m.def("dream_transfer_probability", &dream_transfer_probability, py::arg("eps"), py::arg("steps"), py::arg("step"));
  m.def(
      "select_transfers",
      [](const py::dict& config, const std::vector<double>& confidence, int64_t step_in_block,
         int64_t masked_at_start) {
        std::vector<Proposal> proposals;
        for (size_t i = 0; i < confidence.size(); ++i)
          proposals.push_back({int32_t(i), 0, confidence[i], confidence[i]});
        return select_transfers(config_from_dict(config),
                                {0, step_in_block, masked_at_start, int64_t(confidence.size())}, proposals);
      },
      py::arg("config"), py::arg("confidence"), py::arg("step_in_block") = 0, py::arg("masked_at_start") = 0,
      "Indices that a step commits, for proposals at positions 0, 1, ... with these confidences.");
  m.def(
      "certainty_density",
      [](const std::vector<bool>& known, double sigma) {
        return certainty_density(std::vector<uint8_t>(known.begin(), known.end()), sigma);
      },
      py::arg("known"), py::arg("sigma"), "Certainty density of every position (d2Cache).");
  py::class_<Bitmap>(m, "Bitmap")
      .def(py::init<int64_t>(), py::arg("size"))
      .def("set", &Bitmap::set)
      .def("reset", &Bitmap::reset)
      .def("test", &Bitmap::test)
      .def("count", &Bitmap::count)
      .def("any", &Bitmap::any)
      .def("members", &Bitmap::members);
}
