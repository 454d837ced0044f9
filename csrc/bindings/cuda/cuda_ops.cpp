// dllm_ext._C.cuda.Ops: the kernels of ops/cuda on numpy arrays, for tests; the same in the module over the emulated
// device. Results go into arrays that the caller gives (bindings/cuda/call.h); their rows are the capacities, the rows of
// the inputs are the counts that lie in device memory. 16-bit arrays are uint16. What could make a kernel leave its arrays
// is checked here; the kernels trust their caller.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "bindings/cuda/arguments.h"
#include "bindings/cuda/call.h"
#include "ops/cuda/attention.h"
#include "ops/cuda/dense_linear.h"
#include "ops/cuda/elementwise.h"
#include "ops/cuda/features.h"
#include "ops/cuda/quant_linear.h"
#include "ops/cuda/rollout.h"
#include "ops/cuda/row_stats.h"

namespace py = pybind11;
using namespace dllm;
using namespace dllm::ops;
using namespace dllm::ops::cuda;

namespace {

// RowStats as numpy's structured dtype. By hand: PYBIND11_NUMPY_DTYPE cannot register it for two modules of a process.
py::dtype row_stats_dtype() {
  py::list names, formats, offsets;
  const RowStats r;
  const auto add = [&](const char* name, const auto& field) {
    names.append(name);
    formats.append(py::dtype::of<std::remove_const_t<std::remove_reference_t<decltype(field)>>>());
    offsets.append(reinterpret_cast<const char*>(&field) - reinterpret_cast<const char*>(&r));
  };
  add("top1_id", r.top1_id);
  add("top2_id", r.top2_id);
  add("top1_logit", r.top1_logit);
  add("top2_logit", r.top2_logit);
  add("log_sum_exp", r.log_sum_exp);
  add("entropy", r.entropy);
  add("sampled_id", r.sampled_id);
  add("sampled_logit", r.sampled_logit);
  add("finite", r.finite);
  return py::dtype(names, formats, offsets, sizeof(RowStats));
}

class Ops {
 public:
  std::string name() const { return device_->name(); }
  int repeats = 0;  // how often a launch is timed after its results are back
  double seconds = 0;  // of the last call's launches, if they were timed

  void embedding(const std::string& dtype, const Array& table, const Array& tokens, const Array& out) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const int32_t n = size(tokens), d = size(table, 1), capacity = size(out);
    check_capacity(n, capacity);
    const EmbeddingArgs args{call.in(t, table, "table", {-1, d}),
                             t,
                             call.in<int32_t>(tokens, "tokens", {n}),
                             call.count(n),
                             capacity,
                             d,
                             call.out<float>(out, "out", {capacity, d})};
    check_range(tokens, size(table), "tokens");
    run(call, [&] { cuda::embedding(stream(), args); });
  }

