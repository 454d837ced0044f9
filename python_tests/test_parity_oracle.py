"""The engine against the oracle (python_tests/reference): the same tokens, step by step, and the same work counted.

The engine runs in fp32, the oracle in fp64. The smallest margin of any decision of the oracle (how far the nearest
alternative was) is reported at the end of the run; no case is left out for being close.
"""

import models
import pytest
import torch
from parity import (
    ALL_CACHES,
    CACHES,
    DECODERS,
    FAMILIES,
    SHAPES,
    Pair,
    check,
    is_legal,
    options_of,
    pair_of,
    prompt_of,
    run_engine,
)
from reference import loops
from reference.loops import Options
from reference.model import ReferenceModel

from dllm_ext import Engine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("cache,decoder", [(c, d) for c in ALL_CACHES for d in DECODERS if is_legal(d, c)])
@pytest.mark.parametrize("family", FAMILIES)
def test_grid(report, record_property, family, cache, decoder):
    """Every decoder with every cache, on every shape (the costlier caches on two)."""
    pair = pair_of(family, stops=True)
    smallest = float("inf")
    for shape in SHAPES if cache in CACHES else SHAPES[:2]:
        where = f"{family}, {cache}, {decoder}, {shape}"
        run = check(pair, prompt_of(family, shape[0]), options_of(decoder, shape, cache), report, where)
        smallest = min(smallest, run.margin)
    record_property("smallest_margin", smallest)


@pytest.mark.parametrize("family", FAMILIES)
def test_grid_is_not_trivial(family):
    """The generations of the grid stop early here and there, and caches and decoders lead to different texts."""
    oracle = pair_of(family, stops=True).oracle
    stopped, texts = [], []
    for decoder in ("threshold", "factor", "steps 3", "temperature", "steps entropy", "dream entropy", "guidance"):
        for cache in CACHES:
            for shape in SHAPES[:2]:
                run = loops.generate(oracle, prompt_of(family, shape[0]), options_of(decoder, shape, cache))
                stopped.append(any(i in run.token_ids[:-1] for i in oracle.shape.stop_ids))
                if shape == SHAPES[0]:
                    texts.append(tuple(run.token_ids))
    assert 0.1 < sum(stopped) / len(stopped) < 0.9
    assert len(set(texts)) > 0.6 * len(texts)


