// dllm_run: the denoising loop without Python, for embedding, debugging and profilers.
//
//   dllm_run MODEL_FOLDER --ids 2,17,45,3 [--device cuda] [--dtype bfloat16] [--quantization int8] [--repeat 5] [--GENERATION_SETTING VALUE ...]
//
// Prints the generated token ids on standard output, one line; timings on standard error. --repeat runs the same
// generation several times and reports the fastest, so that a profiler sees a warm engine.

#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "runtime/isa.h"
#include "runtime/parallel.h"
#include "tools/options.h"

using namespace dllm;

namespace {

struct Arguments {
  std::string folder;
  std::vector<int32_t> ids;
  std::string device = "cpu";
  DType dtype = DType::F32;
  Quantization quantization = Quantization::None;
  int64_t repeat = 1;
  GenerationConfig config;
  GenerateOptions options;
};

// Every option: the tool's own, then every generation setting with its Python name and dashes.
template <class F>
void for_each_option(Arguments& a, F&& f) {
  f("ids", a.ids);
  f("device", a.device);
  f("dtype", a.dtype);
  f("quantization", a.quantization);
  f("repeat", a.repeat);
  f("infill", a.options.infill);
  for_each_field(a.config, f);
}

void run(const Arguments& a) {
  Engine engine(a.folder, a.dtype, a.quantization, {}, a.device);
  Result best;
  for (int64_t i = 0; i < a.repeat; ++i) {
    std::vector<Result> r = engine.generate({a.ids}, a.config, a.options);
    if (i == 0 || r[0].seconds_total < best.seconds_total) best = std::move(r[0]);
  }
  for (size_t i = 0; i < best.token_ids.size(); ++i) std::cout << (i ? "," : "") << best.token_ids[i];
  std::cout << "\n";
  const std::string where =
      a.device == "cpu" ? std::string(name_of(current_isa())) + ", " + std::to_string(num_threads()) + " threads"
                        : engine.model().device().name();
  std::fprintf(stderr, "%s, %s: %lld forwards in %.1f ms, %.3f ms per forward\n", name_of(a.dtype), where.c_str(),
               static_cast<long long>(best.nfe), best.seconds_total * 1e3,
               best.seconds_total * 1e3 / double(std::max<int64_t>(best.nfe, 1)));
}

}  // namespace

int main(int argc, char** argv) {
  return tools::run_tool([&] { run(tools::parse_arguments<Arguments>("dllm_run", argc, argv)); });
}