  void rms_norm(const std::string& dtype, const Array& x, const Array& weight, float eps, const Array& out,
                const std::optional<Array>& rows) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const int32_t n = rows ? size(*rows) : size(x), d = size(x, 1), capacity = size(out);
    check_capacity(n, capacity);
    const RmsNormArgs args{call.in<float>(x, "x", {-1, d}),
                           rows ? call.in<int32_t>(*rows, "rows", {n}) : nullptr,
                           call.count(n),
                           capacity,
                           d,
                           call.in<float>(weight, "weight", {d}),
                           eps,
                           call.out(t, out, "out", {capacity, d})};
    if (rows) check_range(*rows, size(x), "rows");
    run(call, [&] { cuda::rms_norm(stream(), t, args); });
  }

  void rope_kv_write(const std::string& dtype, const Array& qkv, const std::optional<Array>& bias, const Array& cos,
                     const Array& sin, const Array& positions, const Array& sequence, const Slabs& slabs,
                     const Array& q_out) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const KvSlabs kv(call, t, slabs, true);
    const int32_t hd = kv.head_dim, n = size(positions), capacity = size(q_out), n_heads = size(q_out, 1) / hd;
    const int32_t columns = (n_heads + 2 * kv.n_kv) * hd;
    kv.check_heads(n_heads);
    check_capacity(n, capacity);
    const RopeKvArgs args{call.in<float>(qkv, "qkv", {n, columns}),
                          bias ? call.in<float>(*bias, "bias", {columns}) : nullptr,
                          call.in<float>(cos, "cos", {-1, hd / 2}),
                          call.in<float>(sin, "sin", {size(cos), hd / 2}),
                          call.in<int32_t>(positions, "positions", {n}),
                          call.in<int32_t>(sequence, "sequence", {n}),
                          call.count(n),
                          capacity,
                          n_heads,
                          kv.n_kv,
                          hd,
                          kv.views,
                          call.out(t, q_out, "q_out", {capacity, n_heads * hd})};
    check_range(positions, size(cos), "positions");
    check_positions(positions, sequence, kv.capacity);
    run(call, [&] { cuda::rope_kv_write(stream(), t, args); });
  }

  void silu_mul(const std::string& dtype, const Array& gate_up, const Array& out) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const int32_t n = size(gate_up), capacity = size(out), m = size(out, 1);
    check_capacity(n, capacity);
    const SiluMulArgs args{call.in<float>(gate_up, "gate_up", {n, 2 * m}), call.count(n), capacity, m,
                           call.out(t, out, "out", {capacity, m})};
    run(call, [&] { cuda::silu_mul(stream(), t, args); });
  }

  // q and out may be wider than n_heads * head_dim; lse [rows of out, n_heads].
  void attention(const std::string& dtype, const Array& q, const Slabs& slabs, const Array& sequences, int32_t n_heads,
                 float scale, int32_t max_keys, const Array& out, const std::optional<Array>& lse) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const int32_t max_rows = size(out);
    AttentionArgs args = attention_args(call, t, q, slabs, sequences, n_heads, scale, max_rows, max_keys);
    args.ldo = size(out, 1);
    check_width(args, args.ldo, "out");
    args.out = call.out(t, out, "out", {max_rows, -1});
    if (lse) args.lse = call.out<float>(*lse, "lse", {max_rows, n_heads});
    args.scratch = call.scratch(attention_scratch_bytes(t, n_heads, args.head_dim, max_rows, max_keys));
    run(call, [&] { cuda::attention(stream(), t, args); });
  }

  void head_mean(const std::string& dtype, const Array& q, const Slabs& slabs, const Array& sequences, int32_t n_heads,
                 float scale, int32_t max_keys, const Array& lse, const Array& mean) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const int32_t max_rows = size(mean);
    HeadMeanArgs args{attention_args(call, t, q, slabs, sequences, n_heads, scale, max_rows, max_keys), nullptr,
                      size(mean, 1)};
    if (args.ld < max_keys) fail<UsageError>("mean: ", args.ld, " columns for ", max_keys, " keys");
    args.attention.lse = const_cast<float*>(call.in<float>(lse, "lse", {max_rows, n_heads}));
    args.mean = call.out<float>(mean, "mean", {max_rows, -1});
    run(call, [&] { cuda::head_mean(stream(), t, args); });
  }

  void store_and_add(const std::string& dtype, const Array& y, const Rows& rows, int32_t capacity,
                     const std::vector<Array>& slabs, const Array& x) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const int32_t d = size(x, 1);
    const FeatureSlabs to(call, t, slabs, d, true);
    const RowList list = row_list(call, rows, capacity, size(x), to.capacity);
    const StoreAndAddArgs args{call.in<float>(y, "y", {size(std::get<0>(rows)), d}), list, to.views, d,
                               call.out<float>(x, "x", {-1, d})};
    run(call, [&] { cuda::store_and_add(stream(), t, args); });
  }

  void add_kept(const std::string& dtype, const Rows& rows, int32_t capacity, const std::vector<Array>& attention,
                const std::vector<Array>& mlp, const Array& x) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const int32_t d = size(x, 1);
    const FeatureSlabs a(call, t, attention, d, false), f(call, t, mlp, d, false);
    if (a.capacity != f.capacity) fail<UsageError>("slabs of attention and mlp differ");
    const RowList list = row_list(call, rows, capacity, size(x), a.capacity);
    const AddKeptArgs args{list, a.views, f.views, d, call.out<float>(x, "x", {-1, d})};
    run(call, [&] { cuda::add_kept(stream(), t, args); });
  }

  void verify_values(const std::string& dtype, const Array& v, const std::optional<Array>& bias, const Rows& rows,
                     const Slabs& slabs, const Array& similarity) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const KvSlabs kv(call, t, slabs, true);
    const int32_t columns = kv.n_kv * kv.head_dim, capacity = size(similarity);
    const RowList list = row_list(call, rows, capacity, INT32_MAX, kv.capacity);
    const VerifyValuesArgs args{call.in<float>(v, "v", {size(std::get<0>(rows)), columns}),
                                bias ? call.in<float>(*bias, "bias", {columns}) : nullptr,
                                list,
                                kv.views,
                                kv.n_kv,
                                kv.head_dim,
                                call.out<double>(similarity, "similarity", {capacity})};
    run(call, [&] { cuda::verify_values(stream(), t, args); });
  }

  // plans [n, 3]: refresh_prompt, refresh_response, n_verify. verified: rows, and their sequences.
  void choose_rows(const Array& position, const Array& is_response, const Array& sequences, const Array& plans,
                   const std::pair<Array, Array>& verified, const Array& similarity, int32_t capacity,
                   const OutList& live, const OutList& resting) {
    static_assert(sizeof(LayerPlan) == 3 * sizeof(int32_t));
    Call call(*device_);
    const int32_t n = size(position), s = size(sequences), m = size(verified.first);
    check_capacity(n, capacity);
    ChooseRowsArgs args{};
    args.step.position = const_cast<int32_t*>(call.in<int32_t>(position, "position", {n}));
    args.step.sequences = const_cast<SequenceRows*>(sequence_rows(call, sequences, n, INT32_MAX));
    args.step.count = call.count(n);
    args.step.capacity = capacity;
    args.is_response = call.in<int32_t>(is_response, "is_response", {n});
    args.plans = reinterpret_cast<const LayerPlan*>(call.in<int32_t>(plans, "plans", {s, 3}));
    args.verified.row = const_cast<int32_t*>(call.in<int32_t>(verified.first, "verified", {m}));
    args.verified.sequences = const_cast<SequenceRows*>(sequence_rows(call, verified.second, m, INT32_MAX));
    args.verified.count = call.count(m);
    args.verified.capacity = m;
    if (size(verified.second) != s) fail<UsageError>("verified: of ", size(verified.second), " sequences, not ", s);
    const auto* step = static_cast<const SequenceRows*>(sequences.data());
    const auto* part = static_cast<const SequenceRows*>(verified.second.data());
    for (int32_t i = 0; i < s; ++i)
      for (int32_t j = part[i].begin; j < part[i].end; ++j)
        if (const int32_t row = static_cast<const int32_t*>(verified.first.data())[j];
            row < step[i].begin || row >= step[i].end)
          fail<UsageError>("verified[", j, "] = ", row, " is not of sequence ", i);
    args.similarity = call.in<double>(similarity, "similarity", {m});
    args.n_sequences = s;
    args.live = out_list(call, live, capacity, s);
    args.resting = out_list(call, resting, capacity, s);
    run(call, [&] { cuda::choose_rows(stream(), args); });
  }

  // Statistics of `capacity` rows, from tiles of the vocabulary, as a structured array; rows from the count on are
  // kUnwritten bytes.
  Array row_stats(const Array& logits, int32_t capacity, int32_t tile, int32_t mask_id, int32_t banned_id,
                  float temperature, double noise_scale, uint64_t seed, uint32_t step,
                  const std::optional<Array>& positions) {
    constexpr int kUnwritten = 0x5A;
    Call call(*device_);
    const int32_t n = size(logits), vocab = size(logits, 1);
    check_capacity(n, capacity);
    if (tile < 1 || vocab < 1) fail<UsageError>("tile = ", tile, " of ", vocab, " logits");
    if (noise_scale > 0 && (!positions || size(*positions) != n)) fail<UsageError>("noise needs positions");
    std::vector<NoiseKey> keys;
    if (positions) call.in<int32_t>(*positions, "positions", {n});
    for (int32_t r = 0; positions && r < n; ++r)
      keys.push_back({seed, step, uint32_t(static_cast<const int32_t*>(positions->data())[r])});
    std::vector<RowStatsState> states(static_cast<size_t>(capacity));
    std::memset(static_cast<void*>(states.data()), kUnwritten, states.size() * sizeof(RowStatsState));

    RowStatsArgs args{};
    const float* first = call.in<float>(logits, "logits", {n, vocab});
    args.ld = vocab;
    args.n_rows = call.count(n);
    args.capacity = capacity;
    args.params = {mask_id, banned_id, temperature, noise_scale};
    args.keys = call.values(keys, "keys");
    args.state = call.changed(states.data(), states.size(), "state");
    run(call, [&] {
      for (int32_t begin = 0; begin < vocab; begin += tile) {
        args.logits = first + begin;
        args.first_id = begin;
        args.n = std::min(tile, vocab - begin);
        args.first = begin == 0;
        args.last = begin + args.n == vocab;
        row_stats_tile(stream(), args);
      }
    });
    std::vector<RowStats> stats;
    for (const RowStatsState& state : states) stats.push_back(state.stats);
    return Array(row_stats_dtype(), {py::ssize_t(stats.size())}, stats.data());
  }

  // One layer. mean [rows, ld_mean]; c, out [n_sequences, ld].
  void rollout(const Array& mean, const Array& sequences, const Array& positions, int32_t max_keys,
               const std::optional<Array>& c, const Array& out) {
    Call call(*device_);
    const int32_t n = size(sequences), rows = size(mean), ld = size(out, 1);
    const RolloutArgs args{call.in<float>(mean, "mean", {rows, -1}),
                           size(mean, 1),
                           sequence_rows(call, sequences, rows, std::min({max_keys, size(mean, 1), ld})),
                           call.in<int32_t>(positions, "positions", {rows}),
                           n,
                           max_keys,
                           c ? call.in<float>(*c, "c", {n, ld}) : nullptr,
                           call.out<float>(out, "out", {n, ld}),
                           ld};
    check_range(positions, ld, "positions");
    run(call, [&] { cuda::rollout(stream(), args); });
  }

  // weight: (values, scales) as quantize() gives them.
  void quant_linear(const std::string& dtype, const std::pair<Array, Array>& weight, const Array& x, const Array& out,
                    bool accumulate, int64_t column_begin, int64_t column_end) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const auto& [values, scales] = weight;
    const bool i8 = values.dtype().equal(py::dtype::of<int8_t>());
    const WeightFormat format = i8 ? WeightFormat::I8 : WeightFormat::I4;
    const int64_t n = size(values), k = size(values, 1) * (i8 ? 1 : 2), end = column_end < 0 ? n : column_end;
    std::vector<char> packed(quant_bytes(format, n, k));
    if (scales.nbytes() != n * quantized_scale_bytes(format, k) || !(scales.flags() & Array::c_style) ||
        !(values.flags() & Array::c_style) || values.itemsize() != 1)
      fail<UsageError>("weight: scales do not belong to the values, or are not contiguous");
    quant_pack({values.data(), format, n, k, k, scales.data()}, packed.data());
    const int32_t count = size(x), capacity = size(out);
    check_capacity(count, capacity);
    if (size(out, 1) < end - column_begin) fail<UsageError>("out: ", size(out, 1), " columns");
    const QuantLinearArgs args{call.values(packed, "weights"),
                               format,
                               n,
                               k,
                               call.in(t, x, "x", {count, k}),
                               call.count(count),
                               call.out<float>(out, "out", {capacity, -1}),
                               size(out, 1),
                               accumulate,
                               capacity,
                               column_begin,
                               column_end};
    run(call, [&] { cuda::quant_linear(stream(), t, args); });
  }

  void dense_linear(const std::string& dtype, const Array& w, const Array& x, const Array& out, bool accumulate) {
    Call call(*device_);
    const DType t = parse_cuda_dtype(dtype);
    const int32_t n = size(w), k = size(w, 1), rows = size(x);
    if (size(out, 1) < n) fail<UsageError>("out: ", size(out, 1), " columns for ", n);
    const DenseLinearArgs args{call.in(t, w, "w", {n, k}),
                               call.in(t, x, "x", {rows, k}),
                               call.out<float>(out, "out", {rows, -1}),
                               n,
                               k,
                               rows,
                               size(out, 1),
                               accumulate};
    run(call, [&] { cuda::dense_linear(stream(), t, args); });
  }

 private:
  Stream stream() { return device_->stream(); }
  void run(Call& call, const std::function<void()>& launch) { seconds = call.run(launch, repeats); }

  static void check_width(const AttentionArgs& a, int32_t ld, const char* what) {
    if (ld < a.n_heads * a.head_dim || ld % 8)
      fail<UsageError>(what, ": ", ld, " columns for ", a.n_heads, " heads of ", a.head_dim);
  }

  AttentionArgs attention_args(Call& call, DType t, const Array& q, const Slabs& slabs, const Array& sequences,
                               int32_t n_heads, float scale, int32_t max_rows, int32_t max_keys) {
    const KvSlabs kv(call, t, slabs, false);
    kv.check_heads(n_heads);
    AttentionArgs a{};
    a.q = call.in(t, q, "q", {-1, -1});
    a.ldq = size(q, 1);
    a.sequences = sequence_rows(call, sequences, std::min(max_rows, size(q)), max_keys);
    kv.check_sequences(sequences);
    a.slabs = kv.views;
    a.n_sequences = kv.n, a.n_heads = n_heads, a.n_kv = kv.n_kv, a.head_dim = kv.head_dim;
    a.max_rows = max_rows, a.max_keys = max_keys;
    a.scale = scale;
    check_width(a, a.ldq, "q");
    return a;
  }

  std::unique_ptr<Device> device_ = make_cuda_device();
};

}  // namespace

