// Command lines of the native tools: TOOL MODEL_FOLDER [--OPTION VALUE ...].
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "decode/config.h"
#include "model/spec.h"
#include "runtime/dtype.h"
#include "runtime/error.h"

namespace dllm::tools {

// Reads one option's text as the type of the field it sets.
template <class T>
void parse(const std::string& name, const std::string& text, T& field) {
  if constexpr (std::is_enum_v<T>) {
    set_by_name(field, text);
  } else if constexpr (std::is_same_v<T, bool>) {
    if (text != "true" && text != "false") fail<ConfigError>(name, " = \"", text, "\" must be true or false");
    field = text == "true";
  } else {
    const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), field);
    if (ec != std::errc() || end != text.data() + text.size())
      fail<ConfigError>(name, " = \"", text, "\" is not a number of the right kind");
  }
}

inline void parse(const std::string&, const std::string& text, std::string& field) { field = text; }

template <class T>
void parse(const std::string& name, const std::string& text, std::optional<T>& field) {
  parse(name, text, field.emplace());
}

inline void parse(const std::string& name, const std::string& text, DType& field) {
  for (const DType t : {DType::F32, DType::BF16, DType::F16})
    if (text == name_of(t)) return void(field = t);
  fail<ConfigError>(name, " = \"", text, "\" must be float32, bfloat16, or on CUDA float16");
}

inline void parse(const std::string& name, const std::string& text, Quantization& field) {
  for (const Quantization q : {Quantization::None, Quantization::Int8, Quantization::Int4})
    if (text == name_of(q)) return void(field = q);
  fail<ConfigError>(name, " = \"", text, "\" must be none, int8 or int4");
}

// Integers with commas between them, or nothing.
template <class T>
void parse(const std::string& name, const std::string& text, std::vector<T>& list) {
  list.clear();
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parse(name, text.substr(begin, end - begin), list.emplace_back());
    begin = end + 1;
  }
}

// One number per token of a vocabulary: too long for a command line.
inline void parse(const std::string& name, const std::string&, std::vector<double>&) {
  fail<ConfigError>(name, " can be given only from Python or C++");
}

// Reads a command line into `a`: the model's folder, and options, which for_each_option(a, f) lists as f(name, field).
template <class Arguments>
Arguments parse_arguments(const std::string& tool, int argc, char** argv) {
  Arguments a;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      if (!a.folder.empty()) fail<ConfigError>("unexpected argument \"", word, "\"");
      a.folder = word;
      continue;
    }
    word = word.substr(2);
    std::replace(word.begin(), word.end(), '-', '_');
    if (i + 1 == argc) fail<ConfigError>("--", word, " needs a value");
    bool known = false;
    for_each_option(a, [&](const std::string& name, auto& field) {
      if (name != word) return;
      known = true;
      parse(name, argv[i + 1], field);
    });
    if (!known) fail<ConfigError>("unknown option ", argv[i]);
    ++i;
  }
  if (a.folder.empty() || a.repeat < 1) {
    std::string all;
    for_each_option(a, [&](const std::string& name, auto&) { all += " --" + name; });
    fail<ConfigError>("usage: ", tool, " MODEL_FOLDER [--OPTION VALUE ...]; options:", all);
  }
  return a;
}

// A tool's main(): an error is one line, and exit status 2.
template <class F>
int run_tool(F&& run) {
  try {
    run();
    return 0;
  } catch (const Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 2;
  }
}

}  // namespace dllm::tools
