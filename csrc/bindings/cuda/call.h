// One call of a CUDA kernel on numpy arrays: it takes device memory for each array, copies in, launches, and copies back
// what the kernel may change. Arrays are changed in place: what the kernel does not touch keeps its values, and a test can
// see that. Device memory has exactly the size of the array.
#pragma once

#include <pybind11/numpy.h>

#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "runtime/device.h"
#include "runtime/dtype.h"
#include "runtime/error.h"
#include "runtime/stopwatch.h"

namespace dllm {

DType parse_cuda_dtype(const std::string& name);  // float32, bfloat16 or float16

class Call {
 public:
  using Shape = std::vector<pybind11::ssize_t>;  // -1: any

  explicit Call(Device& device) : device_(device) {}

  // Arrays that the kernel reads, and those it may change. UsageError, which calls the array `what`, unless it is
  // C-contiguous and of that type and shape. Of a DType: 16-bit elements are uint16 in numpy.
  template <class T>
  const T* in(const pybind11::array& a, const char* what, const Shape& shape) {
    check(a, what, pybind11::dtype::of<T>(), shape);
    return static_cast<const T*>(take(a.data(), nullptr, size_t(a.nbytes()), what));
  }
  template <class T>
  T* out(pybind11::array a, const char* what, const Shape& shape) {
    check(a, what, pybind11::dtype::of<T>(), shape);
    return static_cast<T*>(take_out(a, what));
  }
  const void* in(DType t, const pybind11::array& a, const char* what, const Shape& shape) {
    check(a, what, dtype_of(t), shape);
    return take(a.data(), nullptr, size_t(a.nbytes()), what);
  }
  void* out(DType t, pybind11::array a, const char* what, const Shape& shape) {
    check(a, what, dtype_of(t), shape);
    return take_out(a, what);
  }
  // Values of this call's own, kept until run(); and `n` elements at `values`, which the kernel may change.
  template <class T>
  T* values(const std::vector<T>& v, const char* what) {
    static_assert(std::is_trivially_copyable_v<T>);
    kept_.emplace_back(v.size() * sizeof(T));
    if (!v.empty()) std::memcpy(kept_.back().data(), v.data(), v.size() * sizeof(T));
    return static_cast<T*>(take(kept_.back().data(), nullptr, v.size() * sizeof(T), what));
  }
  template <class T>
  T* changed(T* values, size_t n, const char* what) {
    return static_cast<T*>(take(values, values, n * sizeof(T), what));
  }
  // A count that kernels read from device memory.
  int32_t* count(int64_t n) { return values(std::vector<int32_t>{int32_t(n)}, "count"); }
  void* scratch(size_t bytes) { return take(nullptr, nullptr, bytes, "scratch"); }

  // With repeats: the launch goes into a graph that is replayed as often after the results are back, and what a replay
  // takes is returned, in seconds. The data are then in L2 as far as they fit.
  double run(const std::function<void()>& launch, int repeats);

 private:
  struct Copy {
    DeviceBuffer device;
    const void* host;
    void* back;
    size_t bytes;
  };

  static pybind11::dtype dtype_of(DType t);
  static void check(const pybind11::array& a, const char* what, const pybind11::dtype& dtype, const Shape& shape);
  void* take(const void* host, void* back, size_t bytes, const char* what);
  void* take_out(pybind11::array& a, const char* what) {
    if (!a.writeable()) fail<UsageError>(what, ": is read-only");
    return take(a.data(), a.mutable_data(), size_t(a.nbytes()), what);
  }

  Device& device_;
  std::vector<Copy> copies_;
  std::deque<std::vector<char>> kept_;
};

}  // namespace dllm
