// dllm_ext._C.ops: single kernels on numpy arrays, for tests and measurements. bf16 arrays are uint16. Shapes and dtypes
// are checked here; the kernels themselves trust their caller.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "ops/attention.h"
#include "ops/elementwise.h"
#include "ops/linear.h"
#include "ops/philox.h"
#include "ops/row_stats.h"
#include "runtime/error.h"
#include "runtime/isa.h"
#include "runtime/parallel.h"

namespace py = pybind11;
using namespace dllm;
using namespace dllm::ops;

namespace {

DType parse_dtype(const std::string& name) {
  if (name == name_of(DType::F32)) return DType::F32;
  if (name == name_of(DType::BF16)) return DType::BF16;
  fail<UsageError>("dtype = \"", name, "\": float32 or bfloat16");
}

// An array of fp32, or bf16 as uint16, whose last dimension is contiguous.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, cols, ld;
};

void check_contiguous_rows(const py::array& a, const char* what) {
  if (a.ndim() != 2) fail<UsageError>(what, ": expected 2 dimensions, got ", a.ndim());
  if (a.shape(1) > 1 && a.strides(1) != a.itemsize()) fail<UsageError>(what, ": elements of a row must be adjacent");
  if (a.shape(0) > 1 && (a.strides(0) < a.shape(1) * a.itemsize() || a.strides(0) % a.itemsize() != 0))
    fail<UsageError>(what, ": rows overlap or are not aligned");
}

Matrix matrix(const py::array& a, const char* what, int64_t cols = -1, bool writeable = false) {
  check_contiguous_rows(a, what);
  DType dtype;
  if (py::isinstance<py::array_t<float>>(a))
    dtype = DType::F32;
  else if (py::isinstance<py::array_t<uint16_t>>(a))
    dtype = DType::BF16;
  else
    fail<UsageError>(what, ": expected float32, or uint16 holding bfloat16");
  if (cols >= 0 && a.shape(1) != cols) fail<UsageError>(what, ": expected ", cols, " columns, got ", a.shape(1));
  if (writeable && !a.writeable()) fail<UsageError>(what, ": is read-only");
  const int64_t ld = a.shape(0) > 1 ? a.strides(0) / a.itemsize() : a.shape(1);
  return {const_cast<void*>(a.data()), dtype, a.shape(0), a.shape(1), ld};
}

Matrix matrix_of(const py::array& a, const char* what, DType dtype, int64_t cols, bool writeable = false) {
  const Matrix m = matrix(a, what, cols, writeable);
  if (m.dtype != dtype) fail<UsageError>(what, ": expected ", name_of(dtype), ", got ", name_of(m.dtype));
  return m;
}

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

py::array empty(DType dtype, int64_t rows, int64_t cols) {
  if (dtype == DType::F32) return py::array_t<float>({rows, cols});
  return py::array_t<uint16_t>({rows, cols});
}

WeightSource source_of(const py::array& a) {
  const Matrix m = matrix(a, "weight");
  if (m.rows == 0 || m.cols == 0) fail<UsageError>("weight: is empty");
  return {m.data, m.dtype, m.rows, m.cols, m.ld};
}

