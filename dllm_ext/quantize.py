"""Checkpoints whose linear layers are stored in 8 or 4 bits; docs/semantics.md has their format."""

import contextlib
import json
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from . import _C
from .errors import CheckpointError, ConfigError
from .hub import model_folder
from .progress import progress_bar

SHARD_BYTES = 4 * 10**9
# What is not copied beside the weights: weights in any form, their indices, code, and large files.
NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".py")
COPIED_BYTES = 64 * 2**20


def quantize(source: str | os.PathLike, destination: str | os.PathLike, to: str, revision: str | None = None) -> Path:
    """Write a copy of a model with quantised linear layers, which `Engine.from_pretrained` loads as it is.

    source: what from_pretrained takes: "mini-llada", a folder, or a Hugging Face id.
    destination: a folder that does not exist yet, or is empty. It appears complete or not at all.
    to: "int8" or "int4"; with "int4" the LM head is in 8 bits. Embedding, norms and biases stay as they are.
    revision: branch, tag or commit of a Hugging Face id.

    Tokenizer files and the like are copied; tensors that the architecture has no use for are left out. Memory: one
    shard of 4 GB and one tensor. Returns the destination.

    Raises ConfigError for a wrong argument (a source that is quantised already, a destination that is taken or cannot
    be written) and CheckpointError for a source that cannot be read, or holds a weight that is NaN or infinite.
    """
    if to not in ("int8", "int4"):
        raise ConfigError(f'to = {to!r} is not allowed: it must be "int8" or "int4"')
    if not isinstance(destination, str | os.PathLike) or not os.fspath(destination):
        raise ConfigError(f"destination = {destination!r} is not allowed: it must be a path")
    folder, destination = model_folder(source, revision), Path(destination).expanduser()
    with _destination_errors(destination):
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise ConfigError(f"destination = {str(destination)!r} is not allowed: it exists and is no empty folder")
    checkpoint = _C.Checkpoint(os.fsencode(folder))
    config, slots, linear = _plan(folder, checkpoint.config_text, to)
    total = sum(checkpoint.tensor(name, shape).nbytes for name, shape in slots.items())  # all that is wrong shows now

    scratch = destination.parent / f".{destination.name}.{secrets.token_hex(4)}"
    with _destination_errors(destination):
        try:
            scratch.mkdir(parents=True)
            _copy_small_files(folder, scratch)
            (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            with progress_bar(f"quantizing {folder.name}") as progress:
                read = _quantized_tensors(checkpoint, slots, linear)
                _write_weights(read, total, scratch, progress)
            scratch.rename(destination)  # replaces an empty folder
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return destination


def _plan(folder, config_text, to):
    """What there is to do: config.json of the result, shapes of the source's tensors, format of each linear layer."""
    spec = _C.ModelSpec.from_config(config_text)
    try:
        config = json.loads(config_text)
    except ValueError as e:  # bytes that are not UTF-8 where the engine does not look
        raise CheckpointError(f"{folder / 'config.json'} is not valid JSON: {e}") from None
    if config.get("quantization_config") is not None:
        already = config["quantization_config"]["format"]
        raise ConfigError(f"source = {str(folder)!r} is not allowed: its weights are {already} already")
    config["quantization_config"] = {"quant_method": "dllm", "format": to}
    result = dict(_C.ModelSpec.from_config(json.dumps(config)).tensors())
    slots = dict(spec.tensors())
    scales = {name: result.get(f"{name}_scale") for name in slots}
    linear = {name: "int8" if len(shape) == 1 else "int4" for name, shape in scales.items() if shape is not None}
    return config, slots, linear


def _quantized_tensors(checkpoint, slots, linear):
    """Tensor by tensor of the source: its bytes, and by name what becomes of it (one tensor or two)."""
    for name, shape in slots.items():
        array = checkpoint.tensor(name, shape)
        if name in linear:
            values, scales = _C.quantize(array, linear[name], name)
            yield array.nbytes, {name: torch.from_numpy(values), f"{name}_scale": _as_torch(scales)}
        else:
            yield array.nbytes, {name: _as_torch(array.copy())}
        checkpoint.release(name, shape)


def _as_torch(array):
    """fp32, or bf16 as uint16, as a torch tensor."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _write_weights(tensors, total, folder, progress):
    """model.safetensors, or shards and their index, of what _quantized_tensors gives; total: bytes of the source."""
    shards, shard, size, written, done = [], {}, 0, 0, 0
    for source_bytes, parts in tensors:
        more = sum(part.nbytes for part in parts.values())
        if shard and size + more > SHARD_BYTES:
            shards.append(_write_shard(shard, folder, len(shards)))
            shard, size = {}, 0
        shard |= parts
        size, written, done = size + more, written + more, done + source_bytes
        if progress:
            progress(done, total)
    shards.append(_write_shard(shard, folder, len(shards)))

    if len(shards) == 1:
        (folder / _shard_name(0)).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _shard_name(i)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shard_name(index):
    """Until it is known how many there are."""
    return f"shard-{index}"


def _write_shard(tensors, folder, index):
    """Write one file and return the names of its tensors."""
    file = folder / _shard_name(index)
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", file)
    return list(tensors)


def _copy_small_files(source, destination):
    for file in sorted(source.iterdir()):
        known = file.name == "config.json" or file.name.startswith(".") or file.name.endswith(NOT_COPIED)
        if not known and file.is_file() and file.stat().st_size <= COPIED_BYTES:
            shutil.copyfile(file, destination / file.name)


@contextlib.contextmanager
def _destination_errors(destination):
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"destination = {str(destination)!r} cannot be written: {e}") from e
