"""The engine against the oracle (python_tests/reference): the same tokens, step by step, and the same work counted.

The engine runs in fp32, the oracle in fp64. The smallest margin of any decision of the oracle (how far the nearest
alternative was) is reported at the end of the run; no case is left out for being close.
"""

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import models
import pytest
import torch
from reference import loops
from reference.loops import Options
from reference.model import ReferenceModel

from dllm_ext import Engine

FAMILIES = models.FAMILIES
CACHES = ("none", "prefix", "dual")

# (prompt length, gen_length, block_length): whole blocks, a ragged last block, blocks of one, one block for everything
SHAPES = [(9, 24, 8), (5, 19, 7), (1, 6, 1), (12, 11, 16)]

# Settings of a generation; "per_block" steps per block stand for `steps`.
DECODERS = {
    "default": {},
    "threshold": {"threshold": 0.4},
    "threshold 0": {"threshold": 0.0},
    "threshold 1": {"threshold": 1.0},
    "threshold margin": {"threshold": 0.25, "remasking": "topk_margin"},
    "threshold, at least 3": {"threshold": 0.7, "num_transfer_tokens": 3},
    "factor": {"factor": 1.1},
    "factor margin": {"factor": 2.0, "remasking": "topk_margin"},
    "factor, at least 2": {"factor": 0.5, "num_transfer_tokens": 2},
    "2 per step": {"num_transfer_tokens": 2},
    "2 per step, entropy": {"num_transfer_tokens": 2, "remasking": "entropy"},
    "steps 1": {"per_block": 1},
    "steps 3": {"per_block": 3},
    "steps 30": {"per_block": 30},
    "steps margin": {"per_block": 5, "remasking": "topk_margin"},
    "steps entropy": {"per_block": 5, "remasking": "entropy"},
    "steps random": {"per_block": 5, "remasking": "random", "seed": 3},
    "steps, at least 3": {"per_block": 6, "num_transfer_tokens": 3},
    "temperature": {"per_block": 6, "temperature": 0.8, "seed": 1},
    "temperature, threshold": {"threshold": 0.5, "temperature": 1.3, "seed": 2**40 + 7},
    "temperature, filters": {"per_block": 4, "temperature": 0.9, "top_p": 0.8, "top_k": 12, "seed": 5},
    "temperature, entropy": {"per_block": 4, "temperature": 1.0, "remasking": "entropy", "top_k": 7},
    "top_p": {"threshold": 0.6, "top_p": 0.7},
    "top_k 1": {"per_block": 4, "top_k": 1},
    "dream steps": {"schedule": "dream", "per_block": 5},
    "dream entropy": {"schedule": "dream", "per_block": 6, "remasking": "entropy", "temperature": 0.3, "top_p": 0.95},
    "dream margin": {"schedule": "dream", "per_block": 4, "remasking": "topk_margin", "temperature": 1.2, "top_k": 9},
    "dream random": {"schedule": "dream", "per_block": 4, "remasking": "random", "temperature": 0.5},
    "dream origin": {"schedule": "dream", "per_block": 4, "remasking": "origin"},
    "dream origin, temperature": {"schedule": "dream", "per_block": 7, "remasking": "origin", "temperature": 0.9},
    "dream alg_temp": {"schedule": "dream", "per_block": 5, "alg_temp": 0.3, "seed": 8},
    "dream alg_temp, entropy": {"schedule": "dream", "per_block": 5, "alg_temp": 1.5, "remasking": "entropy"},
    "dream eps": {"schedule": "dream", "per_block": 8, "eps": 0.2, "num_transfer_tokens": 1},
    "dream threshold": {"schedule": "dream", "threshold": 0.6, "temperature": 0.7, "top_p": 0.9},
    "llada alg_temp": {"per_block": 4, "alg_temp": 0.2},
    "guidance": {"per_block": 5, "cfg_scale": 1.5},
    "guidance, all of it": {
        "threshold": 0.5,
        "cfg_scale": 0.5,
        "temperature": 0.6,
        "top_p": 0.9,
        "logits_eos_inf": True,
    },
    "eos never": {"per_block": 5, "logits_eos_inf": True},
    "eos late": {"per_block": 5, "confidence_eos_eot_inf": True},
    "eos late, margin": {
        "threshold": 0.5,
        "confidence_eos_eot_inf": True,
        "remasking": "topk_margin",
        "temperature": 0.4,
    },
    "no stop": {"per_block": 5, "stop_at_eos": False},
}


