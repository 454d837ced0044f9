"""Seeded random LLaDA checkpoints of any size, for measuring speed. Their text is noise; their arithmetic is real."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    # 1.0 billion parameters
    "llada-1b": {"d_model": 2048, "n_layers": 16, "n_heads": 16, "mlp_hidden_size": 6144, "vocab_size": 32000},
}


def write_llada(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write config.json and model.safetensors of the named shape to `folder`, unless they are there already."""
    folder = Path(folder) / f"{shape}-seed{seed}"
    if (folder / "config.json").exists():
        return folder
    sizes = SHAPES[shape]
    d, hidden, vocab, layers = (sizes[k] for k in ("d_model", "mlp_hidden_size", "vocab_size", "n_layers"))
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns, gain=1.0):
        return (torch.randn(rows, columns, generator=generator) * (gain * columns**-0.5)).to(dtype)

    tensors = {"model.transformer.wte.weight": torch.randn(vocab, d, generator=generator).to(dtype)}
    for i in range(layers):
        block = f"model.transformer.blocks.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            tensors[block + name + ".weight"] = matrix(d, d)
        tensors[block + "ff_proj.weight"] = matrix(hidden, d)
        tensors[block + "up_proj.weight"] = matrix(hidden, d)
        tensors[block + "ff_out.weight"] = matrix(d, hidden)
        for name in ("attn_norm", "ff_norm"):
            tensors[block + name + ".weight"] = torch.ones(d, dtype=dtype)
    tensors["model.transformer.ln_f.weight"] = torch.ones(d, dtype=dtype)
    tensors["model.transformer.ff_out.weight"] = matrix(vocab, d, gain=4.0)

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        **sizes,
        "model_type": "llada",
        "n_kv_heads": sizes["n_heads"],
        "embedding_size": vocab,
        "max_sequence_length": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "mask_token_id": vocab - 1,
        "eos_token_id": vocab - 2,
        "weight_tying": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: its presence says the folder is whole
    return folder
