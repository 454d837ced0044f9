"""dllm quantize and dllm_ext.quantize: what they write, and how they fail."""

import importlib
import json
import os
import stat

import models
import numpy as np
import pytest
import torch
from conftest import error_line, write_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_engine_api import Terminal

import dllm_ext
from dllm_ext import _C, CheckpointError, ConfigError, Engine, progress

FORMATS = ("int8", "int4")
module = importlib.import_module("dllm_ext.quantize")


@pytest.fixture(scope="module", params=models.FAMILIES)
def source(request, tmp_path_factory):
    """A sharded bf16 model with a tokenizer, and files that must not be copied."""
    folder = tmp_path_factory.mktemp("sources") / request.param
    models.write_model(folder, request.param, shards=3, dtype=torch.bfloat16)
    write_tokenizer(folder, request.param)
    (folder / "generation_config.json").write_text('{"a": 1}')
    (folder / "README.md").write_text("# A model\n")
    for name in ("modeling_llada.py", "pytorch_model.bin", "pytorch_model.bin.index.json", ".gitattributes"):
        (folder / name).write_text("no")
    (folder / "sub").mkdir()
    return folder


def tensors_of(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_tensor(source, tmp_path, fmt):
    """Linear layers are what _C.quantize gives, the LM head in 8 bits; the rest is untouched."""
    out = dllm_ext.quantize(source, tmp_path / "out", fmt)
    before, after = tensors_of(source), tensors_of(out)
    heads = ("model.transformer.ff_out.weight", "lm_head.weight")
    linear = {n for n, t in before.items() if t.ndim == 2 and "wte" not in n and "embed" not in n}
    assert set(after) == set(before) | {f"{n}_scale" for n in linear}
    for name, tensor in before.items():
        if name not in linear:
            assert torch.equal(after[name], tensor), name
            continue
        values, scales = _C.quantize(tensor.view(torch.uint16).numpy(), "int8" if name in heads else fmt)
        assert torch.equal(after[name], torch.from_numpy(values)), name
        expected = torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16) if scales.ndim == 2 else scales
        assert torch.equal(after[f"{name}_scale"], torch.as_tensor(expected)), name


def test_other_files(source, tmp_path):
    out = dllm_ext.quantize(source, str(tmp_path / "new" / "out"), "int4")
    assert out == tmp_path / "new" / "out" and os.listdir(tmp_path / "new") == ["out"]
    names = {file.name for file in out.iterdir()}
    tokenizer = {f.name for f in source.iterdir() if f.name.startswith(("tokenizer", "vocab", "merges", "added"))}
    assert names == {"config.json", "model.safetensors", "generation_config.json", "README.md"} | tokenizer
    for name in names - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "dllm", "format": "int4"}
    assert config == json.loads((source / "config.json").read_text())
    modes = {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()}
    assert len(modes) == 1  # safetensors' own is private
    with safe_open(out / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert Engine.from_pretrained(out).generate("Hi", gen_length=4).text is not None


def test_shards(source, tmp_path, monkeypatch):
    whole = dllm_ext.quantize(source, tmp_path / "whole", "int8")
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    out = dllm_ext.quantize(source, tmp_path / "out", "int8")
    files = sorted(out.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = tensors_of(out)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert {n: f.name for f in files for n in load_file(f)} == index["weight_map"]
    for name, tensor in tensors_of(whole).items():
        assert torch.equal(found[name], tensor)
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in files]
    assert all(s <= 40_000 or len(load_file(f)) <= 2 for s, f in zip(sizes, files, strict=True))
    a, b = (Engine.from_pretrained(folder).generate([1, 2], gen_length=6).token_ids for folder in (whole, out))
    assert a == b


def test_tensors_that_nothing_reads_are_left_out(tmp_path):
    def add(tensors):
        tensors["model.transformer.rotary.inv_freq"] = torch.ones(4)

    source = models.write_model(tmp_path / "model", "llada", edit=add)
    out = dllm_ext.quantize(source, tmp_path / "out", "int8")
    assert "model.transformer.rotary.inv_freq" not in tensors_of(out)


def test_an_empty_folder_is_filled(source, tmp_path):
    (tmp_path / "out").mkdir()
    assert Engine.from_pretrained(dllm_ext.quantize(source, tmp_path / "out", "int8")).quantization == "int8"


def test_misaligned_tensors(source, tmp_path):
    """A header whose length is odd."""
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors_of(source), folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 2)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    a, b = (tensors_of(dllm_ext.quantize(f, tmp_path / f"{f.name}-out", "int4")) for f in (source, folder))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Errors


def failed(error, *arguments, **more):
    with pytest.raises(error) as e:
        dllm_ext.quantize(*arguments, **more)
    return str(e.value)


