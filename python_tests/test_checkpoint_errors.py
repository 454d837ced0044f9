"""Model folders and repositories that are missing, damaged, incomplete or of another architecture.

Each ends in a CheckpointError that names the file, key or tensor, and never in a crash.
"""

import fnmatch
import json
import os
import struct
from pathlib import Path

import huggingface_hub
import models
import pytest
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dllm_ext import CheckpointError, ConfigError, Engine, hub

FAMILIES = models.FAMILIES


def message(folder, **options):
    with pytest.raises(CheckpointError) as e:
        Engine.from_pretrained(folder, **options)
    return str(e.value)


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: v for name, v in config.items() if v is not ...}))


@pytest.fixture
def llada_files(tmp_path):
    return models.write_model(tmp_path / "model", "llada")


# Folders


def test_missing_folder():
    assert "'/no/such/folder' does not exist" in message("/no/such/folder")
    assert "does not exist" in message(Path("no/such"))
    assert "does not exist" in message("")


def test_file_instead_of_folder(llada_files):
    assert "is a file" in message(llada_files / "model.safetensors")


def test_empty_folder(tmp_path):
    assert "config.json" in message(tmp_path)


def test_no_weights(llada_files):
    (llada_files / "model.safetensors").unlink()
    assert "model.safetensors" in message(llada_files)


def test_pickles_are_not_weights(llada_files):
    tensors = models.random_tensors(models.llada_config())
    (llada_files / "model.safetensors").unlink()
    torch.save(tensors, llada_files / "pytorch_model.bin")
    assert "model.safetensors" in message(llada_files)


# config.json


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"model_type": "llada"', "nonsense", '{"a": 1} x', "\x00"], ids=repr
)
def test_config_that_is_no_json_object(llada_files, text):
    (llada_files / "config.json").write_text(text)
    assert "config.json" in message(llada_files)


def test_config_of_binary_rubbish(llada_files):
    (llada_files / "config.json").write_bytes(bytes(range(256)))
    assert "config.json" in message(llada_files)


@pytest.mark.parametrize("raw", [b"\xff", b"\x80a", b"\xed\xb2\x80"], ids=repr)
def test_text_that_is_not_utf8(llada_files, raw):
    """Bytes that a message quotes from a file need not be text."""
    file = llada_files / "config.json"
    original = file.read_bytes()
    file.write_bytes(original.replace(b'"model_type": "llada"', b'"model_type": "' + raw + b'"'))
    assert "model_type" in message(llada_files)
    file.write_bytes(original)
    file = llada_files / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"' + raw.ljust(3, b"x") + b'"'))
    assert "unknown dtype" in message(llada_files)


def test_folder_name_that_is_not_utf8(tmp_path):
    folder = models.write_model(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")), "llada")
    assert len(Engine.from_pretrained(folder).generate([1, 2], gen_length=2).token_ids) == 2
    (folder / "config.json").unlink()
    assert "config.json" in message(folder)


def test_deeply_nested_config(llada_files):
    (llada_files / "config.json").write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    assert "config.json" in message(llada_files)


@pytest.mark.parametrize("model_type", ["llama", "LLADA", "", "llada_moe"])
def test_unknown_architecture_lists_the_known_ones(llada_files, model_type):
    edit_config(llada_files, model_type=model_type)
    text = message(llada_files)
    assert f'"{model_type}"' in text and "llada" in text and "Dream" in text


def test_missing_model_type(llada_files):
    edit_config(llada_files, model_type=...)
    assert "model_type is missing" in message(llada_files)


def test_mixture_of_experts(llada_files):
    edit_config(llada_files, num_experts=64)
    assert "num_experts" in message(llada_files)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llada", "alibi", True),
        ("llada", "rope", False),
        ("llada", "activation_type", "gelu"),
        ("llada", "block_type", "sequential"),
        ("llada", "layer_norm_type", "default"),
        ("llada", "block_group_size", 4),
        ("llada", "attention_layer_norm", True),
        ("llada", "input_emb_norm", True),
        ("llada", "scale_logits", True),
        ("llada", "include_bias", True),
        ("llada", "n_kv_heads", 3),
        ("llada", "n_heads", 5),
        ("llada", "n_layers", 0),
        ("llada", "n_layers", "three"),
        ("llada", "n_layers", 2.5),
        ("llada", "d_model", -64),
        ("llada", "d_model", 10**30),
        ("llada", "vocab_size", 10**12),
        ("llada", "mask_token_id", 300),
        ("llada", "mask_token_id", -1),
        ("llada", "mask_token_id", 291),
        ("llada", "eos_token_id", []),
        ("llada", "eos_token_id", "end"),
        ("llada", "eos_token_id", 4000),
        ("llada", "rms_norm_eps", 0),
        ("llada", "rope_theta", -1),
        ("dream", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("dream", "use_sliding_window", True),
        ("dream", "use_mrope", True),
        ("dream", "hidden_act", "relu"),
        ("dream", "num_key_value_heads", 3),
        ("dream", "max_position_embeddings", 0),
    ],
)
def test_config_value_that_is_not_supported(tmp_path, family, key, value):
    folder = models.write_model(tmp_path, family)
    edit_config(folder, **{key: value})
    text = message(folder)
    assert key in text and "config.json" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys(tmp_path, family):
    folder = models.write_model(tmp_path, family)
    original = (folder / "config.json").read_text()
    needed = {
        "llada": [
            "d_model",
            "n_layers",
            "n_heads",
            "max_sequence_length",
            "vocab_size",
            "mask_token_id",
            "eos_token_id",
        ],
        "dream": ["hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size"],
    }
    for key in needed[family]:
        edit_config(folder, **{key: ...})
        text = message(folder)
        assert key in text and "missing" in text
        (folder / "config.json").write_text(original)


