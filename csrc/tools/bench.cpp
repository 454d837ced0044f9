// dllm_bench: single steps without Python and without a decoding loop, for profilers.
//
//   dllm_bench MODEL_FOLDER [--device cuda] [--dtype bfloat16] [--quantization int8] [--rows 32] [--keys 320] [--repeat 20]
//
// A step of `rows` rows attends to `keys` cached positions; the LM head's statistics of all rows belong to it. One untimed
// step over all positions comes first. Prints the fastest and the median step, and the weights read per second.

#include <algorithm>
#include <cstdio>
#include <string>

#include "engine/measure.h"
#include "tools/options.h"

using namespace dllm;

namespace {

struct Arguments {
  std::string folder;
  std::string device = "cpu";
  DType dtype = DType::F32;
  Quantization quantization = Quantization::None;
  int64_t rows = 32, keys = 320, repeat = 20;
};

template <class F>
void for_each_option(Arguments& a, F&& f) {
  f("device", a.device);
  f("dtype", a.dtype);
  f("quantization", a.quantization);
  f("rows", a.rows);
  f("keys", a.keys);
  f("repeat", a.repeat);
}

void run(const Arguments& a) {
  Engine engine(a.folder, a.dtype, a.quantization, {}, a.device);
  std::vector<double> seconds = time_steps(engine, a.rows, a.keys, a.repeat);
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2], bytes = double(engine.model().weight_bytes());
  std::printf("%s, %s, %s: %lld rows over %lld keys: %.3f ms at best, %.3f ms in the median; %.1f GB/s of weights\n",
              engine.model().device().name().c_str(), name_of(a.dtype), name_of(a.quantization),
              static_cast<long long>(a.rows), static_cast<long long>(a.keys), seconds[0] * 1e3, median * 1e3,
              bytes / median / 1e9);
}

}  // namespace

int main(int argc, char** argv) {
  return tools::run_tool([&] { run(tools::parse_arguments<Arguments>("dllm_bench", argc, argv)); });
}