std::unique_ptr<PackedLinear> pack(const std::vector<py::array>& weights, const std::string& dtype,
                                   const std::optional<py::array>& bias) {
  std::vector<WeightSource> sources;
  for (const py::array& w : weights) sources.push_back(source_of(w));
  auto packed = std::make_unique<PackedLinear>(pack_linear(sources.data(), int(sources.size()), parse_dtype(dtype)));
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

void run_linear(const PackedLinear& w, const py::array& x_in, const py::array& out_in, const std::string& epilogue) {
  const Epilogue e = parse_epilogue(epilogue, w);
  const Matrix x = matrix_of(x_in, "x", w.dtype, w.k);
  const Matrix out = matrix(out_in, "out", e == Epilogue::SiluMul ? w.n / 2 : w.n, true);
  if (out.rows != x.rows) fail<UsageError>("out: expected ", x.rows, " rows, got ", out.rows);
  if (e == Epilogue::AddTo && out.dtype != DType::F32) fail<UsageError>("out: \"add\" accumulates in float32");
  const py::gil_scoped_release release;
  linear({&w, x.data, x.rows, x.ld, out.data, out.ld, out.dtype, e});
}

py::array run_embedding(const py::array& table_in, const py::array& tokens) {
  const Matrix table = matrix(table_in, "table");
  if (table.ld != table.cols) fail<UsageError>("table: must be contiguous");
  const int64_t rows = tokens.ndim() == 1 ? tokens.shape(0) : 0;
  const int32_t* ids = vector_of<int32_t>(tokens, "tokens", rows);
  check_range(ids, rows, table.rows, "tokens");
  py::array_t<float> out({rows, table.cols});
  embedding({table.data, table.dtype, ids, rows, table.cols, out.mutable_data(), table.cols});
  return out;
}

py::array run_rms_norm(const py::array& x_in, const py::array& weight, float eps, const std::string& dtype) {
  const Matrix x = matrix_of(x_in, "x", DType::F32, -1);
  const float* w = vector_of<float>(weight, "weight", x.cols);
  const DType out_dtype = parse_dtype(dtype);
  py::array out = empty(out_dtype, x.rows, x.cols);
  rms_norm({static_cast<const float*>(x.data), x.rows, x.cols, x.ld, w, eps, out.mutable_data(), x.cols, out_dtype});
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
    const int64_t n = positions.ndim() == 1 ? positions.shape(0) : 0;
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

// sequences: (first row, end row, keys, slab) each.
py::array run_attention(const py::array& q_in, const std::vector<std::tuple<int64_t, int64_t, int64_t, const Slab*>>& s,
                        int n_heads, float scale) {
  if (s.empty()) fail<UsageError>("attention: no sequence");
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
  const Matrix x = matrix_of(x_in, "x", head.dtype, head.k);
  const StatsInput in(x.rows, mask_id, banned_id, temperature, noise_scale, seed, step, positions);
  std::vector<RowStats> out(static_cast<size_t>(x.rows));
  Buffer scratch;
  lm_head_stats(head, x.data, x.rows, x.ld, in.params, in.keys.data(), out.data(), scratch);
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

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<PackedLinear>(m, "PackedLinear")
      .def(py::init(&pack), py::arg("weights"), py::arg("dtype"), py::arg("bias") = py::none())
      .def_static(
          "gate_up",
          [](const py::array& gate, const py::array& up, const std::string& dtype) {
            return std::make_unique<PackedLinear>(pack_gate_up(source_of(gate), source_of(up), parse_dtype(dtype)));
          },
          py::arg("gate"), py::arg("up"), py::arg("dtype"))
      .def_readonly("n", &PackedLinear::n)
      .def_readonly("k", &PackedLinear::k)
      .def_property_readonly("dtype", [](const PackedLinear& w) { return name_of(w.dtype); });
  py::class_<Slab>(m, "KvSlab")
      .def(py::init<int, int, int64_t, const std::string&>(), py::arg("n_kv"), py::arg("head_dim"),
           py::arg("positions"), py::arg("dtype"))
      .def("read", &Slab::read, py::arg("positions"))
      .def_property_readonly("capacity", [](const Slab& s) { return s.view.capacity; });

  m.def("linear", &run_linear, py::arg("w"), py::arg("x"), py::arg("out"), py::arg("epilogue") = "store");
  m.def("embedding", &run_embedding, py::arg("table"), py::arg("tokens"));
  m.def("rms_norm", &run_rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out_dtype"));
  m.def("rope_kv_write", &run_rope, py::arg("qkv"), py::arg("cos"), py::arg("sin"), py::arg("positions"),
        py::arg("slabs"), py::arg("row_to_slab"), py::arg("n_heads"));
  m.def("attention", &run_attention, py::arg("q"), py::arg("sequences"), py::arg("n_heads"), py::arg("scale"));
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
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("current_isa", [] { return name_of(current_isa()); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.push_back(name_of(isa));
    return names;
  });
}
