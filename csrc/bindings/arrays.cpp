#include "bindings/arrays.h"

#include "runtime/error.h"

namespace py = pybind11;

namespace dllm {

namespace {

void check_contiguous_rows(const py::array& a, const char* what) {
  if (a.ndim() != 2) fail<UsageError>(what, ": expected 2 dimensions, got ", a.ndim());
  if (a.size() == 0) return;  // its strides mean nothing
  if (a.shape(1) > 1 && a.strides(1) != a.itemsize()) fail<UsageError>(what, ": elements of a row must be adjacent");
  if (a.shape(0) > 1 && (a.strides(0) < a.shape(1) * a.itemsize() || a.strides(0) % a.itemsize() != 0))
    fail<UsageError>(what, ": rows overlap or are not aligned");
}

}  // namespace

Matrix matrix(const py::array& a, const char* what, int64_t cols, bool writeable) {
  check_contiguous_rows(a, what);
  DType dtype;
  if (py::isinstance<py::array_t<float>>(a))
    dtype = DType::F32;
  else if (py::isinstance<py::array_t<uint16_t>>(a))
    dtype = DType::BF16;
  else
    fail<UsageError>(what, ": expected float32, or uint16 holding bfloat16");
  if (cols >= 0 && a.shape(1) != cols) fail<UsageError>(what, ": expected ", cols, " columns, got ", a.shape(1));
  if (writeable && !a.writeable()) fail<UsageError>(what, ": is read-only");
  const int64_t ld = a.shape(0) > 1 ? a.strides(0) / a.itemsize() : a.shape(1);
  return {const_cast<void*>(a.data()), dtype, a.shape(0), a.shape(1), ld};
}

ops::WeightSource weight_source(const py::array& a) {
  const Matrix m = matrix(a, "weight");
  if (m.rows == 0 || m.cols == 0) fail<UsageError>("weight: is empty");
  return {m.data, ops::format_of(m.dtype), m.rows, m.cols, m.ld};
}

}  // namespace dllm
