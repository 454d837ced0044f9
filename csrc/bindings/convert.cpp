#include "bindings/convert.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "runtime/error.h"

namespace py = pybind11;

namespace dllm {

namespace {

// One number per token of a vocabulary is a numpy array in Python, not a list of objects; none at all is None.
using Numbers = std::vector<double>;

void read(py::handle value, auto& field) {
  using T = std::remove_reference_t<decltype(field)>;
  if constexpr (std::is_enum_v<T>) {
    set_by_name(field, value.cast<std::string>());
  } else if constexpr (std::is_same_v<T, Numbers>) {
    const auto a = py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(value);
    if (!a || a.ndim() != 1) throw py::cast_error();
    field.assign(a.data(), a.data() + a.size());
  } else {
    field = value.cast<T>();
  }
}

py::object show(const auto& field) {
  using T = std::remove_cvref_t<decltype(field)>;
  if constexpr (std::is_enum_v<T>) {
    return py::cast(name_of(field));
  } else if constexpr (std::is_same_v<T, Numbers>) {
    if (field.empty()) return py::none();
    return py::array_t<double>(py::ssize_t(field.size()), field.data());
  } else if constexpr (std::is_same_v<T, std::vector<int64_t>>) {
    return py::tuple(py::cast(field));
  } else {
    return py::cast(field);
  }
}

void set_field(GenerationConfig& c, const std::string& name, py::handle value) {
  bool known = false;
  std::string all;
  for_each_field(c, [&](const char* field_name, auto& field) {
    all += std::string(all.empty() ? "" : ", ") + field_name;
    if (name != field_name) return;
    known = true;
    if (value.is_none()) return;
    try {
      read(value, field);
    } catch (const py::cast_error&) {
      fail<ConfigError>(name, " = ", std::string(py::repr(value)), " has the wrong type or is out of range");
    }
  });
  if (!known) fail<ConfigError>("\"", name, "\" is not a generation setting (there are: ", all, ")");
}

}  // namespace

GenerationConfig config_from_dict(const py::dict& given) {
  GenerationConfig c;
  for (const auto& [key, value] : given) set_field(c, py::str(key), value);
  return c;
}

py::dict config_to_dict(const GenerationConfig& config) {
  GenerationConfig c = config;
  if (c.rule() == TransferRule::Threshold) c.threshold = c.effective_threshold();
  py::dict out;
  for_each_field(c, [&](const char* name, const auto& field) { out[name] = show(field); });
  return out;
}

}  // namespace dllm
