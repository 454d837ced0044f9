"""The published models' own files: every tensor name, special ids, Dream's tokenizer, and one layer at full width."""

import gzip
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import loops
from reference.model import ReferenceModel
from safetensors import safe_open

from dllm_ext import Engine
from dllm_ext._C import ModelSpec
from dllm_ext.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data" / "published"
LLADA, DREAM = DATA / "LLaDA-8B-Instruct", DATA / "Dream-v0-Instruct-7B"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def spec_of(config):
    return ModelSpec.from_config(json.dumps(config))


@pytest.mark.parametrize("folder", [LLADA, DREAM], ids=lambda f: f.name)
def test_every_tensor_name_maps_to_a_slot_and_back(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    slots = spec_of(config_of(folder)).tensors()
    assert sorted(name for name, _ in slots) == sorted(index["weight_map"])
    assert len({name for name, _ in slots}) == len(slots)
    assert 2 * sum(math.prod(shape) for _, shape in slots) == index["metadata"]["total_size"]  # bf16


def test_the_published_configs_are_read_as_documented():
    llada, dream = spec_of(config_of(LLADA)), spec_of(config_of(DREAM))
    assert (llada.family, llada.n_layers, llada.n_heads, llada.n_kv_heads, llada.head_dim) == ("llada", 32, 32, 32, 128)
    assert (llada.mask_id, llada.eos_id, llada.stop_ids) == (126336, 126081, [126081, 126348])
    assert (llada.logit_shift, llada.qkv_bias, llada.rope_full_precision) == (False, False, True)
    assert (llada.max_positions, llada.mlp_hidden, llada.rope_theta) == (4096, 12288, 500000.0)
    assert (dream.family, dream.n_layers, dream.n_heads, dream.n_kv_heads, dream.head_dim) == ("dream", 28, 28, 4, 128)
    assert (dream.mask_id, dream.eos_id, dream.stop_ids) == (151666, 151643, [151643, 151645])
    assert (dream.logit_shift, dream.qkv_bias, dream.rope_full_precision) == (True, True, False)
    assert (dream.max_positions, dream.mlp_hidden, dream.rope_theta) == (131072, 18944, 1e6)
    assert not llada.tied_head and not dream.tied_head


def test_a_mask_id_that_the_config_leaves_out_is_the_familys():
    for folder, mask in ((LLADA, 126336), (DREAM, 151666)):
        config = config_of(folder)
        del config["mask_token_id"]
        assert spec_of(config).mask_id == mask


@pytest.fixture(scope="module")
def dream_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dream")
    for file in DREAM.iterdir():
        if file.suffix == ".gz":
            with gzip.open(file) as packed, open(folder / file.stem, "wb") as out:
                shutil.copyfileobj(packed, out)
        elif file.name != "model.safetensors.index.json":
            shutil.copy(file, folder)
    spec = spec_of(config_of(DREAM))
    return Tokenizer(folder, spec.family, spec.vocab_size, spec.stop_ids)


def test_dreams_tokenizer_gives_its_published_ids(dream_tokenizer):
    ids = dream_tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert ids[:2] == [151644, 8948]  # <|im_start|> system
    assert ids.count(151644) == 3 and ids.count(151645) == 2
    text = "def f(x):\n    return x ** 2  # été 😀"
    plain = dream_tokenizer.encode(text)
    assert dream_tokenizer.decode(plain) == text
    assert dream_tokenizer.decode([*plain, 151645, 1]) == text  # the end of the turn ends the text
    assert dream_tokenizer.encode("<|mask|>") == [151666]
    assert dream_tokenizer.encode("<|beginoftext|>") == [151665]


def write_full_width(folder, config, seed):
    """One layer of the published width. The rows of every matrix are shifted copies of one random block: as good as
    random to the model, and quick to write."""
    spec = spec_of(config)
    block = np.random.Generator(np.random.PCG64(seed)).standard_normal(1 << 20, dtype=np.float32)
    header, end = {}, 0
    for name, shape in spec.tensors():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for i, (name, shape) in enumerate(spec.tensors()):
            matrix = len(shape) == 2
            embedding = i == 0
            scale = 1.0 if embedding else 2.5 * shape[-1] ** -0.5 if matrix else 0.1
            values = torch.from_numpy(np.roll(block, 7919 * i)) * scale + (0.0 if matrix or "bias" in name else 1.0)
            packed = values.to(torch.bfloat16).view(torch.int16).numpy()
            left, start = math.prod(shape), 0
            while left:
                n = min(left, packed.size - start)
                out.write(packed[start : start + n].tobytes())
                left, start = left - n, (start + 40507 * shape[-1] + 1009) % (packed.size // 2)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "layers"), [(LLADA, "n_layers"), (DREAM, "num_hidden_layers")], ids=["llada", "dream"]
)
def test_one_layer_of_the_published_width_equals_the_oracle(folder, layers, tmp_path):
    config = config_of(folder) | {layers: 1}
    write_full_width(tmp_path, config, seed=1)
    prompt = [17, 90000, 3, 55555, 1234, 777, 8]
    settings = dict(gen_length=6, block_length=4, threshold=0.5, cache="dual", stop_at_eos=False)
    engine = Engine.from_pretrained(tmp_path, dtype="float32")
    result = engine.generate(prompt, **settings)
    del engine
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (no dict)
    with torch.inference_mode():
        run = loops.generate(ReferenceModel(config, tensors, torch.float32), prompt, loops.Options(**settings))
    assert result.token_ids == run.token_ids
    assert result.nfe == run.nfe
    assert run.margin > 1e-4
    (tmp_path / "model.safetensors").unlink()
