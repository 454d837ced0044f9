// dllm_run: the denoising loop without Python, for embedding, debugging and profilers.
//
//   dllm_run MODEL_FOLDER --ids 2,17,45,3 [--dtype bfloat16] [--quantization int8] [--repeat 5] [--GENERATION_SETTING VALUE ...]
//
// Prints the generated token ids on standard output, one line; timings on standard error. --repeat runs the same
// generation several times and reports the fastest, so that a profiler sees a warm engine.

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <iostream>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "engine/engine.h"
#include "runtime/error.h"
#include "runtime/isa.h"
#include "runtime/parallel.h"

using namespace dllm;

namespace {

struct Arguments {
  std::string folder;
  std::vector<int32_t> ids;
  DType dtype = DType::F32;
  Quantization quantization = Quantization::None;
  int64_t repeat = 1;
  GenerationConfig config;
  GenerateOptions options;
};

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

template <class T>
void parse(const std::string& name, const std::string& text, std::optional<T>& field) {
  parse(name, text, field.emplace());
}

void parse(const std::string& name, const std::string& text, DType& field) {
  if (text != "float32" && text != "bfloat16") fail<ConfigError>(name, " = \"", text, "\" must be float32 or bfloat16");
  field = text == "float32" ? DType::F32 : DType::BF16;
}

void parse(const std::string& name, const std::string& text, Quantization& field) {
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
void parse(const std::string& name, const std::string&, std::vector<double>&) {
  fail<ConfigError>(name, " can be given only from Python or C++");
}

// Every option: the tool's own, then every generation setting with its Python name and dashes.
template <class F>
void for_each_option(Arguments& a, F&& f) {
  f("ids", a.ids);
  f("dtype", a.dtype);
  f("quantization", a.quantization);
  f("repeat", a.repeat);
  f("infill", a.options.infill);
  for_each_field(a.config, f);
}

Arguments parse_arguments(int argc, char** argv) {
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
    fail<ConfigError>("usage: dllm_run MODEL_FOLDER --ids 1,2,3 [--OPTION VALUE ...]; options:", all);
  }
  return a;
}

void run(const Arguments& a) {
  Engine engine(a.folder, a.dtype, a.quantization);
  Result best;
  for (int64_t i = 0; i < a.repeat; ++i) {
    std::vector<Result> r = engine.generate({a.ids}, a.config, a.options);
    if (i == 0 || r[0].seconds_total < best.seconds_total) best = std::move(r[0]);
  }
  for (size_t i = 0; i < best.token_ids.size(); ++i) std::cout << (i ? "," : "") << best.token_ids[i];
  std::cout << "\n";
  std::fprintf(stderr, "%s, %s, %d threads: %lld forwards in %.1f ms, %.3f ms per forward\n", name_of(a.dtype),
               name_of(current_isa()), num_threads(), static_cast<long long>(best.nfe), best.seconds_total * 1e3,
               best.seconds_total * 1e3 / double(std::max<int64_t>(best.nfe, 1)));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse_arguments(argc, argv));
    return 0;
  } catch (const Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 2;
  }
}
