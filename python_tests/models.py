"""Writers of small seeded random model folders in the Hugging Face layout of LLaDA and Dream.

The weights are scaled so that a random model behaves like a trained one where it matters to tests: logits spread over
the vocabulary (standard deviation >= 3), attention is neither uniform nor one-hot, and every part of a layer moves the
residual stream. `python_tests/test_reference.py` asserts this.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

FAMILIES = ("llada", "dream")


def llada_config(**changes):
    """config.json of a LLaDA model: every key of the published one, small sizes."""
    config = {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 64,
        "embedding_size": 300,
        "eos_token_id": 291,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": 296,
        "max_sequence_length": 4096,
        "mlp_hidden_size": 160,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 3,
        "pad_token_id": 291,
        "precision": "amp_bf16",
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": 300,
        "weight_tying": False,
    }
    return config | changes


def dream_config(**changes):
    """config.json of a Dream model: every key of the published one that shapes the model, small sizes."""
    config = {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 311,
        "eos_token_id": 311,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 160,
        "mask_token_id": 316,
        "max_position_embeddings": 131072,
        "model_type": "Dream",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 311,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 320,
    }
    return config | changes


def config_of(family, **changes):
    return {"llada": llada_config, "dream": dream_config}[family](**changes)


def random_tensors(config, seed=0):
    """fp32 weights under their Hugging Face names, for a config of either family."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return torch.randn(*shape, generator=generator) * std

    def norm_weight(d):
        return 1.0 + normal(d, std=0.2)

    def embedding(vocab, d):
        """A mask embedding of small norm lets attention, hence the context, decide what a masked row becomes."""
        weight = normal(vocab, d, std=1.0)
        weight[config["mask_token_id"]] *= 0.3
        return weight

    tensors = {}
    if config["model_type"].lower() == "llada":
        d, inner, vocab = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
        kv = d // config["n_heads"] * config["n_kv_heads"]
        tensors["model.transformer.wte.weight"] = embedding(vocab, d)
        for i in range(config["n_layers"]):
            block = f"model.transformer.blocks.{i}."
            tensors[block + "attn_norm.weight"] = norm_weight(d)
            for name, width, gain in (("q", d, 2.0), ("k", kv, 2.0), ("v", kv, 1.5)):
                tensors[block + f"{name}_proj.weight"] = normal(width, d, std=gain * d**-0.5)
                if config["include_qkv_bias"]:
                    tensors[block + f"{name}_proj.bias"] = normal(width, std=0.5)
            tensors[block + "attn_out.weight"] = normal(d, d, std=1.5 * d**-0.5)
            tensors[block + "ff_norm.weight"] = norm_weight(d)
            tensors[block + "ff_proj.weight"] = normal(inner, d, std=d**-0.5)
            tensors[block + "up_proj.weight"] = normal(inner, d, std=d**-0.5)
            tensors[block + "ff_out.weight"] = normal(d, inner, std=1.5 * inner**-0.5)
        tensors["model.transformer.ln_f.weight"] = norm_weight(d)
        if not config["weight_tying"]:
            tensors["model.transformer.ff_out.weight"] = normal(vocab, d, std=5.0 * d**-0.5)
        return tensors

    d, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors["model.embed_tokens.weight"] = embedding(vocab, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        tensors[layer + "input_layernorm.weight"] = norm_weight(d)
        for name, width, gain in (("q", d, 2.0), ("k", kv, 2.0), ("v", kv, 1.5)):
            tensors[layer + f"self_attn.{name}_proj.weight"] = normal(width, d, std=gain * d**-0.5)
            tensors[layer + f"self_attn.{name}_proj.bias"] = normal(width, std=0.5)
        tensors[layer + "self_attn.o_proj.weight"] = normal(d, d, std=1.5 * d**-0.5)
        tensors[layer + "post_attention_layernorm.weight"] = norm_weight(d)
        tensors[layer + "mlp.gate_proj.weight"] = normal(inner, d, std=d**-0.5)
        tensors[layer + "mlp.up_proj.weight"] = normal(inner, d, std=d**-0.5)
        tensors[layer + "mlp.down_proj.weight"] = normal(d, inner, std=1.5 * inner**-0.5)
    tensors["model.norm.weight"] = norm_weight(d)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(vocab, d, std=5.0 * d**-0.5)
    return tensors


def write_folder(folder, config, tensors, shards=1):
    """Write config.json and the weights as model.safetensors, or as `shards` files and their index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[n::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_model(folder, family, seed=0, shards=1, dtype=torch.float32, edit=None, **changes):
    """Write a random model of `family` ("llada" | "dream") and return its folder (Path).

    dtype: of the stored weights. edit: called with the fp32 tensors (dict) before they are stored.
    changes: config.json entries that differ from the small default.
    """
    config = config_of(family, **changes)
    tensors = random_tensors(config, seed)
    if edit is not None:
        edit(tensors)
    return write_folder(folder, config, {name: t.to(dtype) for name, t in tensors.items()}, shards)


def random_prompt(config, length, seed=0):
    """`length` random ids, none of them the mask id or EOS."""
    generator = torch.Generator().manual_seed(1000 + seed)
    special = (config["mask_token_id"], config["eos_token_id"])
    allowed = torch.tensor([i for i in range(config["vocab_size"]) if i not in special])
    return allowed[torch.randint(len(allowed), (length,), generator=generator)].tolist()
