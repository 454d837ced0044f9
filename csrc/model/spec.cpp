#include "model/spec.h"

#include <algorithm>
#include <array>
#include <limits>

#include "ops/quantize.h"
#include "runtime/error.h"
#include "runtime/json.h"

namespace dllm {

namespace {

// Keys and naming that differ between the families.
struct FamilyTable {
  Family family;
  const char* model_type;
  const char *d_model, *layers, *heads, *kv_heads, *mlp, *positions, *vocab, *tied;
  const char *embedding, *final_norm, *head, *layer_prefix;
  std::array<const char*, 9> layer;  // in the order of LayerNames
  bool rope_full_precision;          // unless config.json says otherwise
  int logit_shift;
  // The released tokenizer: ids that config.json leaves out, valid for this vocabulary size only.
  int64_t released_vocab;
  int32_t mask_id, end_of_turn_id;
};

constexpr FamilyTable kFamilies[] = {
    {Family::LLaDA,
     "llada",
     "d_model",
     "n_layers",
     "n_heads",
     "n_kv_heads",
     "mlp_hidden_size",
     "max_sequence_length",
     "embedding_size",
     "weight_tying",
     "model.transformer.wte",
     "model.transformer.ln_f",
     "model.transformer.ff_out",
     "model.transformer.blocks.",
     {"attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"},
     true,
     0,
     126464,
     126336,
     126348},
    {Family::Dream,
     "Dream",
     "hidden_size",
     "num_hidden_layers",
     "num_attention_heads",
     "num_key_value_heads",
     "intermediate_size",
     "max_position_embeddings",
     "vocab_size",
     "tie_word_embeddings",
     "model.embed_tokens",
     "model.norm",
     "lm_head",
     "model.layers.",
     {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
      "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
     false,
     1,
     152064,
     151666,
     151645},
};

const FamilyTable& table_of(Family f) { return kFamilies[int(f)]; }

class ConfigReader {
 public:
  ConfigReader(const Json& json, const std::string& source) : json_(json), source_(source) {}

  const Json* get(const char* key) const {
    const Json* v = json_.find(key);
    return v && !v->is_null() ? v : nullptr;
  }
  std::string label(const char* key) const { return source_ + ": " + key; }

  int64_t integer(const char* key, int64_t low, int64_t high) const {
    const Json* v = get(key);
    if (!v) fail<CheckpointError>(label(key), " is missing");
    return in_range(key, v->as_integer(label(key)), low, high);
  }
  int64_t integer_or(const char* key, int64_t fallback, int64_t low, int64_t high) const {
    return get(key) ? integer(key, low, high) : fallback;
  }
  double positive_or(const char* key, double fallback) const {
    const Json* v = get(key);
    const double d = v ? v->as_number(label(key)) : fallback;
    if (!(d > 0 && d < 1e30)) fail<CheckpointError>(label(key), " = ", d, " must be a positive number");
    return d;
  }
  bool flag_or(const char* key, bool fallback) const {
    const Json* v = get(key);
    return v ? v->as_bool(label(key)) : fallback;
  }
  // The engine has one way to do this; a checkpoint that wants another is refused rather than run wrongly.
  void require_flag(const char* key, bool wanted) const {
    if (flag_or(key, wanted) != wanted)
      fail<CheckpointError>(label(key), " = ", wanted ? "false" : "true", " is not supported (only ",
                            wanted ? "true" : "false", ")");
  }
  void require_string(const char* key, const char* wanted) const {
    const Json* v = get(key);
    if (v && v->as_string(label(key)) != wanted)
      fail<CheckpointError>(label(key), " = \"", v->as_string(label(key)), "\" is not supported (only \"", wanted,
                            "\")");
  }
  void require_absent(const char* key, const char* why) const {
    if (get(key)) fail<CheckpointError>(label(key), " is set: ", why);
  }

  int64_t in_range(const char* key, int64_t v, int64_t low, int64_t high) const {
    if (v < low || v > high) fail<CheckpointError>(label(key), " = ", v, " must be between ", low, " and ", high);
    return v;
  }

 private:
  const Json& json_;
  const std::string& source_;
};

void check_llada(const ConfigReader& c) {
  for (const char* key : {"alibi", "attention_layer_norm", "input_emb_norm", "scale_logits", "include_bias",
                          "bias_for_layer_norm", "multi_query_attention"})
    c.require_flag(key, false);
  for (const char* key : {"rope", "layer_norm_with_affine"}) c.require_flag(key, true);
  c.require_string("activation_type", "silu");
  c.require_string("block_type", "llama");
  c.require_string("layer_norm_type", "rms");
  c.integer_or("block_group_size", 1, 1, 1);
}

void check_dream(const ConfigReader& c) {
  c.require_flag("use_sliding_window", false);
  c.require_flag("use_mrope", false);
  c.require_string("hidden_act", "silu");
  c.require_absent("rope_scaling", "scaled rotary embeddings are not supported");
}

const FamilyTable& family_from(const ConfigReader& c, const std::string& source) {
  const Json* type = c.get("model_type");
  if (!type) fail<CheckpointError>(source, ": model_type is missing (supported: llada, Dream)");
  const std::string& name = type->as_string(c.label("model_type"));
  c.require_absent("num_experts", "mixture-of-experts models are not supported");
  for (const FamilyTable& f : kFamilies)
    if (name == f.model_type) return f;
  fail<CheckpointError>(source, ": model_type = \"", name, "\" is not supported (supported: llada, Dream)");
}

// What `dllm quantize` writes. Other methods' checkpoints hold tensors that mean something else.
Quantization stored_quantization(const ConfigReader& c, const std::string& source) {
  const Json* config = c.get("quantization_config");
  if (!config) return Quantization::None;
  const std::string what = source + ": quantization_config";
  config->as_object(what);
  const Json *method = config->find("quant_method"), *format = config->find("format");
  if (!method || method->kind() != Json::Kind::String || method->as_string(what) != "dllm")
    fail<CheckpointError>(what, ": only quant_method \"dllm\" (made by `dllm quantize`) is supported");
  if (!format) fail<CheckpointError>(what, ": format is missing");
  for (const Quantization q : {Quantization::Int8, Quantization::Int4})
    if (format->as_string(what + ": format") == name_of(q)) return q;
  fail<CheckpointError>(what, ": format = \"", format->as_string(what), "\" is not supported (supported: int8, int4)");
}

// eos_token_id may be a number or a list; the first is what fills the tail, all of them stop.
void read_special_ids(const ConfigReader& c, const FamilyTable& f, ModelSpec& s) {
  const int64_t last = s.vocab_size - 1;
  const bool released = s.vocab_size == f.released_vocab;
  if (c.get("mask_token_id") || !released)
    s.mask_id = int32_t(c.integer("mask_token_id", 0, last));
  else
    s.mask_id = f.mask_id;

  const Json* eos = c.get("eos_token_id");
  if (!eos) fail<CheckpointError>(c.label("eos_token_id"), " is missing");
  auto add = [&](int64_t id) {
    id = c.in_range("eos_token_id", id, 0, last);
    if (std::find(s.stop_ids.begin(), s.stop_ids.end(), id) == s.stop_ids.end()) s.stop_ids.push_back(int32_t(id));
  };
  if (eos->kind() == Json::Kind::Array) {
    for (const Json& e : eos->as_array("")) add(e.as_integer(c.label("eos_token_id")));
    if (s.stop_ids.empty()) fail<CheckpointError>(c.label("eos_token_id"), " is an empty list");
  } else {
    add(eos->as_integer(c.label("eos_token_id")));
  }
  s.eos_id = s.stop_ids[0];
  if (released) add(f.end_of_turn_id);
  if (std::find(s.stop_ids.begin(), s.stop_ids.end(), s.mask_id) != s.stop_ids.end())
    fail<CheckpointError>(c.label("mask_token_id"), " = ", s.mask_id, " is also an end-of-text id");
}

}  // namespace

const char* name_of(Family f) { return f == Family::LLaDA ? "llada" : "dream"; }

const char* name_of(Quantization q) {
  switch (q) {
    case Quantization::None:
      return "none";
    case Quantization::Int8:
      return "int8";
    case Quantization::Int4:
      return "int4";
  }
  return "unknown";
}

Quantization head_quantization(Quantization q) { return q == Quantization::None ? q : Quantization::Int8; }

ModelSpec ModelSpec::from_config(const std::string& json_text, const std::string& source) {
  const Json json = Json::parse(json_text, source);
  json.as_object(source);
  const ConfigReader c(json, source);
  const FamilyTable& f = family_from(c, source);
  if (f.family == Family::LLaDA)
    check_llada(c);
  else
    check_dream(c);

  ModelSpec s;
  s.family = f.family;
  s.d_model = int(c.integer(f.d_model, 1, 1 << 20));
  s.n_layers = int(c.integer(f.layers, 1, 4096));
  s.n_heads = int(c.integer(f.heads, 1, 4096));
  s.n_kv_heads = int(c.integer_or(f.kv_heads, s.n_heads, 1, s.n_heads));
  if (s.n_heads % s.n_kv_heads)
    fail<CheckpointError>(c.label(f.kv_heads), " = ", s.n_kv_heads, " does not divide ", f.heads, " = ", s.n_heads);
  if (!c.get("head_dim") && s.d_model % s.n_heads)
    fail<CheckpointError>(c.label(f.d_model), " = ", s.d_model, " is not a multiple of ", f.heads, " = ", s.n_heads);
  s.head_dim = int(c.integer_or("head_dim", s.d_model / s.n_heads, 2, 1024));
  if (s.head_dim % 2) fail<CheckpointError>(source, ": head_dim = ", s.head_dim, " must be even (rotary halves)");
  const int64_t mlp_ratio = c.integer_or("mlp_ratio", 4, 1, 1024);
  s.mlp_hidden = int(c.integer_or(f.mlp, mlp_ratio * s.d_model, 1, 1 << 24));
  s.max_positions = c.integer(f.positions, 1, int64_t(1) << 24);
  const int64_t vocab = c.integer("vocab_size", 2, std::numeric_limits<int32_t>::max());
  s.vocab_size = c.integer_or(f.vocab, vocab, vocab, std::numeric_limits<int32_t>::max());
  s.norm_eps = float(c.positive_or("rms_norm_eps", 1e-5));
  s.rope_theta = float(c.positive_or("rope_theta", 10000.0));
  s.rope_full_precision = c.flag_or("rope_full_precision", f.rope_full_precision);
  s.qkv_bias = f.family == Family::Dream ? true : c.flag_or("include_qkv_bias", false);
  s.tied_head = c.flag_or(f.tied, false);
  s.logit_shift = f.logit_shift;
  s.stored = stored_quantization(c, source);
  read_special_ids(c, f, s);
  return s;
}

ModelNames names_of(const ModelSpec& spec) {
  const FamilyTable& f = table_of(spec.family);
  ModelNames names{f.embedding, f.final_norm, f.head, {}};
  for (int l = 0; l < spec.n_layers; ++l) {
    const std::string p = f.layer_prefix + std::to_string(l) + ".";
    const auto& n = f.layer;
    names.layers.push_back({p + n[0], p + n[1], p + n[2], p + n[3], p + n[4], p + n[5], p + n[6], p + n[7], p + n[8]});
  }
  return names;
}

std::vector<TensorSlot> tensors_of(const ModelSpec& s) {
  const ModelNames names = names_of(s);
  const int64_t d = s.d_model, q = s.q_columns(), kv = s.kv_columns(), m = s.mlp_hidden;
  std::vector<TensorSlot> t;
  auto weight = [&](const std::string& name, std::vector<int64_t> shape) {
    t.push_back({name + ".weight", std::move(shape)});
  };
  auto linear = [&](const std::string& name, int64_t n, int64_t k, Quantization q) {
    if (q == Quantization::None) return weight(name, {n, k});
    const bool wide = q == Quantization::Int8;
    weight(name, {n, wide ? k : (k + 1) / 2});
    t.push_back({name + ".weight_scale",
                 wide ? std::vector<int64_t>{n} : std::vector<int64_t>{n, (k + ops::kGroup - 1) / ops::kGroup}});
  };
  weight(names.embedding, {s.vocab_size, d});
  for (const LayerNames& l : names.layers) {
    weight(l.attn_norm, {d});
    linear(l.q, q, d, s.stored);
    linear(l.k, kv, d, s.stored);
    linear(l.v, kv, d, s.stored);
    if (s.qkv_bias) {
      t.push_back({l.q + ".bias", {q}});
      t.push_back({l.k + ".bias", {kv}});
      t.push_back({l.v + ".bias", {kv}});
    }
    linear(l.out, d, q, s.stored);
    weight(l.ffn_norm, {d});
    linear(l.gate, m, d, s.stored);
    linear(l.up, m, d, s.stored);
    linear(l.down, d, m, s.stored);
  }
  weight(names.final_norm, {d});
  if (!s.tied_head) linear(names.head, s.vocab_size, d, head_quantization(s.stored));
  return t;
}

}  // namespace dllm
