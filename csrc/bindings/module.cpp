// dllm_ext._C: the engine for Python. Weights are read natively; arguments are token ids; the GIL is released while the
// engine loads and generates.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/convert.h"
#include "bindings/interrupt.h"
#include "engine/engine.h"
#include "runtime/error.h"
#include "runtime/isa.h"
#include "runtime/parallel.h"

namespace py = pybind11;
using namespace dllm;

void bind_ops(py::module_& m);  // ops.cpp
void bind_quantize(py::module_& m);  // quantize.cpp
void bind_decode(py::module_& m);  // decode.cpp
void bind_measure(py::module_& m);  // measure.cpp
#ifdef DLLM_CUDA_OPS
void bind_cuda_ops(py::module_& m);  // cuda/cuda_ops.cpp
#endif
#ifdef DLLM_EMULATED
void bind_emulator(py::module_& m);  // cuda_emulator/bindings/emulator.cpp
#endif

namespace {

// Text that may quote a stranger's bytes: what is not UTF-8 is replaced.
py::object lenient_text(std::string_view text) {
  return py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(text.data(), Py_ssize_t(text.size()), "replace"));
}

// C++ exceptions become the classes of dllm_ext/errors.py.
void translate(std::exception_ptr p) {
  auto raise = [](const char* cls, const std::exception& e) {
    const py::object type = py::module_::import("dllm_ext.errors").attr(cls);
    PyErr_SetObject(type.ptr(), lenient_text(e.what()).ptr());
  };
  try {
    if (p) std::rethrow_exception(p);
  } catch (const ConfigError& e) {
    raise("ConfigError", e);
  } catch (const InputError& e) {
    raise("InputError", e);
  } catch (const CheckpointError& e) {
    raise("CheckpointError", e);
  } catch (const NumericalError& e) {
    raise("NumericalError", e);
  } catch (const OutOfMemoryError& e) {
    raise("OutOfMemoryError", e);
  } catch (const Interrupted& e) {
    raise("Interrupted", e);
  } catch (const UsageError& e) {
    raise("UsageError", e);
  } catch (const std::bad_alloc& e) {
    raise("OutOfMemoryError", e);
  }
}

DType dtype_from_name(const std::string& name) {
  if (name == "float32") return DType::F32;
  if (name == "bfloat16") return DType::BF16;
  if (name == "float16") return DType::F16;
  fail<ConfigError>("dtype = \"", name,
                    "\" is not supported (there are: \"float32\", \"bfloat16\", and on CUDA \"float16\")");
}

Quantization quantization_from_name(const std::optional<std::string>& name) {
  if (!name) return Quantization::None;
  for (const Quantization q : {Quantization::Int8, Quantization::Int4})
    if (*name == name_of(q)) return q;
  fail<ConfigError>("quantization = \"", *name, "\" is not supported (there are: None, \"int8\", \"int4\")");
}

std::unique_ptr<Engine> load_engine(const std::string& folder, const std::string& dtype,
                                    const std::optional<std::string>& quantization, const py::object& progress,
                                    const std::string& device) {
  LoadProgress report;
  if (!progress.is_none())
    report = [&](size_t done, size_t total) {
      const py::gil_scoped_acquire gil;
      progress(done, total);
    };
  const DType t = dtype_from_name(dtype);
  const Quantization q = quantization_from_name(quantization);
  const py::gil_scoped_release release;
  return std::make_unique<Engine>(folder, t, q, report, device);
}

std::vector<Result> generate(Engine& engine, const std::vector<std::vector<int32_t>>& prompts, bool infill,
                             const py::dict& config_fields, int64_t batch_size, const py::object& on_step) {
  const GenerationConfig config = config_from_dict(config_fields);
  GenerateOptions options;
  options.infill = infill;
  options.batch_size = batch_size;
  if (!on_step.is_none())
    options.on_step = [&](const StepEvent& e) {
      const py::gil_scoped_acquire gil;
      return !on_step(e).is(py::bool_(false));
    };
  const InterruptGuard guard;
  options.interrupt = guard.flag();
  try {
    const py::gil_scoped_release release;
    return engine.generate(prompts, config, options);
  } catch (const Interrupted&) {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // KeyboardInterrupt, or what the handler raises
    throw;
  }
}

// One per-step counter of a result as a list.
template <class T>
std::vector<T> column(const Result& r, T StepStats::* member) {
  std::vector<T> out;
  for (const StepStats& s : r.steps) out.push_back(s.*member);
  return out;
}

py::dict stats_dict(const Result& r) {
  py::dict d;
  d["rows"] = column(r, &StepStats::rows);
  d["layer_rows"] = column(r, &StepStats::layer_rows);
  d["verify_rows"] = column(r, &StepStats::verify_rows);
  d["logit_rows"] = column(r, &StepStats::logit_rows);
  d["attention_pairs"] = column(r, &StepStats::attention_pairs);
  d["weight_bytes"] = column(r, &StepStats::weight_bytes);
  d["commits"] = column(r, &StepStats::commits);
  d["buffer_bytes"] = column(r, &StepStats::buffer_bytes);
  d["seconds"] = column(r, &StepStats::seconds);
  d["selection_seconds"] = column(r, &StepStats::selection_seconds);
  d["seconds_total"] = r.seconds_total;
  d["seconds_first_block"] = r.seconds_first_block;
  return d;
}

py::dict info() {
  py::dict d;
  d["isa"] = name_of(current_isa());
  std::vector<std::string> names;
  for (Isa i : available_isas()) names.push_back(name_of(i));
  d["isas"] = names;
  d["threads"] = num_threads();
  return d;
}