@pytest.mark.parametrize("cache", ALL_CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_infill(report, family, cache):
    """Masked prompt positions are filled with block 0, and are data where infill is off; alone or beside generation."""
    pair = pair_of(family)
    mask = pair.oracle.shape.mask_id
    for decoder, holes, gen_length in (
        ("steps 3", (2, 3, 6, 8), 12),
        ("threshold", (8,), 12),
        ("threshold", (1, 7), 0),
        ("temperature", (5, 6, 7), 10),
        ("guidance", (4,), 9),
    ):
        prompt = prompt_of(family, 9, seed=4)
        for i in holes:
            prompt[i] = mask
        for infill in (False, True):
            if gen_length or infill:
                o = options_of(decoder, (9, gen_length, 5), cache, infill=infill, stop_at_eos=infill)
                run = check(pair, prompt, o, report, f"{family}, {cache}, {decoder}, holes {holes}, infill {infill}")
                assert (mask in run.prompt_ids) == (not infill)


@pytest.mark.parametrize("cache", CACHES)
def test_empty_prompt(report, cache):
    """LLaDA without a prompt. Identical masked rows are equal up to rounding, so noise or threshold 0 must decide."""
    for decoder in ("threshold 0", "steps random", "dream random"):
        for shape in ((0, 12, 12), (0, 13, 5)):
            o = options_of(decoder, shape, cache, temperature=1.0)
            check(pair_of("llada"), [], o, report, f"llada, {cache}, {decoder}, {shape}")


VARIANTS = {
    "grouped queries": ("llada", {"n_kv_heads": 2}),
    "one kv head": ("llada", {"n_kv_heads": 1, "n_heads": 8}),
    "qkv bias": ("llada", {"include_qkv_bias": True}),
    "tied": ("llada", {"weight_tying": True}),
    "three shards": ("llada", {"shards": 3}),
    "stored in bf16": ("llada", {"dtype": torch.bfloat16}),
    "odd sizes": ("llada", {"d_model": 60, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 77, "embedding_size": 301,
                            "vocab_size": 301, "n_layers": 1}),
    "mask id 0": ("llada", {"mask_token_id": 0}),
    "two eos ids": ("llada", {"eos_token_id": [291, 40, 41]}),
    "dream, tied": ("dream", {"tie_word_embeddings": True}),
    "dream, every head its own": ("dream", {"num_key_value_heads": 4}),
    "dream, one wide head": ("dream", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "dream, two shards": ("dream", {"shards": 2}),
    "dream, last id is the mask": ("dream", {"mask_token_id": 319, "num_hidden_layers": 4}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_variants(tmp_path, report, variant):
    family, changes = VARIANTS[variant]
    pair = Pair.from_folder(models.write_model(tmp_path, family, seed=2, **changes))
    for cache in ALL_CACHES:
        for decoder in ("threshold", "temperature"):
            where = f"{variant}, {cache}, {decoder}"
            check(pair, list(range(20, 27)), options_of(decoder, (7, 18, 6), cache), report, where)


def test_released_vocabulary(tmp_path, report):
    """With LLaDA's own vocabulary the end of turn (126348) stops too, though config.json does not name it."""
    sizes = {
        "vocab_size": 126464,
        "embedding_size": 126464,
        "d_model": 32,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 1,
    }
    config = models.llada_config(**sizes, eos_token_id=126081, mask_token_id=126336)
    tensors = models.random_tensors(config)
    prompt, o = list(range(100, 106)), Options(gen_length=10, block_length=5, num_transfer_tokens=1, cache="dual")
    middle = loops.generate(ReferenceModel(config, tensors, torch.float64), prompt, o).token_ids[4]
    head = tensors["model.transformer.ff_out.weight"]
    head[126348] = 1.02 * head[middle]  # now the end of turn is said where that token was
    pair = Pair.from_folder(models.write_folder(tmp_path, config, tensors))
    run = check(pair, prompt, o, report, "LLaDA's vocabulary")
    assert 126348 in run.token_ids[:-1] and run.token_ids[-1] == 126081
    assert run.nfe < 10


@pytest.mark.parametrize("family", FAMILIES)
def test_long_canvas(report, family):
    """More rows than the engine takes through the MLP at once, and more keys than one attention tile."""
    for cache in ALL_CACHES:
        o = options_of("threshold", (700, 41, 37), cache)
        check(pair_of(family), prompt_of(family, 700), o, report, f"{family}, {cache}, long")


def test_ties_go_to_the_lowest_id(tmp_path):
    """Every id has a twin 150 ids above it with the same LM-head row; the lower one is proposed, in any tile."""

    def twins(tensors):
        head = tensors["model.transformer.ff_out.weight"]
        head[150:] = head[:150].clone()

    folder = models.write_model(tmp_path, "llada", edit=twins, mask_token_id=299, eos_token_id=298)
    engine = Engine.from_pretrained(folder, dtype="float32")
    for decoder in ("threshold", "steps 3", "dream steps", "guidance"):
        for cache in CACHES:
            (result,), _ = run_engine(engine, [list(range(10, 20))], options_of(decoder, (10, 24, 8), cache))
            assert len(set(result.token_ids)) > 3
            assert max(x for x in result.token_ids if x != 298) < 150


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_agreement(report, record_property, family, tmp_path):
    """Not equality: rounding differs by design (the engine's residual stream is fp32). The share is reported."""
    folder = models.write_model(tmp_path, family)
    engine = Engine.from_pretrained(folder, dtype="bfloat16")
    half = ReferenceModel.from_folder(folder, torch.bfloat16)
    exact = ReferenceModel.from_folder(folder, torch.float64)
    equal = {"engine = bf16 oracle": 0, "engine = fp64 oracle": 0, "bf16 oracle = fp64 oracle": 0}
    total = 0
    for cache in CACHES:
        for seed in range(6):
            prompt = prompt_of(family, 12, seed=seed)
            o = Options(gen_length=16, block_length=8, threshold=0.5, cache=cache, stop_at_eos=False)
            (result,), _ = run_engine(engine, [prompt], o)
            half_ids, exact_ids = (loops.generate(m, prompt, o).token_ids for m in (half, exact))
            for a, b, c in zip(result.token_ids, half_ids, exact_ids, strict=True):
                equal["engine = bf16 oracle"] += a == b
                equal["engine = fp64 oracle"] += a == c
                equal["bf16 oracle = fp64 oracle"] += b == c
                total += 1
    report.lines.append(
        f"{family} in bf16, equal tokens: " + ", ".join(f"{k} {v / total:.1%}" for k, v in equal.items())
    )
    record_property("equal_tokens", equal["engine = bf16 oracle"] / total)
    assert equal["engine = bf16 oracle"] / total > 0.5
