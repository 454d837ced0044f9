"""Seeded random LLaDA checkpoints of any size, for measuring speed. Their text is noise; their arithmetic is real.

python benchmarks/random_model.py llada-8b --folder weights
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

SHAPES = {
    # next to no arithmetic: what is left is the cost of the steps themselves
    "one-layer": {"d_model": 32, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 48, "vocab_size": 64},
    # 1.0 billion parameters
    "llada-1b": {"d_model": 2048, "n_layers": 16, "n_heads": 16, "mlp_hidden_size": 6144, "vocab_size": 32000},
    # LLaDA-8B: 8.0 billion
    "llada-8b": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464},
}
SHARDED_PARAMETERS = 2e9  # more than these are written from a table and in shards
SHARD_BYTES = 0.5e9  # or one tensor
TABLE = 16_777_213  # a prime, so that no two rows of a matrix begin at the same place of the table


class Fresh:
    """Every number drawn anew."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)


class FromTable:
    """Normal numbers from a table that is walked round and round: a large model in seconds, with little memory."""

    def __init__(self, seed: int):
        self.table = Fresh(seed).normal(TABLE).bfloat16()
        self.place = 0

    def normal(self, *shape: int) -> torch.Tensor:
        n = torch.Size(shape).numel()
        out = torch.empty(n, dtype=torch.bfloat16)
        done = 0
        while done < n:
            part = self.table[self.place : self.place + n - done]
            out[done : done + len(part)] = part
            done += len(part)
            self.place = (self.place + len(part)) % TABLE
        return out.view(shape)


def tensors_of(sizes: dict, source: Fresh | FromTable) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, values) of every tensor, in the order in which they are drawn."""
    d, hidden, vocab = sizes["d_model"], sizes["mlp_hidden_size"], sizes["vocab_size"]

    def matrix(rows, columns, gain=1.0):
        return source.normal(rows, columns).mul_(gain * columns**-0.5)

    yield "model.transformer.wte.weight", source.normal(vocab, d)
    for i in range(sizes["n_layers"]):
        block = f"model.transformer.blocks.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            yield block + name + ".weight", matrix(d, d)
        yield block + "ff_proj.weight", matrix(hidden, d)
        yield block + "up_proj.weight", matrix(hidden, d)
        yield block + "ff_out.weight", matrix(d, hidden)
        for name in ("attn_norm", "ff_norm"):
            yield block + name + ".weight", torch.ones(d)
    yield "model.transformer.ln_f.weight", torch.ones(d)
    yield "model.transformer.ff_out.weight", matrix(vocab, d, gain=4.0)


def save_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """model-00001.safetensors, ... and their index; one shard is in memory at a time."""
    index, shard, size = {}, {}, 0

    def flush():
        nonlocal shard, size
        file = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    for name, values in tqdm(tensors, desc=f"writing {folder.name}", disable=None):
        values = values.to(dtype)
        if shard and size + values.nbytes > SHARD_BYTES:
            flush()
        shard[name] = values
        size += values.nbytes
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))


def write_llada(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a checkpoint of the named shape to a folder in `folder`, unless it is there; returns that folder."""
    folder = Path(folder) / f"{shape}-seed{seed}"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    sizes = SHAPES[shape]
    parameters = sizes["n_layers"] * sizes["d_model"] * (4 * sizes["d_model"] + 3 * sizes["mlp_hidden_size"])
    if parameters > SHARDED_PARAMETERS:
        save_shards(tensors_of(sizes, FromTable(seed)), folder, dtype)
    else:
        tensors = {name: values.to(dtype) for name, values in tensors_of(sizes, Fresh(seed))}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vocab = sizes["vocab_size"]
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


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("shape", choices=list(SHAPES))
    p.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    print(write_llada(args.folder, args.shape, seed=args.seed))


if __name__ == "__main__":
    main()