void bind_cuda_ops(py::module_& m) {
  using py::arg;
  const auto none = py::none();
  py::class_<Ops>(m, "Ops", py::module_local())
      .def(py::init<>())
      .def_property_readonly("name", &Ops::name)
      .def_readwrite("repeats", &Ops::repeats)
      .def_readonly("seconds", &Ops::seconds)
      .def("embedding", &Ops::embedding, arg("dtype"), arg("table"), arg("tokens"), arg("out"))
      .def("rms_norm", &Ops::rms_norm, arg("dtype"), arg("x"), arg("weight"), arg("eps"), arg("out"),
           arg("rows") = none)
      .def("rope_kv_write", &Ops::rope_kv_write, arg("dtype"), arg("qkv"), arg("bias"), arg("cos"), arg("sin"),
           arg("positions"), arg("sequence"), arg("slabs"), arg("q_out"))
      .def("silu_mul", &Ops::silu_mul, arg("dtype"), arg("gate_up"), arg("out"))
      .def("attention", &Ops::attention, arg("dtype"), arg("q"), arg("slabs"), arg("sequences"), arg("n_heads"),
           arg("scale"), arg("max_keys"), arg("out"), arg("lse") = none)
      .def("head_mean", &Ops::head_mean, arg("dtype"), arg("q"), arg("slabs"), arg("sequences"), arg("n_heads"),
           arg("scale"), arg("max_keys"), arg("lse"), arg("mean"))
      .def("store_and_add", &Ops::store_and_add, arg("dtype"), arg("y"), arg("rows"), arg("capacity"), arg("slabs"),
           arg("x"))
      .def("add_kept", &Ops::add_kept, arg("dtype"), arg("rows"), arg("capacity"), arg("attention"), arg("mlp"),
           arg("x"))
      .def("verify_values", &Ops::verify_values, arg("dtype"), arg("v"), arg("bias"), arg("rows"), arg("slabs"),
           arg("similarity"))
      .def("choose_rows", &Ops::choose_rows, arg("position"), arg("is_response"), arg("sequences"), arg("plans"),
           arg("verified"), arg("similarity"), arg("capacity"), arg("live"), arg("resting"))
      .def("row_stats", &Ops::row_stats, arg("logits"), arg("capacity"), arg("tile"), arg("mask_id") = -1,
           arg("banned_id") = -1, arg("temperature") = 1.0f, arg("noise_scale") = 0.0, arg("seed") = 0, arg("step") = 0,
           arg("positions") = none)
      .def("rollout", &Ops::rollout, arg("mean"), arg("sequences"), arg("positions"), arg("max_keys"), arg("c"),
           arg("out"))
      .def("quant_linear", &Ops::quant_linear, arg("dtype"), arg("weight"), arg("x"), arg("out"),
           arg("accumulate") = false, arg("column_begin") = 0, arg("column_end") = -1)
      .def("dense_linear", &Ops::dense_linear, arg("dtype"), arg("w"), arg("x"), arg("out"), arg("accumulate") = false);
}
