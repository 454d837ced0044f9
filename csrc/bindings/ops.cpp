// dllm_ext._C.ops: single kernels on numpy arrays, for tests and measurements. bf16 arrays are uint16. Shapes and dtypes
// are checked here; the kernels themselves trust their caller.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "bindings/arrays.h"
#include "ops/attention.h"
#include "ops/elementwise.h"
#include "ops/features.h"
#include "ops/linear.h"
#include "ops/philox.h"
#include "ops/rollout.h"
#include "ops/row_stats.h"
#include "ops/similarity.h"
#include "runtime/error.h"
#include "runtime/isa.h"
#include "runtime/parallel.h"
#include "runtime/stopwatch.h"

namespace py = pybind11;
using namespace dllm;
using namespace dllm::ops;

namespace {

DType parse_dtype(const std::string& name) {
  if (name == name_of(DType::F32)) return DType::F32;
  if (name == name_of(DType::BF16)) return DType::BF16;
  fail<UsageError>("dtype = \"", name, "\": float32 or bfloat16");
}

Matrix matrix_of(const py::array& a, const char* what, DType dtype, int64_t cols, bool writeable = false) {
  const Matrix m = matrix(a, what, cols, writeable);
  if (m.dtype != dtype) fail<UsageError>(what, ": expected ", name_of(dtype), ", got ", name_of(m.dtype));
  return m;
}

// Of a vector; what is not one is refused by vector_of.
int64_t length(const py::array& a) { return a.ndim() == 1 ? a.shape(0) : 0; }

template <class T>
const T* vector_of(const py::array& a, const char* what, int64_t n) {
  if (!py::isinstance<py::array_t<T>>(a) || a.ndim() != 1 || (n > 1 && a.strides(0) != a.itemsize()))
    fail<UsageError>(what, ": expected a contiguous vector of ", py::str(py::dtype::of<T>()).cast<std::string>());
  if (a.shape(0) != n) fail<UsageError>(what, ": expected ", n, " elements, got ", a.shape(0));
  return static_cast<const T*>(a.data());
}

void check_range(const int32_t* values, int64_t n, int64_t end, const char* what) {
  for (int64_t i = 0; i < n; ++i)
    if (values[i] < 0 || values[i] >= end)
      fail<UsageError>(what, "[", i, "] = ", values[i], " is not in [0, ", end, ")");
}

// Row numbers of a matrix, each at most once: threads must not write to the same row.
const int32_t* distinct_rows(const py::array& a, const char* what, int64_t n, int64_t end) {
  const int32_t* rows = vector_of<int32_t>(a, what, n);
  check_range(rows, n, end, what);
  std::vector<bool> seen(static_cast<size_t>(end));
  for (int64_t i = 0; i < n; ++i) {
    if (seen[size_t(rows[i])]) fail<UsageError>(what, ": ", rows[i], " occurs twice");
    seen[size_t(rows[i])] = true;
  }
  return rows;
}

py::array empty(DType dtype, int64_t rows, int64_t cols) {
  if (dtype == DType::F32) return py::array_t<float>({rows, cols});
  return py::array_t<uint16_t>({rows, cols});
}

WeightFormat parse_format(const std::string& name) {
  for (const WeightFormat f : {WeightFormat::F32, WeightFormat::BF16, WeightFormat::I8, WeightFormat::I4})
    if (name == name_of(f)) return f;
  fail<UsageError>("format = \"", name, "\": float32, bfloat16, int8 or int4");
}

// A matrix, or what quantize() made of one: (values, scales).
WeightSource source_of(const py::object& o) {
  if (!py::isinstance<py::tuple>(o)) return weight_source(o.cast<py::array>());
  const auto [values, scales] = o.cast<std::pair<py::array, py::array>>();
  const bool wide = py::isinstance<py::array_t<int8_t>>(values);
  if (!wide && !py::isinstance<py::array_t<uint8_t>>(values)) fail<UsageError>("weight: expected int8 or uint8");
  if (values.ndim() != 2 || values.size() == 0) fail<UsageError>("weight: expected a matrix");
  const WeightFormat format = wide ? WeightFormat::I8 : WeightFormat::I4;
  const int64_t n = values.shape(0), k = values.shape(1) * (wide ? 1 : 2);
  if (scales.nbytes() != n * quantized_scale_bytes(format, k) || !(scales.flags() & py::array::c_style) ||
      !(values.flags() & py::array::c_style))
    fail<UsageError>("weight: scales do not belong to the values, or are not contiguous");
  return {values.data(), format, n, k, k, scales.data()};
}

std::unique_ptr<PackedLinear> pack(const std::vector<py::object>& weights, const std::string& format,
                                   const std::optional<py::array>& bias) {
  std::vector<WeightSource> sources;
  for (const py::object& w : weights) sources.push_back(source_of(w));
  auto packed = std::make_unique<PackedLinear>(pack_linear(sources.data(), int(sources.size()), parse_format(format)));
  if (bias) {
    const float* values = vector_of<float>(*bias, "bias", packed->n);
    packed->bias = Buffer(size_t(packed->panels() * kPanel) * 4, "bias");
    std::copy_n(values, packed->n, packed->bias.as<float>());
  }
  return packed;
}

Epilogue parse_epilogue(const std::string& name, const PackedLinear& w) {
  if ((name == "silu_mul") != w.gate_up)
    fail<UsageError>("epilogue \"", name, "\" on weights ", w.gate_up ? "of gate and up" : "that are not gate and up");
  if (name == "store") return Epilogue::Store;
  if (name == "add") return Epilogue::AddTo;
  if (name == "silu_mul") return Epilogue::SiluMul;
  fail<UsageError>("epilogue = \"", name, "\": store, add or silu_mul");
}

// Of F32 and BF16 weights in their own dtype, of quantised ones in either.
Matrix input_of(const PackedLinear& w, const py::array& x_in) {
  const Matrix x = matrix(x_in, "x", w.k);
  if (!is_quantized(w.format) && w.format != format_of(x.dtype))
    fail<UsageError>("x: expected ", name_of(w.format), ", got ", name_of(x.dtype));
  return x;
}

void run_linear(const PackedLinear& w, const py::array& x_in, const py::array& out_in, const std::string& epilogue,
                const std::optional<py::array>& out_rows, int64_t panel_begin, int64_t panel_end) {
  const Epilogue e = parse_epilogue(epilogue, w);
  const Matrix x = input_of(w, x_in);
  const int64_t last = panel_end < 0 ? w.panels() : panel_end;
  if (panel_begin < 0 || panel_begin >= last || last > w.panels())
    fail<UsageError>("panels [", panel_begin, ", ", last, ") of ", w.panels());
  const int64_t width = e == Epilogue::SiluMul ? kPanel / 2 : kPanel, n = e == Epilogue::SiluMul ? w.n / 2 : w.n;
  const Matrix out = matrix(out_in, "out", std::min(n, last * width) - panel_begin * width, true);
  if (!out_rows && out.rows != x.rows) fail<UsageError>("out: expected ", x.rows, " rows, got ", out.rows);
  if (e == Epilogue::AddTo && out.dtype != DType::F32) fail<UsageError>("out: \"add\" accumulates in float32");
  const int32_t* to = out_rows ? distinct_rows(*out_rows, "out_rows", x.rows, out.rows) : nullptr;
  const py::gil_scoped_release release;
  linear({&w, x.data, x.dtype, x.rows, x.ld, out.data, out.ld, out.dtype, e, to, panel_begin, panel_end});
}

py::array run_embedding(const py::array& table_in, const py::array& tokens) {
  const Matrix table = matrix(table_in, "table");
  if (table.ld != table.cols) fail<UsageError>("table: must be contiguous");
  const int64_t rows = length(tokens);
  const int32_t* ids = vector_of<int32_t>(tokens, "tokens", rows);
  check_range(ids, rows, table.rows, "tokens");
  py::array_t<float> out({rows, table.cols});
  embedding({table.data, table.dtype, ids, rows, table.cols, out.mutable_data(), table.cols});
  return out;
}

py::array run_rms_norm(const py::array& x_in, const py::array& weight, float eps, const std::string& dtype,
                       const std::optional<py::array>& rows_in) {
  const Matrix x = matrix_of(x_in, "x", DType::F32, -1);
  const float* w = vector_of<float>(weight, "weight", x.cols);
  const DType out_dtype = parse_dtype(dtype);
  const int64_t rows = rows_in ? length(*rows_in) : x.rows;
  const int32_t* from = rows_in ? vector_of<int32_t>(*rows_in, "rows_in", rows) : nullptr;
  if (from) check_range(from, rows, x.rows, "rows_in");
  py::array out = empty(out_dtype, rows, x.cols);
  rms_norm(
      {static_cast<const float*>(x.data), rows, x.cols, x.ld, w, eps, out.mutable_data(), x.cols, out_dtype, from});
  return out;
}

// A slab that owns its memory.
struct Slab {
  KvSlab view;
  Buffer k, v;