# Tensors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", [0, 4, -1])
def test_missing_tensor(tmp_path, family, which):
    config = models.config_of(family)
    tensors = models.random_tensors(config)
    name = list(tensors)[which]
    del tensors[name]
    text = message(models.write_folder(tmp_path, config, tensors))
    assert f'"{name}" is missing' in text


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_shape_names_both(tmp_path, family):
    config = models.config_of(family)
    tensors = models.random_tensors(config)
    name = next(n for n in tensors if "q_proj.weight" in n)
    tensors[name] = tensors[name][:, :32].contiguous()
    text = message(models.write_folder(tmp_path, config, tensors))
    assert name in text and "[64, 32]" in text and "[64, 64]" in text


def test_transposed_tensor(tmp_path):
    config = models.llada_config()
    tensors = models.random_tensors(config)
    name = "model.transformer.blocks.0.ff_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    assert name in message(models.write_folder(tmp_path, config, tensors))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float8_e4m3fn, torch.bool], ids=str)
def test_wrong_dtype(tmp_path, dtype):
    config = models.llada_config()
    tensors = models.random_tensors(config)
    name = "model.transformer.blocks.0.q_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    assert name in message(models.write_folder(tmp_path, config, tensors))


def test_config_of_another_size(llada_files):
    edit_config(llada_files, n_layers=4)
    assert "blocks.3" in message(llada_files)
    edit_config(llada_files, n_layers=3, mlp_hidden_size=128)
    assert "[160, 64]" in message(llada_files)


def test_extra_tensors_are_ignored(tmp_path):
    config = models.llada_config()
    tensors = models.random_tensors(config) | {"rotary.inv_freq": torch.ones(8)}
    assert Engine.from_pretrained(models.write_folder(tmp_path, config, tensors)).generate([1, 2], gen_length=2)


# safetensors files


def header_of(data):
    (size,) = struct.unpack("<Q", data[:8])
    return size, json.loads(data[8 : 8 + size])


def with_header(header, payload=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.3, 0.5, 0.999], ids=str)
def test_truncated_file(llada_files, keep):
    file = llada_files / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    assert "model.safetensors" in message(llada_files)


def test_one_missing_byte(llada_files):
    file = llada_files / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors" in message(llada_files)


@pytest.mark.parametrize("size", [0, 2**63, 2**64 - 1, 2**40, 10])
def test_wrong_header_size(llada_files, size):
    file = llada_files / "model.safetensors"
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    assert "model.safetensors" in message(llada_files)


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {},
        {"dtype": "F32", "shape": [2, 2]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 2**40]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "big", "data_offsets": [0, 16]},
        {"dtype": "F31", "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": None, "shape": [2, 2], "data_offsets": [0, 16]},
    ],
    ids=str,
)
def test_damaged_header_entry(llada_files, entry):
    file = llada_files / "model.safetensors"
    size, header = header_of(file.read_bytes())
    header["model.transformer.ln_f.weight"] = entry
    file.write_bytes(with_header(header, file.read_bytes()[8 + size :]))
    assert "ln_f.weight" in message(llada_files)


def test_header_that_is_a_list(llada_files):
    (llada_files / "model.safetensors").write_bytes(with_header([1, 2]))
    assert "model.safetensors" in message(llada_files)


def test_lfs_pointer_instead_of_weights(llada_files):
    """What a git clone without git-lfs leaves behind."""
    (llada_files / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16031000000\n"
    )
    assert "model.safetensors" in message(llada_files)


def test_folder_instead_of_file(llada_files):
    (llada_files / "model.safetensors").unlink()
    (llada_files / "model.safetensors").mkdir()
    assert "model.safetensors" in message(llada_files)


# Shards


@pytest.fixture
def sharded(tmp_path):
    return models.write_model(tmp_path / "sharded", "llada", shards=3)


def index_of(folder):
    return folder / "model.safetensors.index.json"


def test_shards_give_the_same_model(sharded, llada_files):
    whole, parts = Engine.from_pretrained(llada_files), Engine.from_pretrained(sharded)
    assert whole.generate([1, 2], gen_length=8).token_ids == parts.generate([1, 2], gen_length=8).token_ids


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in message(sharded)


