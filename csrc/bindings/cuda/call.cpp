#include "bindings/cuda/call.h"

#include <memory>

namespace py = pybind11;

namespace dllm {

DType parse_cuda_dtype(const std::string& name) {
  for (const DType t : {DType::F32, DType::BF16, DType::F16})
    if (name == name_of(t)) return t;
  fail<UsageError>("dtype = \"", name, "\": float32, bfloat16 or float16");
}

py::dtype Call::dtype_of(DType t) { return t == DType::F32 ? py::dtype::of<float>() : py::dtype::of<uint16_t>(); }

void Call::check(const py::array& a, const char* what, const py::dtype& dtype, const Shape& shape) {
  const auto text = [](const Shape& s) {
    std::string t;
    for (const py::ssize_t n : s) t += (t.empty() ? "" : ", ") + (n < 0 ? "any" : std::to_string(n));
    return "[" + t + "]";
  };
  if (!a.dtype().equal(dtype))
    fail<UsageError>(what, ": expected ", py::str(dtype).cast<std::string>(), ", got ",
                     py::str(a.dtype()).cast<std::string>());
  const Shape got(a.shape(), a.shape() + a.ndim());
  bool fits = got.size() == shape.size();
  for (size_t i = 0; fits && i < got.size(); ++i) fits = shape[i] < 0 || shape[i] == got[i];
  if (!fits) fail<UsageError>(what, ": expected ", text(shape), ", got ", text(got));
  if (!(a.flags() & py::array::c_style)) fail<UsageError>(what, ": must be C-contiguous");
}

// Nothing is submitted before run(): if an argument is refused, nothing is under way.
void* Call::take(const void* host, void* back, size_t bytes, const char* what) {
  copies_.push_back({DeviceBuffer(device_, bytes, what), host, back, bytes});
  return copies_.back().device.as();
}

double Call::run(const std::function<void()>& launch, int repeats) {
  const py::gil_scoped_release release;
  for (const Copy& c : copies_)
    if (c.host && c.bytes) device_.copy_in(c.device.as(), c.host, c.bytes);
  device_.synchronize();  // launch() may throw, and then memory goes
  launch();
  for (const Copy& c : copies_) {
    if (!c.back || !c.bytes) continue;
    const Pinned<char> pinned(device_, c.bytes, "result");
    device_.copy_out(pinned.data(), c.device.as(), c.bytes);
    device_.synchronize();
    std::memcpy(c.back, pinned.data(), c.bytes);
  }
  if (repeats <= 0) return 0;
  const std::unique_ptr<Graph> graph = device_.capture(launch);
  device_.replay(*graph);
  device_.synchronize();
  double seconds = 0;
  {
    const Stopwatch watch(seconds);
    for (int i = 0; i < repeats; ++i) device_.replay(*graph);
    device_.synchronize();
  }
  return seconds / repeats;
}

}  // namespace dllm