  Slab(int n_kv, int head_dim, int64_t positions, const std::string& dtype) {
    if (n_kv < 1 || head_dim < 2 || head_dim % 2 || positions < 1)
      fail<UsageError>("KvSlab: n_kv = ", n_kv, ", head_dim = ", head_dim, ", positions = ", positions);
    view.capacity = (positions + kPanel - 1) / kPanel * kPanel;
    view.n_kv = n_kv;
    view.head_dim = head_dim;
    view.dtype = parse_dtype(dtype);
    k = Buffer(checked_bytes("K", size_t(view.k_elements()), size_of(view.dtype)), "K");
    v = Buffer(checked_bytes("V", size_t(view.v_elements()), size_of(view.dtype)), "V");
    view.k = k.as();
    view.v = v.as();
  }

  py::tuple read(const py::array& positions) const {
    const int64_t n = length(positions);
    const int32_t* p = vector_of<int32_t>(positions, "positions", n);
    check_range(p, n, view.capacity, "positions");
    const std::vector<int64_t> shape{n, view.n_kv, view.head_dim};
    py::array_t<float> k_out(shape), v_out(shape);
    read_kv(view, p, n, k_out.mutable_data(), v_out.mutable_data());
    return py::make_tuple(k_out, v_out);
  }
};

py::array run_rope(const py::array& qkv_in, const py::array& cos_in, const py::array& sin_in,
                   const py::array& positions, const std::vector<const Slab*>& slabs, const py::array& row_to_slab,
                   int n_heads) {
  if (slabs.empty()) fail<UsageError>("rope_kv_write: no slab");
  const KvSlab& first = slabs[0]->view;
  std::vector<KvSlab> views;
  for (const Slab* s : slabs) {
    if (s->view.n_kv != first.n_kv || s->view.head_dim != first.head_dim || s->view.dtype != first.dtype)
      fail<UsageError>("rope_kv_write: slabs differ");
    views.push_back(s->view);
  }
  if (n_heads < 1 || n_heads % first.n_kv) fail<UsageError>("n_heads = ", n_heads, " over n_kv = ", first.n_kv);
  const int64_t hd = first.head_dim;
  const Matrix qkv = matrix_of(qkv_in, "qkv", DType::F32, (n_heads + 2 * first.n_kv) * hd);
  const Matrix cos = matrix_of(cos_in, "cos", DType::F32, hd / 2), sin = matrix_of(sin_in, "sin", DType::F32, hd / 2);
  if (cos.rows != sin.rows || cos.ld != hd / 2 || sin.ld != hd / 2)
    fail<UsageError>("cos and sin must be contiguous and equally long");
  const int32_t* p = vector_of<int32_t>(positions, "positions", qkv.rows);
  const int32_t* to = vector_of<int32_t>(row_to_slab, "row_to_slab", qkv.rows);
  check_range(to, qkv.rows, int64_t(slabs.size()), "row_to_slab");
  for (int64_t r = 0; r < qkv.rows; ++r)
    check_range(p + r, 1, std::min(views[size_t(to[r])].capacity, cos.rows), "positions");
  py::array q = empty(first.dtype, qkv.rows, n_heads * hd);
  rope_kv_write({static_cast<const float*>(qkv.data), qkv.rows, qkv.ld, n_heads, first.n_kv, first.head_dim,
                 static_cast<const float*>(cos.data), static_cast<const float*>(sin.data), p, q.mutable_data(),
                 n_heads * hd, first.dtype, views.data(), to});
  return q;
}

// sequences: (first row, end row, keys, slab) each. means: per sequence None or [its rows, >= its keys], written.
py::array run_attention(const py::array& q_in, const std::vector<std::tuple<int64_t, int64_t, int64_t, const Slab*>>& s,
                        int n_heads, float scale, const std::vector<std::optional<py::array>>& means) {
  if (s.empty()) fail<UsageError>("attention: no sequence");
  if (!means.empty() && means.size() != s.size())
    fail<UsageError>("means: expected ", s.size(), ", got ", means.size());
  const KvSlab& first = std::get<3>(s[0])->view;
  if (n_heads < 1 || n_heads % first.n_kv) fail<UsageError>("n_heads = ", n_heads, " over n_kv = ", first.n_kv);
  const Matrix q = matrix_of(q_in, "q", first.dtype, int64_t(n_heads) * first.head_dim);
  std::vector<AttentionSequence> sequences;
  for (const auto& [begin, end, keys, slab] : s) {
    if (begin < 0 || end < begin || end > q.rows) fail<UsageError>("rows [", begin, ", ", end, ") of ", q.rows);
    if (keys < 1 || keys > slab->view.capacity) fail<UsageError>("keys = ", keys, " of ", slab->view.capacity);
    if (slab->view.n_kv != first.n_kv || slab->view.head_dim != first.head_dim || slab->view.dtype != first.dtype)
      fail<UsageError>("attention: slabs differ");
    sequences.push_back({begin, end, keys, slab->view});
    if (means.empty() || !means[sequences.size() - 1]) continue;
    const Matrix mean = matrix_of(*means[sequences.size() - 1], "mean", DType::F32, -1, true);
    if (mean.rows != end - begin || mean.cols < keys)
      fail<UsageError>("mean: [", mean.rows, ", ", mean.cols, "] for ", end - begin, " rows and ", keys, " keys");
    sequences.back().mean = static_cast<float*>(mean.data);
    sequences.back().ld_mean = mean.ld;
  }
  py::array out = empty(first.dtype, q.rows, q.cols);
  const AttentionArgs args{q.data,
                           q.ld,
                           first.dtype,
                           n_heads,
                           first.n_kv,
                           first.head_dim,
                           scale,
                           sequences.data(),
                           int64_t(sequences.size()),
                           out.mutable_data(),
                           q.cols};
  const py::gil_scoped_release release;
  attention(args);
  return out;
}

// mean: [layers, rows, >= n_keys]
py::array run_rollout(const py::array& mean, const py::array& rows_in, int64_t n_keys) {
  if (!py::isinstance<py::array_t<float>>(mean) || mean.ndim() != 3)
    fail<UsageError>("mean: expected float32 [l, r, k]");
  if (mean.shape(0) == 0) fail<UsageError>("mean: no layer");
  const Matrix layer = matrix_of(py::array(mean[py::int_(0)]), "mean", DType::F32, -1);
  if (mean.strides(0) < 0 || mean.strides(0) % mean.itemsize()) fail<UsageError>("mean: layers are not aligned");
  if (n_keys < 1 || n_keys > layer.cols) fail<UsageError>("n_keys = ", n_keys, " of ", layer.cols, " columns");
  const int32_t* rows = vector_of<int32_t>(rows_in, "rows", layer.rows);
  check_range(rows, layer.rows, n_keys, "rows");
  for (int64_t r = 1; r < layer.rows; ++r)
    if (rows[r] <= rows[r - 1]) fail<UsageError>("rows: must ascend");
  py::array_t<float> out(n_keys);
  rollout({static_cast<const float*>(layer.data), mean.strides(0) / mean.itemsize(), layer.ld, int(mean.shape(0)), rows,
           layer.rows, n_keys, out.mutable_data()});
  return out;
}

py::array run_value_similarity(const py::array& v_in, const py::array& positions, const Slab& slab) {
  const Matrix v = matrix_of(v_in, "v", DType::F32, int64_t(slab.view.n_kv) * slab.view.head_dim);
  const int32_t* p = vector_of<int32_t>(positions, "positions", v.rows);
  check_range(p, v.rows, slab.view.capacity, "positions");
  py::array_t<double> out(v.rows);
  const ValueSimilarityArgs args{static_cast<const float*>(v.data), v.rows, v.ld, p, slab.view, out.mutable_data()};
  const py::gil_scoped_release release;
  value_similarity(args);
  return out;
}

void run_write_values(const py::array& v_in, const py::array& positions, const Slab& slab) {
  const Matrix v = matrix_of(v_in, "v", DType::F32, int64_t(slab.view.n_kv) * slab.view.head_dim);
  const int32_t* p = distinct_rows(positions, "positions", v.rows, slab.view.capacity);
  const py::gil_scoped_release release;
  write_values({static_cast<const float*>(v.data), v.rows, v.ld, p, slab.view});
}

// kept: [positions, d], fp32 or bf16; changed. So is x.
void run_store_and_add(const py::array& y_in, const py::array& kept_in, const py::array& positions,
                       const py::array& x_in, const py::array& x_rows) {
  const Matrix y = matrix_of(y_in, "y", DType::F32, -1), kept = matrix(kept_in, "kept", y.cols, true);
  const Matrix x = matrix_of(x_in, "x", DType::F32, y.cols, true);
  const int32_t* p = distinct_rows(positions, "positions", y.rows, kept.rows);
  const int32_t* to = distinct_rows(x_rows, "x_rows", y.rows, x.rows);
  const py::gil_scoped_release release;
  store_and_add({static_cast<const float*>(y.data),
                 y.rows,
                 y.cols,
                 y.ld,
                 {kept.data, kept.ld, kept.dtype},
                 p,
                 static_cast<float*>(x.data),
                 x.ld,
                 to});
}

// x += a, then x += f, at x_rows.
void run_add_kept(const py::array& a_in, const py::array& f_in, const py::array& positions, const py::array& x_in,
                  const py::array& x_rows) {
  const Matrix x = matrix_of(x_in, "x", DType::F32, -1, true);
  const Matrix a = matrix(a_in, "a", x.cols), f = matrix(f_in, "f", x.cols);
  const int64_t n = length(positions);
  const int32_t* p = vector_of<int32_t>(positions, "positions", n);
  check_range(p, n, std::min(a.rows, f.rows), "positions");
  const int32_t* to = distinct_rows(x_rows, "x_rows", n, x.rows);
  const py::gil_scoped_release release;
  add_kept({{a.data, a.ld, a.dtype}, {f.data, f.ld, f.dtype}, n, x.cols, p, static_cast<float*>(x.data), x.ld, to});
}

// One array per field of RowStats.
py::dict to_dict(const std::vector<RowStats>& rows) {
  const auto column = [&](auto field) {
    using T = std::remove_reference_t<decltype(rows[0].*field)>;
    py::array_t<std::remove_const_t<T>> out{py::ssize_t(rows.size())};
    for (size_t r = 0; r < rows.size(); ++r) out.mutable_at(py::ssize_t(r)) = rows[r].*field;
    return out;
  };
  py::dict d;
  d["top1_id"] = column(&RowStats::top1_id);
  d["top2_id"] = column(&RowStats::top2_id);
  d["top1_logit"] = column(&RowStats::top1_logit);
  d["top2_logit"] = column(&RowStats::top2_logit);
  d["log_sum_exp"] = column(&RowStats::log_sum_exp);
  d["entropy"] = column(&RowStats::entropy);
  d["sampled_id"] = column(&RowStats::sampled_id);
  d["sampled_logit"] = column(&RowStats::sampled_logit);
  d["finite"] = column(&RowStats::finite);
  return d;
}

struct StatsInput {
  RowStatsParams params;
  std::vector<NoiseKey> keys;

