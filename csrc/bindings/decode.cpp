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
        TransferSelector selector;
        const std::span<const int32_t> chosen =
            selector.select(rules_of(config_from_dict(config), {}),
                            {0, step_in_block, masked_at_start, int64_t(confidence.size())}, proposals);
        return std::vector<int32_t>(chosen.begin(), chosen.end());
      },
      py::arg("config"), py::arg("confidence"), py::arg("step_in_block") = 0, py::arg("masked_at_start") = 0,
      "Indices that a step commits, for proposals at positions 0, 1, ... with these confidences.");
  m.def(
      "certainty_density",
      [](const std::vector<bool>& known, double sigma) {
        Bitmap editable(int64_t(known.size())), masked(editable.size());
        for (int64_t i = 0; i < editable.size(); ++i) {
          editable.set(i);
          if (!known[size_t(i)]) masked.set(i);
        }
        CertaintyDensity density(editable, sigma);
        const std::span<const double> d = density.of(masked);
        return std::vector<double>(d.begin(), d.end());
      },
      py::arg("known"), py::arg("sigma"), "Certainty density of every position (d2Cache).");
  py::class_<Bitmap>(m, "Bitmap", py::module_local())
      .def(py::init<int64_t>(), py::arg("size"))
      .def("set", &Bitmap::set)
      .def("reset", &Bitmap::reset)
      .def("test", &Bitmap::test)
      .def("count", &Bitmap::count)
      .def("any", &Bitmap::any)
      .def("members", &Bitmap::members);
}