@dataclass
class Pair:
    """The same model twice."""

    engine: Engine
    oracle: ReferenceModel


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """pair_of(family, **what write_model takes) -> Pair, made once."""

    @lru_cache
    def make(family, dtype="float32", **changes):
        folder = models.write_model(tmp_path_factory.mktemp(family), family, **changes)
        return Pair(Engine.from_pretrained(folder, dtype=dtype), ReferenceModel.from_folder(folder, torch.float64))

    @lru_cache
    def with_stops(family):
        """EOS and a second stop id are tokens that this model likes, so that generations end at all places."""
        config = models.config_of(family)
        plain = ReferenceModel(config, models.random_tensors(config), torch.float64)
        counts = torch.zeros(plain.vocab_size)
        for length, gen_length, _ in SHAPES:
            o = Options(gen_length=gen_length, block_length=4, num_transfer_tokens=1, stop_at_eos=False)
            for token in loops.generate(plain, models.random_prompt(config, length), o).token_ids:
                counts[token] += 1
        ranked = counts.sort(descending=True, stable=True).indices.tolist()
        return {"eos_token_id": ranked[4], "pad_token_id": ranked[8]}

    def pair_of(family, stops=False, **changes):
        return make(family, **(changes | (with_stops(family) if stops else {})))

    return pair_of


class Margins:
    """Smallest decision margins of the oracle, by kind, and where they were; printed in the terminal summary."""

    def __init__(self):
        self.smallest = {}
        self.runs = 0
        self.lines = []

    def note(self, run, where):
        self.runs += 1
        for kind, gap in run.margins.items():
            self.smallest[kind] = min((gap, where), self.smallest.get(kind, (float("inf"), "")))

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("engine against oracle")
        terminalreporter.line(f"{self.runs} generations; smallest gap to another decision (oracle, fp64):")
        for kind, (gap, where) in sorted(self.smallest.items(), key=lambda item: item[1]):
            terminalreporter.line(f"  {kind:<10} {gap:.3e}  {where}")
        for line in self.lines:
            terminalreporter.line(line)


@pytest.fixture(scope="module")
def margins(request):
    book = Margins()
    request.config.pluginmanager.register(book, "parity-margins")
    return book


