"""A LLaDA checkpoint folder for the peers: config.json, and one safetensors file or several shards."""

import json
from pathlib import Path

import torch
from safetensors import safe_open


def load_config(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


def load_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor by its name, mapped: bytes are read from the file when they are first used."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors.update({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118  (no dict)
    return tensors


def parameters(folder: str | Path) -> int:
    """Number of parameters, from the shapes in the files' headers."""
    total = 0
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                n = 1
                for size in f.get_slice(name).get_shape():
                    n *= size
                total += n
    return total