def test_destinations_that_are_taken(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for destination in (tmp_path / "file", tmp_path / "full", source):
        text = failed(ConfigError, source, destination, "int8")
        assert "destination = " in text and str(destination) in text
    assert "cannot be written" in failed(ConfigError, source, tmp_path / "file" / "below", "int8")
    assert (tmp_path / "full" / "x").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


@pytest.mark.parametrize("value", [None, "", 3, b"out"], ids=repr)
def test_destinations_that_are_no_path(source, value):
    assert "destination = " in failed(ConfigError, source, value, "int8")


@pytest.mark.parametrize("value", ["int2", "INT8", "", None, 8], ids=repr)
def test_formats(source, tmp_path, value):
    text = failed(ConfigError, source, tmp_path / "out", value)
    assert f"to = {value!r} is not allowed" in text and '"int8" or "int4"' in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_source_that_is_quantised_already(source, tmp_path, fmt):
    once = dllm_ext.quantize(source, tmp_path / "once", fmt)
    text = failed(ConfigError, once, tmp_path / "twice", "int8")
    assert f"source = '{once}'" in text and f"{fmt} already" in text
    assert os.listdir(tmp_path) == ["once"]


def test_sources_that_are_wrong(tmp_path):
    out = tmp_path / "out"
    assert "does not exist" in failed(CheckpointError, tmp_path / "nowhere", out, "int8")
    assert "revision" in failed(ConfigError, "mini-llada", out, "int8", revision="main")
    name = "model.transformer.blocks.2.up_proj.weight"
    for edit, text in (
        (lambda t: t.pop(name), f'tensor "{name}" is missing'),
        (lambda t: t.update({name: t[name][1:]}), f'tensor "{name}" has shape [159, 64]'),
        (lambda t: t.update({name: t[name].half()}), f'tensor "{name}" has dtype F16; F32 and BF16'),
    ):
        config, tensors = models.llada_config(), models.random_tensors(models.llada_config())
        edit(tensors)
        source = models.write_folder(tmp_path / "model", config, tensors)
        assert text in failed(CheckpointError, source, out, "int8")
    (source / "config.json").write_text("{")
    assert "config.json" in failed(CheckpointError, source, out, "int8")
    (source / "config.json").write_bytes(json.dumps(config).encode()[:-1] + b', "name": "\xff"}')
    assert "config.json" in failed(CheckpointError, source, out, "int8")
    (source / "model.safetensors").write_bytes(b"rubbish" * 9)
    assert "model.safetensors" in failed(CheckpointError, source, out, "int8")
    assert os.listdir(tmp_path) == ["model"]


def test_nothing_is_left_of_what_failed(source, tmp_path, monkeypatch):
    """A full disk, an interruption, a folder that somebody else made in the meantime."""

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    def raced(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("")

    out = tmp_path / "out"
    monkeypatch.setattr(module, "save_file", full)
    text = failed(ConfigError, source, out, "int8")
    assert "destination = " in text and "No space left" in text and not os.listdir(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_write_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dllm_ext.quantize(source, out, "int8")
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(module, "_write_weights", raced)
    assert "destination = " in failed(ConfigError, source, out, "int8")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["theirs"]


# The command


def test_command(dllm, source, tmp_path):
    code, out, err = dllm("quantize", source, tmp_path / "out", "--to", "int4")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert (code, err) == (0, "") and out == f"{tmp_path / 'out'}: int4, {size / 1e6:.1f} MB of weights\n"
    short = ["--gen-length", 6, "--block-length", 4, "--json"]
    for options in (["--model", tmp_path / "out"], ["--model", source, "--quantization", "int4"]):
        code, out, _ = dllm("generate", "Hi", *options, *short)
        ids = json.loads(out)["token_ids"]
        assert ids == Engine.from_pretrained(tmp_path / "out").generate("Hi", gen_length=6, block_length=4).token_ids


def test_command_errors(dllm, source, tmp_path):
    assert "to = 'int2'" in error_line(dllm("quantize", source, tmp_path / "out", "--to", "int2"))
    assert "destination" in error_line(dllm("quantize", source, source, "--to", "int8"))
    assert "does not exist" in error_line(dllm("quantize", tmp_path / "no", tmp_path / "out", "--to", "int8"))
    code, _, err = dllm("quantize", source, tmp_path / "out")
    assert code == 2 and "--to" in err
    assert not os.listdir(tmp_path)
    assert "quantization = 'int2'" in error_line(dllm("generate", "Hi", "--model", source, "--quantization", "int2"))


def test_quantization_of_chat_and_bench(dllm, source):
    expected = Engine.from_pretrained(source, quantization="int8").generate("Hi", gen_length=6).text
    _, out, _ = dllm("chat", "--model", source, "--quantization", "int8", "--gen-length", 6, stdin="Hi\n")
    assert out == expected + "\n"
    options = ["--model", source, "--gen-length", 2, "--repeat", 1]
    assert json.loads(dllm("bench", *options, "--quantization", "int4", "--json")[1])["quantization"] == "int4"
    assert json.loads(dllm("bench", *options, "--json")[1])["quantization"] is None
    assert "int8" in dllm("bench", *options, "--quantization", "int8")[1]


def test_progress(source, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0)
    monkeypatch.setattr("sys.stderr", terminal)
    dllm_ext.quantize(source, tmp_path / "out", "int8")
    assert f"quantizing {source.name}" in terminal.text
