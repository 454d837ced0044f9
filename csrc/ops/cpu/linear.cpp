#include "ops/linear.h"

#include <algorithm>

#include "ops/cpu/activations.h"
#include "ops/cpu/kernels.h"
#include "runtime/parallel.h"

namespace dllm::ops {
namespace {

// Rows per pass over the weights: their activations stay in L2 while the panels stream by.
constexpr int64_t kRowBlock = 128;

cpu::Write write_of(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::Store:
      return cpu::Write::Store;
    case Epilogue::AddTo:
      return cpu::Write::AddTo;
    case Epilogue::SiluMul:
      return cpu::Write::SiluMul;
  }
  return cpu::Write::Store;
}

}  // namespace

void linear(const LinearArgs& args) {
  const PackedLinear& w = *args.w;
  const int64_t panel_end = args.panel_end < 0 ? w.panels() : args.panel_end;
  const int64_t panels = panel_end - args.panel_begin;
  if (args.rows == 0 || panels <= 0) return;
  thread_local Buffer scratch;
  const cpu::Activations x = cpu::prepare_activations(w, args.x, args.x_dtype, args.rows, args.ldx, scratch);
  const auto write = cpu::kernels().write;

  const bool gated = args.epilogue == Epilogue::SiluMul;
  const int64_t width = gated ? kPanel / 2 : kPanel;  // output columns of a panel
  const int64_t columns = gated ? w.n / 2 : w.n;
  const int64_t out_size = int64_t(size_of(args.out_dtype));

  const int64_t blocks = (args.rows + kRowBlock - 1) / kRowBlock;
  const int64_t block = (args.rows + blocks - 1) / blocks;
  parallel_for(blocks * panels, cpu::panel_grain(block, w), [&](int64_t begin, int64_t end) {
    alignas(64) float c[kRowBlock * kPanel];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / panels * block, panel = args.panel_begin + task % panels;
      const int64_t rows = std::min(block, args.rows - row);
      cpu::gemm_panel(x, w, panel, row, rows, c, kPanel);

      const int64_t column = (panel - args.panel_begin) * width, first_row = args.out_rows ? 0 : row;
      cpu::WriteArgs out{write_of(args.epilogue),
                         rows,
                         std::min(width, columns - panel * width),
                         c,
                         nullptr,
                         static_cast<char*>(args.out) + (first_row * args.ldo + column) * out_size,
                         args.ldo,
                         args.out_rows ? args.out_rows + row : nullptr,
                         args.out_dtype == DType::BF16};
      if (w.bias.bytes()) out.bias = w.bias.as<float>() + panel * kPanel;
      write(out);
    }
  });
}

}  // namespace dllm::ops
