"""Small random models, the same on every machine: the weights behind the golden token ids.

A model is a config (the published config.json of its family, with small numbers in it) and a seed. Every number comes
from `numpy.random.Generator(PCG64(seed)).standard_normal`, drawn in float64, scaled and rounded to float32, so no
version of torch has a part in it. `digest` of the weights is stored beside the golden ids: if a machine ever draws
other numbers, that is what fails, not a puzzling token.

The scales are chosen so that a wrong engine gets caught:
- logits have a standard deviation above 3 over the vocabulary, so confidences spread between 0.05 and 1;
- queries and keys are large enough for attention to be far from uniform, and its output is not drowned in the residual;
- the mask embedding is short, so what a masked position says depends on its context and its position;
- the LM head's row for the mask id is zero, so the mask is never the best token (the original loops would propose it);
- the LM head's row for EOS is long, so EOS does come up, in the middle of the text too.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RECIPE = "pcg64-1"


def tensors(config):
    """(Hugging Face name, shape, what it is) of every tensor of a model, in the order in which they are drawn."""
    if config["model_type"] == "llada":
        d, mlp, vocab = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
        kv = d // config["n_heads"] * config["n_kv_heads"]
        yield "model.transformer.wte.weight", (vocab, d), "embedding"
        for i in range(config["n_layers"]):
            block = f"model.transformer.blocks.{i}."
            yield block + "attn_norm.weight", (d,), "norm"
            yield block + "q_proj.weight", (d, d), "query_key"
            yield block + "k_proj.weight", (kv, d), "query_key"
            yield block + "v_proj.weight", (kv, d), "value"
            yield block + "attn_out.weight", (d, d), "attention_out"
            yield block + "ff_norm.weight", (d,), "norm"
            yield block + "ff_proj.weight", (mlp, d), "mlp_in"
            yield block + "up_proj.weight", (mlp, d), "mlp_in"
            yield block + "ff_out.weight", (d, mlp), "mlp_out"
        yield "model.transformer.ln_f.weight", (d,), "norm"
        yield "model.transformer.ff_out.weight", (vocab, d), "head"
        return
    d, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocab, d), "embedding"
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (d,), "norm"
        yield layer + "self_attn.q_proj.weight", (d, d), "query_key"
        yield layer + "self_attn.q_proj.bias", (d,), "bias"
        yield layer + "self_attn.k_proj.weight", (kv, d), "query_key"
        yield layer + "self_attn.k_proj.bias", (kv,), "bias"
        yield layer + "self_attn.v_proj.weight", (kv, d), "value"
        yield layer + "self_attn.v_proj.bias", (kv,), "bias"
        yield layer + "self_attn.o_proj.weight", (d, d), "attention_out"
        yield layer + "post_attention_layernorm.weight", (d,), "norm"
        yield layer + "mlp.gate_proj.weight", (mlp, d), "mlp_in"
        yield layer + "mlp.up_proj.weight", (mlp, d), "mlp_in"
        yield layer + "mlp.down_proj.weight", (d, mlp), "mlp_out"
    yield "model.norm.weight", (d,), "norm"
    yield "lm_head.weight", (vocab, d), "head"


# Standard deviation of what the matrix gives for an input of unit variance (so: times 1/sqrt(columns) for a weight).
GAIN = {"query_key": 2.0, "value": 1.0, "attention_out": 4.0, "mlp_in": 1.0, "mlp_out": 2.0, "head": 3.5}
MASK_EMBEDDING = 0.3
EOS_ROW = 1.6


def weights(config, seed):
    """Hugging Face name -> float32 array."""
    rng = np.random.Generator(np.random.PCG64(seed))
    result = {}
    for name, shape, kind in tensors(config):
        w = rng.standard_normal(shape)
        if kind == "norm":
            w = 1.0 + 0.2 * w
        elif kind == "bias":
            w = 0.4 * w
        elif kind == "embedding":
            w[config["mask_token_id"]] *= MASK_EMBEDDING
        else:
            w *= GAIN[kind] / shape[1] ** 0.5
        if kind == "head":
            w[config["eos_token_id"]] *= EOS_ROW
            w[config["mask_token_id"]] = 0.0
        result[name] = w.astype(np.float32)
    return result


def digest(named_arrays):
    """A short fingerprint of the bits of all weights."""
    h = hashlib.sha256()
    for name in sorted(named_arrays):
        h.update(name.encode())
        h.update(named_arrays[name].astype("<f4").tobytes())
    return h.hexdigest()[:16]


def write_folder(folder, config, named_arrays):
    """config.json + model.safetensors, as Hugging Face lays a checkpoint out; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(named_arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
