// Conversions between Python and the engine's types.
#pragma once

#include <pybind11/pybind11.h>

#include "decode/config.h"

namespace dllm {

// A dict of GenerationConfig fields; a missing key or None means "not given". ConfigError for unknown keys and wrong types.
GenerationConfig config_from_dict(const pybind11::dict& fields);

// The same fields back, with the defaults that are in force filled in.
pybind11::dict config_to_dict(const GenerationConfig& config);

}  // namespace dllm