  StatsInput(int64_t rows, int32_t mask_id, int32_t banned_id, float temperature, double noise_scale, uint64_t seed,
             uint32_t step, const std::optional<py::array>& positions)
      : params{mask_id, banned_id, temperature, noise_scale} {
    if (!(temperature > 0)) fail<UsageError>("temperature = ", temperature, " is not positive");
    if (!(noise_scale >= 0)) fail<UsageError>("noise_scale = ", noise_scale, " is negative");
    if (noise_scale > 0 && !positions) fail<UsageError>("noise needs positions");
    const int32_t* p = positions ? vector_of<int32_t>(*positions, "positions", rows) : nullptr;
    for (int64_t r = 0; r < rows; ++r) keys.push_back({seed, step, p ? uint32_t(p[r]) : 0});
  }
};

py::dict run_row_stats(const py::array& logits_in, int32_t mask_id, int32_t banned_id, float temperature,
                       double noise_scale, uint64_t seed, uint32_t step, const std::optional<py::array>& positions) {
  const Matrix logits = matrix_of(logits_in, "logits", DType::F32, -1);
  if (logits.cols == 0) fail<UsageError>("logits: no column");
  const StatsInput in(logits.rows, mask_id, banned_id, temperature, noise_scale, seed, step, positions);
  std::vector<RowStats> out(static_cast<size_t>(logits.rows));
  row_stats(static_cast<const float*>(logits.data), logits.rows, logits.cols, logits.ld, in.params, in.keys.data(),
            out.data());
  return to_dict(out);
}

py::dict run_lm_head_stats(const PackedLinear& head, const py::array& x_in, int32_t mask_id, int32_t banned_id,
                           float temperature, double noise_scale, uint64_t seed, uint32_t step,
                           const std::optional<py::array>& positions) {
  if (head.gate_up) fail<UsageError>("lm_head_stats: weights of gate and up");
  const Matrix x = input_of(head, x_in);
  const StatsInput in(x.rows, mask_id, banned_id, temperature, noise_scale, seed, step, positions);
  std::vector<RowStats> out(static_cast<size_t>(x.rows));
  Buffer scratch;
  lm_head_stats(head, x.data, x.dtype, x.rows, x.ld, in.params, in.keys.data(), out.data(), scratch);
  return to_dict(out);
}

py::array run_philox(uint64_t seed, uint32_t step, uint32_t position, const py::array_t<uint32_t>& token_ids,
                     const std::string& stream) {
  if (stream != "token" && stream != "selection") fail<UsageError>("stream = \"", stream, "\": token or selection");
  const NoiseStream s = stream == "token" ? NoiseStream::Token : NoiseStream::Selection;
  py::array_t<double> out(token_ids.size());
  for (py::ssize_t i = 0; i < token_ids.size(); ++i)
    out.mutable_at(i) = philox_uniform({seed, step, position}, token_ids.at(i), s);
  return out;
}

// What it costs to hand work to the other threads and to wait for them: seconds of parallel regions with nothing in them.
std::vector<double> fork_join_seconds(int64_t repeats) {
  const py::gil_scoped_release release;
  std::vector<double> seconds(size_t(std::max<int64_t>(0, repeats)), 0.0);
  for (double& s : seconds) {
    const Stopwatch watch(s);
    parallel_for(num_threads(), 1, [](int64_t, int64_t) {});
  }
  return seconds;
}

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<PackedLinear>(m, "PackedLinear", py::module_local())
      .def(py::init(&pack), py::arg("weights"), py::arg("format"), py::arg("bias") = py::none())
      .def_static(
          "gate_up",
          [](const py::object& gate, const py::object& up, const std::string& format) {
            return std::make_unique<PackedLinear>(pack_gate_up(source_of(gate), source_of(up), parse_format(format)));
          },
          py::arg("gate"), py::arg("up"), py::arg("format"))
      .def_readonly("n", &PackedLinear::n)
      .def_readonly("k", &PackedLinear::k)
      .def_property_readonly("format", [](const PackedLinear& w) { return name_of(w.format); })
      .def_property_readonly("bytes", &PackedLinear::bytes);
  py::class_<Slab>(m, "KvSlab", py::module_local())
      .def(py::init<int, int, int64_t, const std::string&>(), py::arg("n_kv"), py::arg("head_dim"),
           py::arg("positions"), py::arg("dtype"))
      .def("read", &Slab::read, py::arg("positions"))
      .def_property_readonly("capacity", [](const Slab& s) { return s.view.capacity; });