void bind_spec(py::module_& m) {
  py::class_<ModelSpec>(m, "ModelSpec", py::module_local())
      .def_static(
          "from_config", [](const std::string& text) { return ModelSpec::from_config(text, "config.json"); },
          py::arg("json_text"))
      .def_property_readonly("family", [](const ModelSpec& s) { return name_of(s.family); })
      .def_readonly("vocab_size", &ModelSpec::vocab_size)
      .def_readonly("d_model", &ModelSpec::d_model)
      .def_readonly("n_layers", &ModelSpec::n_layers)
      .def_readonly("n_heads", &ModelSpec::n_heads)
      .def_readonly("n_kv_heads", &ModelSpec::n_kv_heads)
      .def_readonly("head_dim", &ModelSpec::head_dim)
      .def_readonly("mlp_hidden", &ModelSpec::mlp_hidden)
      .def_readonly("max_positions", &ModelSpec::max_positions)
      .def_readonly("norm_eps", &ModelSpec::norm_eps)
      .def_readonly("rope_theta", &ModelSpec::rope_theta)
      .def_readonly("rope_full_precision", &ModelSpec::rope_full_precision)
      .def_readonly("qkv_bias", &ModelSpec::qkv_bias)
      .def_readonly("tied_head", &ModelSpec::tied_head)
      .def_property_readonly("logit_shift", [](const ModelSpec& s) { return s.logit_shift != 0; })
      .def_readonly("mask_id", &ModelSpec::mask_id)
      .def_readonly("eos_id", &ModelSpec::eos_id)
      .def_readonly("stop_ids", &ModelSpec::stop_ids)
      .def("tensors", [](const ModelSpec& s) {
        std::vector<std::pair<std::string, std::vector<int64_t>>> out;
        for (const TensorSlot& t : tensors_of(s)) out.emplace_back(t.name, t.shape);
        return out;
      });
}

void bind_engine(py::module_& m) {
  py::class_<StepEvent>(m, "StepEvent", py::module_local())
      .def_readonly("sequence", &StepEvent::sequence)
      .def_readonly("step", &StepEvent::step)
      .def_readonly("block", &StepEvent::block)
      .def_readonly("positions", &StepEvent::positions)
      .def_readonly("token_ids", &StepEvent::token_ids)
      .def_readonly("confidences", &StepEvent::confidences)
      .def_readonly("computed", &StepEvent::computed)
      .def_readonly("rows", &StepEvent::rows)
      .def_readonly("is_full", &StepEvent::is_full);
  py::class_<Result>(m, "Result", py::module_local())
      .def_readonly("token_ids", &Result::token_ids)
      .def_readonly("prompt_ids", &Result::prompt_ids)
      .def_readonly("commit_steps", &Result::commit_steps)
      .def_readonly("nfe", &Result::nfe)
      .def_property_readonly("stats", stats_dict);
  py::class_<Engine>(m, "Engine", py::module_local())
      .def(py::init(&load_engine), py::arg("folder"), py::arg("dtype"), py::arg("quantization") = py::none(),
           py::arg("progress") = py::none(), py::arg("device") = "cpu")
      .def_property_readonly("device", [](Engine& e) { return e.model().device().name(); })
      .def_property_readonly("quantization",
                             [](Engine& e) -> std::optional<std::string> {
                               const Quantization q = e.model().info().quantization;
                               if (q == Quantization::None) return std::nullopt;
                               return name_of(q);
                             })
      .def_property_readonly("spec", &Engine::spec, py::return_value_policy::reference_internal)
      .def_property_readonly("dtype", [](Engine& e) { return name_of(e.model().info().dtype); })
      .def_property_readonly("weight_bytes", [](Engine& e) { return e.model().info().resident_bytes; })
      .def_property_readonly("unused_tensors",
                             [](Engine& e) {
                               py::list names;
                               for (const std::string& n : e.model().info().unused_tensors)
                                 names.append(lenient_text(n));
                               return names;
                             })
      .def("generate", &generate, py::arg("prompts"), py::arg("infill"), py::arg("config"), py::arg("batch_size"),
           py::arg("on_step") = py::none())
      .def("log_probs", &Engine::log_probs, py::arg("sequences"), py::arg("hidden"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace

// The same module is built once more over the emulated device (_C_emulated).
#ifndef DLLM_MODULE
#define DLLM_MODULE _C
#endif

PYBIND11_MODULE(DLLM_MODULE, m) {
  py::register_exception_translator(&translate);
  bind_spec(m);
  bind_engine(m);
  bind_quantize(m);
  m.def("info", &info);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def(
      "validate_config",
      [](const py::dict& fields) {
        const GenerationConfig c = config_from_dict(fields);
        c.validate();
        return config_to_dict(c);
      },
      py::arg("config"));
  py::module_ ops =
      m.def_submodule("ops", "Single kernels on numpy arrays and single steps, for tests and measurements.");
  bind_ops(ops);
  bind_measure(ops);
  py::module_ decode = m.def_submodule("decode", "Schedules, transfer rules and bitmaps, for tests.");
  bind_decode(decode);
#ifdef DLLM_CUDA_OPS
  py::module_ cuda = m.def_submodule("cuda", "Single kernels of the CUDA device on numpy arrays, for tests.");
  bind_cuda_ops(cuda);
#endif
#ifdef DLLM_EMULATED
  py::module_ emulator = m.def_submodule("emulator", "Settings and counters of the emulated device.");
  bind_emulator(emulator);
#endif
}