def options_of(decoder, shape, cache, **more):
    """Options of a generation from an entry of DECODERS and of SHAPES."""
    settings = dict(DECODERS[decoder]) | more
    _, gen_length, block_length = shape
    if (per_block := settings.pop("per_block", None)) is not None:
        settings["steps"] = per_block * -(-gen_length // block_length)
    return Options(gen_length=gen_length, block_length=block_length, cache=cache, **settings)


def run_engine(engine, prompts, o, **more):
    """(results, events by prompt) of the engine for a list of prompts."""
    events = [[] for _ in prompts]
    settings = {f.name: getattr(o, f.name) for f in fields(o)}
    results = engine.generate(prompts, on_step=lambda e: events[e.sequence].append(e), **settings, **more)
    return results, events


def check(pair, prompt, o, margins, where):
    """One generation: tokens, every step's commits, and every counter are the oracle's. Returns the oracle's run."""
    (result,), (events,) = run_engine(pair.engine, [prompt], o)
    run = loops.generate(pair.oracle, prompt, o)
    margins.note(run, where)
    committed = [list(zip(e.positions, e.token_ids, strict=True)) for e in events]
    assert committed == [step.committed for step in run.steps]
    assert result.token_ids == run.token_ids
    assert result.prompt_ids == run.prompt_ids
    assert result.nfe == run.nfe

    streams = 2 if o.cfg_scale > 0 else 1
    length = len(prompt) + o.gen_length
    layers = pair.oracle.shape.n_layers
    assert [e.rows for e in events] == [len(step.rows) for step in run.steps]
    assert result.stats.rows == [streams * len(step.rows) for step in run.steps]
    assert result.stats.logit_rows == [streams * len(step.logit_rows) for step in run.steps]
    assert result.stats.commits == [len(step.committed) for step in run.steps]
    assert result.stats.attention_pairs == [  # the last layer needs only the rows that have logits
        streams * length * (len(step.rows) * (layers - 1) + len(step.logit_rows)) for step in run.steps
    ]
    return run


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_grid(pair_of, margins, record_property, family, cache, decoder):
    """Every decoder with every cache, on every shape."""
    pair = pair_of(family, stops=True)
    smallest = float("inf")
    for shape in SHAPES:
        prompt = models.random_prompt(models.config_of(family), shape[0], seed=shape[0])
        run = check(pair, prompt, options_of(decoder, shape, cache), margins, f"{family}, {cache}, {decoder}, {shape}")
        smallest = min(smallest, run.margin)
    record_property("smallest_margin", smallest)


def test_grid_is_not_trivial(pair_of):
    """The generations of the grid stop early here and there, and caches and decoders lead to different texts."""
    for family in FAMILIES:
        oracle = pair_of(family, stops=True).oracle
        stopped, texts = [], []
        for decoder in ("threshold", "factor", "steps 3", "temperature", "steps entropy", "dream entropy", "guidance"):
            for cache in CACHES:
                shape = SHAPES[0]
                prompt = models.random_prompt(models.config_of(family), shape[0], seed=shape[0])
                run = loops.generate(oracle, prompt, options_of(decoder, shape, cache))
                stopped.append(oracle.shape.eos_id in run.token_ids)
                texts.append(tuple(run.token_ids))
        assert any(stopped) and not all(stopped)
        assert len(set(texts)) > 0.6 * len(texts)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_infill(pair_of, margins, family, cache):
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
        prompt = models.random_prompt(models.config_of(family), 9, seed=4)
        for i in holes:
            prompt[i] = mask
        for infill in (False, True):
            if gen_length or infill:
                o = options_of(decoder, (9, gen_length, 5), cache, infill=infill, stop_at_eos=infill)
                run = check(pair, prompt, o, margins, f"{family}, {cache}, {decoder}, infill {infill}")
                assert (mask in run.prompt_ids) == (not infill)


@pytest.mark.parametrize("cache", CACHES)
def test_empty_prompt(pair_of, margins, cache):
    """LLaDA without a prompt. Identical masked rows are equal up to rounding, so noise or threshold 0 must decide."""
    for decoder in ("threshold 0", "steps random", "dream random"):
        for shape in ((0, 12, 12), (0, 13, 5)):
            o = options_of(decoder, shape, cache, temperature=1.0)
            check(pair_of("llada"), [], o, margins, f"llada, {cache}, {decoder}, {shape}")


VARIANTS = {
    "grouped queries": ("llada", {"n_kv_heads": 2}),
    "one kv head": ("llada", {"n_kv_heads": 1, "n_heads": 8}),
    "qkv bias": ("llada", {"include_qkv_bias": True}),
    "tied": ("llada", {"weight_tying": True}),
    "three shards": ("llada", {"shards": 3}),
    "stored in bf16": ("llada", {"stored_dtype": torch.bfloat16}),
    "odd sizes": ("llada", {"d_model": 60, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 77, "embedding_size": 301,
                            "vocab_size": 301, "n_layers": 1}),
    "mask id 0": ("llada", {"mask_token_id": 0}),
    "two eos ids": ("llada", {"eos_token_id": [40, 41]}),
    "dream, tied": ("dream", {"tie_word_embeddings": True}),
    "dream, every head its own": ("dream", {"num_key_value_heads": 4}),
    "dream, wide heads": ("dream", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "dream, two shards": ("dream", {"shards": 2}),
    "dream, last id is the mask": ("dream", {"mask_token_id": 319, "num_hidden_layers": 4}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_variants(tmp_path, margins, variant):
    family, changes = VARIANTS[variant]
    changes = dict(changes)
    dtype = changes.pop("stored_dtype", torch.float32)
    folder = models.write_model(tmp_path, family, seed=2, dtype=dtype, **changes)
    pair = Pair(Engine.from_pretrained(folder, dtype="float32"), ReferenceModel.from_folder(folder, torch.float64))
    prompt = models.random_prompt(models.config_of(family, **changes), 7, seed=2)
    for cache in CACHES:
        for decoder in ("threshold", "temperature"):
            check(pair, prompt, options_of(decoder, (7, 18, 6), cache), margins, f"{variant}, {cache}, {decoder}")


@pytest.mark.parametrize("family", FAMILIES)
def test_long_canvas(pair_of, margins, family):
    """More rows than the engine takes through the MLP at once, and more keys than one attention tile."""
    prompt = models.random_prompt(models.config_of(family), 700, seed=1)
    for cache in CACHES:
        check(
            pair_of(family), prompt, options_of("threshold", (700, 41, 37), cache), margins, f"{family}, {cache}, long"
        )


def test_ties_go_to_the_lowest_id(tmp_path):
    """Every id has a twin 150 ids above it with the same LM-head row; the lower one is proposed, in any tile."""

    def twins(tensors):
        head = tensors["model.transformer.ff_out.weight"]
        head[150:] = head[:150]

    folder = models.write_model(tmp_path, "llada", edit=twins, mask_token_id=299, eos_token_id=298)
    engine = Engine.from_pretrained(folder, dtype="float32")
    prompt = list(range(10, 20))
    for decoder in ("threshold", "steps 3", "dream steps", "guidance"):
        for cache in CACHES:
            (result,), _ = run_engine(engine, [prompt], options_of(decoder, (10, 24, 8), cache))
            assert len(set(result.token_ids)) > 3 and max(result.token_ids) < 150


# ------------------------------------------------------------------------- identities (caching.md 8.1) on the engine


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_is_exact_where_blocks_take_one_step(pair_of, family, cache):
    """8.1 no. 2: S = 1, or threshold 0 with any S."""
    engine = pair_of(family, stops=True).engine
    prompt = models.random_prompt(models.config_of(family), 11, seed=6)

    def ids(cache, **settings):
        o = Options(gen_length=20, cache=cache, **settings)
        return run_engine(engine, [prompt], o)[0][0].token_ids

    for settings in (
        {"block_length": 1},
        {"block_length": 1, "steps": 20, "temperature": 1.0},
        *({"block_length": s, "threshold": 0.0, "stop_at_eos": False} for s in (1, 3, 7, 20)),
    ):
        assert ids(cache, **settings) == ids("none", **settings)
    settings = {"block_length": 10, "num_transfer_tokens": 1, "stop_at_eos": False}
    assert ids(cache, **settings) != ids("none", **settings)  # an approximation otherwise


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cache_is_exact_where_everything_is_recomputed(pair_of, cache):
    """8.1 no. 4: LLaDA, no prompt, one block."""
    engine = pair_of("llada").engine
    for seed in range(5):
        o = Options(gen_length=24, block_length=24, steps=24, temperature=1.0, seed=seed, stop_at_eos=False)
        (cached,), _ = run_engine(engine, [[]], replace(o, cache=cache))
        (plain,), _ = run_engine(engine, [[]], replace(o, cache="none"))
        assert cached.token_ids == plain.token_ids and cached.commit_steps == plain.commit_steps
        assert cached.stats.rows == [24] * 24


def test_dream_shift(pair_of):
    """8.1 no. 9: an oracle without the shift fails, and the first position is read from row P - 1."""
    pair = pair_of("dream")
    prompt = models.random_prompt(models.config_of("dream"), 6, seed=3)
    o = Options(gen_length=8, block_length=1, num_transfer_tokens=1, cache="none", stop_at_eos=False)
    (result,), _ = run_engine(pair.engine, [prompt], o)
    canvas = torch.tensor(prompt + [pair.oracle.shape.mask_id] * 8)
    logits = pair.oracle.full_logits(canvas)
    logits[:, pair.oracle.shape.mask_id] = -float("inf")
    assert result.token_ids[0] == int(logits[5].argmax()) != int(logits[6].argmax())
    unshifted = replace(pair.oracle.shape, family="llada")
    twin = ReferenceModel(models.dream_config(), models.random_tensors(models.dream_config()), torch.float64)
    twin.shape = unshifted
    assert loops.generate(twin, prompt, o).token_ids != result.token_ids


@pytest.mark.parametrize("decoder", ["default", "factor", "steps 3", "temperature", "dream entropy", "guidance"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_each_alone(pair_of, family, cache, decoder):
    """8.1 no. 10: prompts of different lengths, for any batch size: tokens, commits and counters."""
    engine = pair_of(family, stops=True).engine
    prompts = [models.random_prompt(models.config_of(family), n, seed=n) for n in (3, 17, 1, 9, 30, 9, 2)]
    o = options_of(decoder, (0, 21, 6), cache)
    alone = [run_engine(engine, [prompt], o) for prompt in prompts]
    for batch_size in (2, 3, 7):
        results, events = run_engine(engine, prompts, o, batch_size=batch_size)
        for (expected,), (expected_events,), result, own in zip(
            *zip(*alone, strict=True), results, events, strict=True
        ):
            assert result.token_ids == expected.token_ids and result.commit_steps == expected.commit_steps
            assert [e.positions for e in own] == [e.positions for e in expected_events]
            for name in ("rows", "logit_rows", "attention_pairs", "commits"):
                assert getattr(result.stats, name) == getattr(expected.stats, name)
            assert result.nfe == expected.nfe
    assert len({len(result.stats.rows) for (result,), _ in alone}) > 1  # they do not all take the same number of steps


@pytest.mark.parametrize("family", FAMILIES)
def test_schedules_sum_and_terminate(pair_of, family):
    """8.1 no. 11: without a stop every position is committed once; G steps suffice, each with a commit (not Dream's)."""
    engine = pair_of(family).engine
    prompt = models.random_prompt(models.config_of(family), 4, seed=8)
    for decoder, settings in DECODERS.items():
        o = options_of(decoder, (4, 23, 6), "dual", stop_at_eos=False)
        (result,), (events,) = run_engine(engine, [prompt], o)
        assert sorted(i for e in events for i in e.positions) == list(range(4, 27)), decoder
        assert sum(result.stats.commits) == 23 and pair_of(family).oracle.shape.mask_id not in result.token_ids
        if "per_block" in settings:
            assert len(events) <= 4 * settings["per_block"]
        if settings.get("schedule") != "dream" or "num_transfer_tokens" in settings:
            assert min(result.stats.commits) >= 1 and len(events) <= 23


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_agreement(pair_of, margins, record_property, family, tmp_path):
    """Not equality: rounding differs by design (the engine's residual stream is fp32). The share is reported."""
    folder = models.write_model(tmp_path, family)
    engine = Engine.from_pretrained(folder, dtype="bfloat16")
    half = ReferenceModel.from_folder(folder, torch.bfloat16)
    exact = ReferenceModel.from_folder(folder, torch.float64)
    share, oracle_share = [], []
    for cache in CACHES:
        for seed in range(6):
            prompt = models.random_prompt(models.config_of(family), 12, seed=seed)
            o = Options(gen_length=16, block_length=8, threshold=0.5, cache=cache, stop_at_eos=False)
            (result,), _ = run_engine(engine, [prompt], o)
            other = loops.generate(half, prompt, o).token_ids
            truth = loops.generate(exact, prompt, o).token_ids
            share.append(sum(a == b for a, b in zip(result.token_ids, other, strict=True)) / 16)
            oracle_share.append(sum(a == b for a, b in zip(truth, other, strict=True)) / 16)
    mean, oracle_mean = sum(share) / len(share), sum(oracle_share) / len(oracle_share)
    record_property("equal_tokens", mean)
    margins.lines.append(
        f"{family}, bf16: {mean:.1%} of tokens equal the bf16 oracle's (of which {oracle_mean:.1%} are the fp64 oracle's)"
    )
    assert mean > 0.5