  m.def("linear", &run_linear, py::arg("w"), py::arg("x"), py::arg("out"), py::arg("epilogue") = "store",
        py::arg("out_rows") = py::none(), py::arg("panel_begin") = 0, py::arg("panel_end") = -1);
  m.def("embedding", &run_embedding, py::arg("table"), py::arg("tokens"));
  m.def("rms_norm", &run_rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out_dtype"),
        py::arg("rows_in") = py::none());
  m.def("rope_kv_write", &run_rope, py::arg("qkv"), py::arg("cos"), py::arg("sin"), py::arg("positions"),
        py::arg("slabs"), py::arg("row_to_slab"), py::arg("n_heads"));
  m.def("attention", &run_attention, py::arg("q"), py::arg("sequences"), py::arg("n_heads"), py::arg("scale"),
        py::arg("means") = std::vector<std::optional<py::array>>{});
  m.def("rollout", &run_rollout, py::arg("mean"), py::arg("rows"), py::arg("n_keys"));
  m.def("value_similarity", &run_value_similarity, py::arg("v"), py::arg("positions"), py::arg("slab"));
  m.def("write_values", &run_write_values, py::arg("v"), py::arg("positions"), py::arg("slab"));
  m.def("store_and_add", &run_store_and_add, py::arg("y"), py::arg("kept"), py::arg("positions"), py::arg("x"),
        py::arg("x_rows"));
  m.def("add_kept", &run_add_kept, py::arg("a"), py::arg("f"), py::arg("positions"), py::arg("x"), py::arg("x_rows"));
  m.def("row_stats", &run_row_stats, py::arg("logits"), py::arg("mask_id") = -1, py::arg("banned_id") = -1,
        py::arg("temperature") = 1.0f, py::arg("noise_scale") = 0.0, py::arg("seed") = 0, py::arg("step") = 0,
        py::arg("positions") = py::none());
  m.def("lm_head_stats", &run_lm_head_stats, py::arg("head"), py::arg("x"), py::arg("mask_id") = -1,
        py::arg("banned_id") = -1, py::arg("temperature") = 1.0f, py::arg("noise_scale") = 0.0, py::arg("seed") = 0,
        py::arg("step") = 0, py::arg("positions") = py::none());
  m.def("philox_uniform", &run_philox, py::arg("seed"), py::arg("step"), py::arg("position"), py::arg("token_ids"),
        py::arg("stream") = "token");
  m.def(
      "activation_stride",
      [](int64_t cols, const std::string& dtype) { return activation_stride(cols, parse_dtype(dtype)); },
      py::arg("cols"), py::arg("dtype"));
  m.def("fork_join_seconds", &fork_join_seconds, py::arg("repeats"));
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("current_isa", [] { return name_of(current_isa()); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.push_back(name_of(isa));
    return names;
  });
}
