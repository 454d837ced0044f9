// The exception hierarchy. Python sees the classes of the same name in dllm_ext/errors.py.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace dllm {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ConfigError : Error {  // a setting, or a combination of settings, that is not allowed
  using Error::Error;
};
struct InputError : Error {  // a prompt that this model cannot take
  using Error::Error;
};
struct CheckpointError : Error {  // config.json or safetensors that are missing, damaged or of another architecture
  using Error::Error;
};
struct NumericalError : Error {  // NaN or infinity in the model's arithmetic
  using Error::Error;
};
struct OutOfMemoryError : Error {
  using Error::Error;
};
struct Interrupted : Error {  // the caller asked to stop (Ctrl-C, or a callback that returned false)
  using Error::Error;
};
struct UsageError : Error {  // the API called in an order or place where it cannot work
  using Error::Error;
};

// fail<ConfigError>("threshold = ", x, " is not in (0, 1]")
template <class E, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  throw E(s.str());
}

}  // namespace dllm
