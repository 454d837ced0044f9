// What a model is, as data: one transformer runs every family, and a family is a table of names and constants.
//
//   LLaDA 8B Base/Instruct, 1.5   ML-GSAI/LLaDA   MHA, no biases, fp32 rotary, logits of row i predict token i
//   Dream 7B Base/Instruct        DreamLM/Dream   GQA, QKV biases, rotary tables in the model's precision,
//                                                 logits of row i predict token i + 1
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dllm {

enum class Family { LLaDA, Dream };
const char* name_of(Family f);

// Of the linear layers. Int8 and Int4 are ops/quantize.h's formats; with Int4 the LM head, which decides, stays in 8 bits.
enum class Quantization { None, Int8, Int4 };
const char* name_of(Quantization q);

struct TensorSlot {
  std::string name;  // as in the checkpoint
  std::vector<int64_t> shape;
};

struct ModelSpec {
  Family family = Family::LLaDA;
  int64_t vocab_size = 0;  // rows of the embedding and of the LM head
  int d_model = 0, n_layers = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0, mlp_hidden = 0;
  int64_t max_positions = 0;
  float norm_eps = 0, rope_theta = 0;
  bool rope_full_precision = true;  // false: cos and sin are rounded to the model's dtype first
  bool qkv_bias = false, tied_head = false;
  Quantization stored = Quantization::None;  // of the checkpoint's linear layers (config.json: quantization_config)
  int logit_shift = 0;  // 1: token i is read from the hidden state of position i - 1
  int32_t mask_id = -1, eos_id = -1;
  std::vector<int32_t> stop_ids;  // EOS first, then end-of-turn ids

  int q_columns() const { return n_heads * head_dim; }
  int kv_columns() const { return n_kv_heads * head_dim; }

  // Reads a Hugging Face config.json. CheckpointError names the key, its value and what is supported.
  static ModelSpec from_config(const std::string& json_text, const std::string& source);
};

// Names of a layer's and of the whole model's tensors in the checkpoint.
struct LayerNames {
  std::string attn_norm, q, k, v, out, ffn_norm, gate, up, down;  // without ".weight" / ".bias"
};
struct ModelNames {
  std::string embedding, final_norm, head;
  std::vector<LayerNames> layers;
};
ModelNames names_of(const ModelSpec& spec);

// Every tensor the model reads, with its shape: the map between checkpoint and slots, in both directions. A quantised
// checkpoint has NAME.weight in the shape of its format and NAME.weight_scale beside it (ops/quantize.h).
std::vector<TensorSlot> tensors_of(const ModelSpec& spec);

// How a model whose linear layers are quantised as `q` holds its LM head.
Quantization head_quantization(Quantization q);

}  // namespace dllm
