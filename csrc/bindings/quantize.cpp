// What `dllm quantize` is made of: the tensors of a checkpoint, and the quantised form of a matrix.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "model/checkpoint.h"
#include "ops/quantize.h"
#include "runtime/error.h"

namespace py = pybind11;
using namespace dllm;
using namespace dllm::ops;

namespace {

// A tensor where it is mapped (copied, if the file has it misaligned), read-only; bf16 as uint16.
py::array read_tensor(const py::object& self, const std::string& name, const std::vector<int64_t>& shape) {
  const CheckpointTensor& t = self.cast<const Checkpoint&>().tensor(name, shape);
  if (t.dtype != "F32" && t.dtype != "BF16")
    fail<CheckpointError>("tensor \"", name, "\" has dtype ", t.dtype, "; F32 and BF16 are supported");
  const py::dtype dtype = t.dtype == "F32" ? py::dtype::of<float>() : py::dtype::of<uint16_t>();
  const bool aligned = uintptr_t(t.data) % uintptr_t(dtype.itemsize()) == 0;
  py::array array(dtype, shape, aligned ? t.data : nullptr, self);
  if (!aligned) std::memcpy(array.mutable_data(), t.data, t.bytes);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

WeightFormat quantized_format(const std::string& name) {
  for (const WeightFormat f : {WeightFormat::I8, WeightFormat::I4})
    if (name == name_of(f)) return f;
  fail<UsageError>("format = \"", name, "\": int8 or int4");
}

// Of a matrix: (values, scales) as ops/quantize.h has them; bf16 scales as uint16.
py::tuple quantize(const py::array& w, const std::string& format_name, const std::string& name) {
  const WeightFormat format = quantized_format(format_name);
  const WeightSource source = weight_source(w);
  const int64_t row = quantized_row_bytes(format, source.k), scale = quantized_scale_bytes(format, source.k);
  py::array values, scales;
  if (format == WeightFormat::I8) {
    values = py::array_t<int8_t>({source.n, row});
    scales = py::array_t<float>(source.n);
  } else {
    values = py::array_t<uint8_t>({source.n, row});
    scales = py::array_t<uint16_t>({source.n, scale / 2});
  }
  void *to = values.mutable_data(), *scales_to = scales.mutable_data();
  {
    const py::gil_scoped_release release;
    quantize_matrix(source, format, to, scales_to, name.c_str());
  }
  return py::make_tuple(values, scales);
}

}  // namespace

void bind_quantize(py::module_& m) {
  py::class_<Checkpoint>(m, "Checkpoint", py::module_local())
      .def(py::init<const std::string&>(), py::arg("folder"))
      .def_property_readonly("config_text", [](const Checkpoint& c) { return py::bytes(c.config_text()); })
      .def("tensor", &read_tensor, py::arg("name"), py::arg("shape"))
      .def(
          "release",
          [](const Checkpoint& c, const std::string& name, const std::vector<int64_t>& shape) {
            const CheckpointTensor& t = c.tensor(name, shape);
            t.file->release(t.data, t.bytes);
          },
          py::arg("name"), py::arg("shape"));
  m.def("quantize", &quantize, py::arg("weight"), py::arg("format"), py::arg("name") = "weight");
}