def test_missing_index(sharded):
    index_of(sharded).unlink()
    assert "model.safetensors.index.json" in message(sharded)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}']
)
def test_damaged_index(sharded, text):
    index_of(sharded).write_text(text)
    assert message(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", ".", "..", "a/../../b.safetensors"])
def test_shard_outside_the_folder(sharded, name):
    """An index cannot make the loader read another file of the machine."""
    index = json.loads(index_of(sharded).read_text())
    index["weight_map"]["model.transformer.wte.weight"] = name
    index_of(sharded).write_text(json.dumps(index))
    assert "is not the name of a shard" in message(sharded)


def test_tensor_in_two_shards(sharded):
    extra = {"model.transformer.ln_f.weight": torch.ones(64)}
    save_file(extra, sharded / "model-00004-of-00004.safetensors")
    index = json.loads(index_of(sharded).read_text())
    index["weight_map"]["other"] = "model-00004-of-00004.safetensors"
    index_of(sharded).write_text(json.dumps(index))
    assert "ln_f.weight" in message(sharded)


# Anything at all


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    models.write_model(folder, "llada", d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, mlp_hidden_size=8)
    return folder, {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["config.json", "model.safetensors"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.booleans(),
)
def test_any_damage_loads_or_is_a_checkpoint_error(fuzz_folder, name, edits, cut):
    """Bytes changed anywhere in config.json or in the header of the weights, or cut off there."""
    folder, originals = fuzz_folder
    data = bytearray(originals[name])
    end = len(data) if name == "config.json" else 8 + header_of(data)[0]
    for where, value in edits:
        data[int(where * (end - 1))] = value
    if cut:
        del data[int(edits[0][0] * (end - 1)) :]
    try:
        (folder / name).write_bytes(data)
        Engine.from_pretrained(folder)
    except CheckpointError as e:
        assert str(e)
    finally:
        (folder / name).write_bytes(originals[name])


# The hub


def download_error(monkeypatch, error):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def http_error(cls):
    from unittest.mock import MagicMock

    return cls("from the server", response=MagicMock())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_errors.LocalEntryNotFoundError("offline"), ["no connection", "not in the cache", "HF_HUB_OFFLINE"]),
        (http_error(hub_errors.RepositoryNotFoundError), ["neither a local folder nor a Hugging Face repository"]),
        (http_error(hub_errors.GatedRepoError), ["gated", "log in"]),
        (http_error(hub_errors.RevisionNotFoundError), ["no revision 'main2'"]),
        (http_error(hub_errors.HfHubHTTPError), ["could not be downloaded", "from the server"]),
        (hub_errors.HFValidationError("bad id"), ["could not be downloaded", "bad id"]),
        (OSError(28, "No space left on device"), ["could not be downloaded", "No space left"]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_download_errors(monkeypatch, error, words):
    download_error(monkeypatch, error)
    text = message("some/model", revision="main2")
    assert "some/model" in text
    assert all(word in text for word in words)


def test_offline(monkeypatch, tmp_path):
    """With the real library, offline and with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    text = message("some/model")
    assert str(tmp_path) in text and "HF_HUB_OFFLINE" in text


def test_download_takes_data_only(monkeypatch, llada_files):
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        return str(llada_files)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert Engine.from_pretrained("some/model", revision="v1").folder == llada_files
    ((repo, options),) = calls
    assert repo == "some/model" and options["revision"] == "v1"
    patterns = options["allow_patterns"]

    def allowed(name):
        return any(fnmatch.fnmatch(name, p) for p in patterns)

    wanted = ["config.json", "model-00001-of-00006.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += ["tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja"]
    assert all(allowed(name) for name in wanted)
    unwanted = ["pytorch_model.bin", "modeling_llada.py", "tokenization_dream.py", "model.pt", "x.pkl", "model.ckpt"]
    assert not any(allowed(name) for name in [*unwanted, "README.md", "onnx/model.onnx", "training_args.bin"])


@pytest.mark.parametrize("name", ["a/b/c", "a b/c", "/a", "a/", "-a/b", "a\\b", "a/b?c", "a/../b"])
def test_what_is_no_repository_is_never_asked_for(monkeypatch, name):
    download_error(monkeypatch, AssertionError("asked the hub"))
    assert "does not exist" in message(name)


def test_local_folder_goes_before_the_hub(monkeypatch, llada_files):
    download_error(monkeypatch, AssertionError("asked the hub"))
    monkeypatch.chdir(llada_files.parent.parent)
    name = f"{llada_files.parent.name}/model"
    assert Engine.from_pretrained(name).spec.family == "llada"


@pytest.mark.parametrize("revision", [3, b"main", True], ids=repr)
def test_revision_of_wrong_type(revision):
    with pytest.raises(ConfigError, match="revision"):
        Engine.from_pretrained("some/model", revision=revision)


def test_revision_of_a_local_folder(llada_files):
    with pytest.raises(ConfigError, match="revision = 'main'"):
        Engine.from_pretrained(llada_files, revision="main")
    with pytest.raises(ConfigError, match="revision = 'main'"):
        Engine.from_pretrained("mini-llada", revision="main")


def test_bundled_model_is_there():
    assert (hub.BUNDLED["mini-llada"] / "config.json").is_file()
    assert hub.model_folder("mini-llada") == hub.BUNDLED["mini-llada"]
