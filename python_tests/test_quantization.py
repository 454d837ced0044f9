"""Models with quantised linear layers: the oracle's tokens, quantised on load or before, and wrong checkpoints."""

import json

import models
import pytest
import torch
from parity import ALL_CACHES, Pair, check
from reference.loops import Options
from reference.model import ReferenceModel
from reference.quantized import QuantizedModel
from safetensors.torch import load_file, save_file
from test_native_tool import editable
from test_native_tool import run as run_tool

import dllm_ext
from dllm_ext import CheckpointError, ConfigError, Engine, NumericalError

FORMATS = ("int8", "int4")
# Several groups along K, the last one ragged; odd numbers of terms.
SIZES = {
    "llada": {"d_model": 72, "mlp_hidden_size": 161},
    "dream": {"hidden_size": 72, "intermediate_size": 161},
}
TIED = {"llada": "weight_tying", "dream": "tie_word_embeddings"}
VARIANTS = [(family, tied) for family in models.FAMILIES for tied in (False, True)]
PROMPTS = [[5, 17, 99, 3, 250, 40, 8], [1], list(range(30, 60))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(family, tied, None | format) -> a model folder, written when first asked for."""
    root = tmp_path_factory.mktemp("quantized")

    def folder(family, tied, fmt=None, dtype=torch.float32):
        path = root / f"{family}-{tied}-{fmt}-{dtype}"
        if not path.exists() and fmt is None:
            models.write_model(path, family, seed=4, dtype=dtype, **SIZES[family], **{TIED[family]: tied})
        elif not path.exists():
            dllm_ext.quantize(folder(family, tied, dtype=dtype), path, fmt)
        return path

    return folder


def message(folder, error=CheckpointError, **options):
    with pytest.raises(error) as e:
        Engine.from_pretrained(folder, **options)
    return str(e.value)


# Against the oracle
#
# Rounding activations to 8 bits is a step function: where fp32 and fp64 fall on different sides of a step, everything
# behind it is rounded anew, and an equally good result comes out. A trained model decides by margins that this cannot
# bridge, a random one does not.


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("cache", ALL_CACHES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_trained_model_gives_the_oracles_tokens(tmp_path, report, fmt, cache):
    """Every step of every generation, and the counters.

    dLLM-Cache verifies all rows here: which V changed least is a choice among nearly equal ones, and an activation that
    is rounded to the other side, as fp32 and fp64 do now and then, moves V by more than they differ.
    """
    every_row = {"kp": 6, "kr": 4, "rou": 1.0} if cache == "dllm" else {}
    folder = dllm_ext.quantize("mini-llada", tmp_path / "model", fmt)
    pair = Pair(Engine.from_pretrained(folder, dtype="float32"), QuantizedModel.from_folder(folder))
    for question in (
        "Tom has 12 apples. He buys 5 more. Then he loses 3. How many apples does Tom have now?",
        "Sam has 4 coins. He wins 9 more. How many coins does Sam have now?",
    ):
        prompt = pair.engine.encode(question)
        for rule in ({"threshold": 0.9}, {"num_transfer_tokens": 2}, {"threshold": 0.8, "remasking": "topk_margin"}):
            o = Options(gen_length=32, block_length=16, cache=cache, **rule, **every_row)
            check(pair, prompt, o, report, f"mini-llada, {fmt}, {cache}, {rule}")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("family,tied", VARIANTS)
def test_random_models_nearly_always_do(folders, family, tied, fmt):
    """One forward over many canvases: far fewer other tokens than from the exact weights, and none but close ones."""
    folder = folders(family, tied, fmt)
    engine = Engine.from_pretrained(folder, dtype="float32")
    oracle = QuantizedModel.from_folder(folder)
    exact = ReferenceModel.from_folder(folders(family, tied), torch.float64)
    other, other_than_exact, count = 0, 0, 0
    for seed in range(40):
        prompt = models.random_prompt(models.config_of(family), 8, seed=seed)
        fields = {"gen_length": 16, "block_length": 16, "threshold": 0.0, "stop_at_eos": False, "cache": "none"}
        tokens = torch.tensor(engine.generate(prompt, **fields).token_ids)
        canvas = prompt + [oracle.shape.mask_id] * 16
        logits, exact_logits = (best_logits(model, canvas, 16) for model in (oracle, exact))
        gaps = logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]
        assert gaps.max() < 0.1 * logits[logits.isfinite()].std()
        other += int((gaps > 0).sum())
        other_than_exact += int((exact_logits.argmax(-1) != tokens).sum())
        count += 16
    assert other < 0.02 * count and other < other_than_exact / 2, (other, other_than_exact, count)


def best_logits(model, canvas, count):
    """Logits [count, V] of the last `count` positions, the mask id excluded."""
    logits = model.full_logits(canvas)[len(canvas) - count - model.shape.shift : len(canvas) - model.shape.shift]
    logits[:, model.shape.mask_id] = -torch.inf
    return logits


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_weight_bytes(folders, family, fmt):
    """Small layers are padded to 64 terms: a little more than a quarter, or an eighth."""
    exact = Engine.from_pretrained(folders(family, False), dtype="float32")
    engine = Engine.from_pretrained(folders(family, False, fmt), dtype="float32")
    low, high = {"int8": (0.25, 0.5), "int4": (0.13, 0.35)}[fmt]
    assert low < engine.weight_bytes / exact.weight_bytes < high


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("family,tied", VARIANTS)
def test_quantised_on_load_or_before(folders, family, tied, fmt, stored, dtype):
    on_load = Engine.from_pretrained(folders(family, tied, dtype=stored), dtype=dtype, quantization=fmt)
    before = Engine.from_pretrained(folders(family, tied, fmt, stored), dtype=dtype)
    again = Engine.from_pretrained(folders(family, tied, fmt, stored), dtype=dtype, quantization=fmt)
    for engine in (on_load, before, again):
        assert engine.quantization == fmt and fmt in repr(engine)
        assert engine.weight_bytes == on_load.weight_bytes
    for settings in ({"threshold": 0.4, "cache": "dual"}, {"steps": 20, "temperature": 0.7, "cfg_scale": 0.5}):
        results = [
            [r.token_ids for r in engine.generate(PROMPTS, gen_length=20, block_length=10, **settings)]
            for engine in (on_load, before, again)
        ]
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("cache", ALL_CACHES)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_batch_gives_what_its_prompts_give_alone(folders, family, fmt, cache):
    for dtype in ("float32", "bfloat16"):
        engine = Engine.from_pretrained(folders(family, False, fmt), dtype=dtype)
        settings = {"gen_length": 20, "block_length": 8, "threshold": 0.4, "cache": cache}
        together = engine.generate(PROMPTS, **settings)
        for prompt, result in zip(PROMPTS, together, strict=True):
            assert engine.generate(prompt, **settings).token_ids == result.token_ids


@pytest.mark.parametrize("family,tied", VARIANTS)
def test_progress_ends_at_the_total(folders, family, tied):
    for stored, asked in ((None, None), (None, "int4"), ("int8", None)):
        calls = []
        dllm_ext._C.Engine(
            str(folders(family, tied, stored)), "float32", asked, progress=lambda *call, calls=calls: calls.append(call)
        )
        done, totals = zip(*calls, strict=True)
        assert list(done) == sorted(done) and len(set(totals)) == 1 and done[-1] == totals[0]


def test_auto_dtype_is_that_of_what_is_not_quantised(folders):
    engine = Engine.from_pretrained(folders("llada", False, "int8"))
    assert engine.dtype == "float32"
    has_bf16 = "bf16" in dllm_ext._C.info()["isa"]
    engine = Engine.from_pretrained(folders("llada", False, "int4", torch.bfloat16))
    assert engine.dtype == ("bfloat16" if has_bf16 else "float32")


@pytest.mark.skipif(not editable, reason="only an editable install builds the tools")
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_native_tool(folders, fmt):
    """--quantization, or a checkpoint that is quantised: Python's tokens."""
    expected = Engine.from_pretrained(folders("dream", False), dtype="float32", quantization=fmt).generate(
        PROMPTS[0], gen_length=24, threshold=0.4, cache="dual"
    )
    options = ("--gen-length", 24, "--threshold", 0.4, "--cache", "dual")
    for outcome in (
        run_tool(folders("dream", False), "--quantization", fmt, *options, ids=PROMPTS[0]),
        run_tool(folders("dream", False, fmt), *options, ids=PROMPTS[0]),
    ):
        assert outcome.returncode == 0, outcome.stderr
        assert [int(t) for t in outcome.stdout.split(",")] == expected.token_ids
    outcome = run_tool(folders("dream", False), "--quantization", "int2", ids=PROMPTS[0])
    assert outcome.returncode == 2 and "none, int8 or int4" in outcome.stderr


# Numbers that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_that_are_not_finite(tmp_path, fmt, bad):
    """The engine stops, as with any precision; `quantize` names the tensor and leaves nothing behind."""
    name = "model.transformer.blocks.1.up_proj.weight"

    def poison(tensors):
        tensors[name][3, 7] = bad

    folder = models.write_model(tmp_path / "model", "llada", edit=poison)
    with pytest.raises(NumericalError):
        Engine.from_pretrained(folder, dtype="float32", quantization=fmt).generate(PROMPTS[0], gen_length=8)
    with pytest.raises(CheckpointError, match=f'"{name}" holds a NaN or an infinity in row 3'):
        dllm_ext.quantize(folder, tmp_path / "out", fmt)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_activations_that_are_not_finite(tmp_path, fmt):
    """An infinite embedding, which is not quantised, makes the first layer's input NaN."""

    def poison(tensors):
        tensors["model.embed_tokens.weight"][:, 5] = float("inf")

    folder = models.write_model(tmp_path / "model", "dream", edit=poison)
    with pytest.raises(NumericalError):
        Engine.from_pretrained(folder, dtype="float32", quantization=fmt).generate(PROMPTS[0], gen_length=8)


# Checkpoints that are wrong


@pytest.fixture
def copy_of(folders, tmp_path):
    """A copy of the quantised LLaDA checkpoint, its tensors and config.json changed by functions of a dict."""

    def make(fmt, edit=None, edit_config=None):
        source, folder = folders("llada", False, fmt), tmp_path / f"copy-{fmt}"
        folder.mkdir()
        tensors = load_file(source / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        (edit or (lambda t: None))(tensors)
        (edit_config or (lambda c: None))(config)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("stored,asked", [("int8", "int4"), ("int4", "int8")])
def test_another_format_than_the_checkpoints(folders, stored, asked):
    text = message(folders("dream", True, stored), ConfigError, quantization=asked)
    assert f'quantization = "{asked}" is not allowed: the checkpoint is {stored} already' in text


LAYER = "model.transformer.blocks.1.q_proj.weight"
DOWN = "model.transformer.blocks.0.ff_out.weight"
HEAD = "model.transformer.ff_out.weight"
WRONG_TENSORS = [
    ("int8", LAYER + "_scale", lambda t: None, "is missing"),
    ("int8", HEAD + "_scale", lambda t: None, "is missing"),
    ("int4", LAYER + "_scale", lambda t: None, "is missing"),
    ("int4", LAYER, lambda t: None, "is missing"),
    ("int8", LAYER, lambda t: t.float(), "has dtype F32; int8 has I8"),
    ("int8", LAYER, lambda t: t.view(torch.uint8), "has dtype U8; int8 has I8"),
    ("int8", LAYER, lambda t: t[:-1], "has shape [71, 72]"),
    ("int8", LAYER, lambda t: t[:, :-1], "has shape [72, 71]"),
    ("int8", LAYER, lambda t: t.flatten(), "has shape [5184]"),
    ("int8", LAYER + "_scale", lambda t: t.bfloat16(), "has dtype BF16; int8 has F32"),
    ("int8", LAYER + "_scale", lambda t: t.double(), "has dtype F64; int8 has F32"),
    ("int8", LAYER + "_scale", lambda t: t[1:], "has shape [71]"),
    ("int8", LAYER + "_scale", lambda t: t[:, None], "has shape [72, 1]"),
    ("int4", LAYER, lambda t: t.view(torch.int8), "has dtype I8; int4 has U8"),
    ("int4", LAYER, lambda t: torch.cat((t, t), 1), "has shape [72, 72]"),
    ("int4", DOWN, lambda t: t[:, :80], "has shape [72, 80]"),
    ("int4", LAYER + "_scale", lambda t: t.float(), "has dtype F32; int4 has BF16"),
    ("int4", LAYER + "_scale", lambda t: t[:, :1], "has shape [72, 1]"),
    ("int4", DOWN + "_scale", lambda t: t.T, "has shape [3, 72]"),
    ("int4", HEAD, lambda t: t.view(torch.uint8), "has dtype U8; int8 has I8"),
    ("int4", HEAD + "_scale", lambda t: t.bfloat16(), "has dtype BF16; int8 has F32"),
    ("int8", "model.transformer.wte.weight", lambda t: t.char(), "has dtype I8; F32 and BF16"),
]


@pytest.mark.parametrize("fmt,name,change,text", WRONG_TENSORS, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_tensors(copy_of, fmt, name, change, text):
    def edit(tensors):
        tensors[name] = change(tensors[name])
        if tensors[name] is None:
            del tensors[name]

    found = message(copy_of(fmt, edit))
    assert f'tensor "{name}" {text}' in found


@pytest.mark.parametrize(
    "value,text",
    [
        ({"quant_method": "gptq", "bits": 4}, 'only quant_method "dllm"'),
        ({"quant_method": "bitsandbytes", "format": "int8"}, 'only quant_method "dllm"'),
        ({"quant_method": 4, "format": "int8"}, 'only quant_method "dllm"'),
        ({"quant_method": ["dllm"], "format": "int8"}, 'only quant_method "dllm"'),
        ({"format": "int8"}, 'only quant_method "dllm"'),
        ({}, 'only quant_method "dllm"'),
        ({"quant_method": "dllm"}, "format is missing"),
        ({"quant_method": "dllm", "format": "int2"}, 'format = "int2" is not supported'),
        ({"quant_method": "dllm", "format": "none"}, 'format = "none" is not supported'),
        ({"quant_method": "dllm", "format": 8}, "format"),
        ({"quant_method": "dllm", "format": None}, "format"),
        ("int8", "quantization_config"),
        (["dllm", "int8"], "quantization_config"),
        (8, "quantization_config"),
        (True, "quantization_config"),
        ({"quant_method": "dllm", "format": "int4"}, "has shape"),  # but the tensors are int8
        (None, "has dtype I8; F32 and BF16 are supported"),
    ],
    ids=str,
)
def test_wrong_quantization_config(copy_of, value, text):
    folder = copy_of("int8", edit_config=lambda config: config.update(quantization_config=value))
    found = message(folder)
    assert text in found
    with pytest.raises((CheckpointError, ConfigError)):
        dllm_ext.quantize(folder, folder / "out", "int8")


def test_a_plain_checkpoint_that_says_it_is_quantised(folders, tmp_path):
    config = json.loads((folders("llada", False) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "dllm", "format": "int8"}
    folder = models.write_folder(tmp_path / "model", config, load_file(folders("llada", False) / "model.safetensors"))
    assert "_scale" in message(folder) or "has dtype F32; int8 has I8" in message(folder)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_stored_scales_that_are_not_finite(copy_of, fmt, bad):
    folder = copy_of(fmt, lambda tensors: tensors[LAYER + "_scale"].view(-1)[5:6].fill_(bad))
    with pytest.raises(NumericalError):
        Engine.from_pretrained(folder, dtype="float32").generate(PROMPTS[0], gen_length=8)


def test_the_half_byte_behind_an_odd_row_is_not_read(copy_of, folders):
    def edit(tensors):
        tensors[DOWN][:, -1] ^= 0xF0

    fields = {"gen_length": 20, "num_transfer_tokens": 2, "cache": "dual"}
    a, b = (Engine.from_pretrained(f).generate(PROMPTS[0], **fields).token_ids
            for f in (copy_of("int4", edit), folders("llada", False, "int4")))  # fmt: skip
    assert a == b


def test_rows_too_long_for_int8(tmp_path):
    sizes = {"d_model": 4, "n_heads": 1, "n_kv_heads": 1, "n_layers": 1, "mlp_hidden_size": 65537}
    folder = models.write_model(tmp_path / "long", "llada", **sizes)
    assert "65536 input columns; there is a layer with 65537" in message(folder, ConfigError, quantization="int8")
    assert len(Engine.from_pretrained(folder, quantization="int4").generate([1], gen_length=2).token_ids) == 2
