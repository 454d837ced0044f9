"""Identities that exact caches, schedules and batches obey (the engine against itself, and against formulas)."""

from dataclasses import replace

import models
import pytest
import torch
from parity import ALL_CACHES, DECODERS, FAMILIES, is_legal, options_of, pair_of, prompt_of, run_engine
from reference import loops
from reference.loops import Options
from reference.model import ReferenceModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_is_exact_where_blocks_take_one_step(family, cache):
    """Blocks of one position, or threshold 0 with any block length: every step is the refreshing one."""
    engine = pair_of(family, stops=True).engine
    prompt = prompt_of(family, 11)

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
def test_cache_is_exact_where_everything_is_recomputed(cache):
    """LLaDA, no prompt, one block."""
    engine = pair_of("llada").engine
    for seed in range(5):
        o = Options(gen_length=24, block_length=24, steps=24, temperature=1.0, seed=seed, stop_at_eos=False)
        (cached,), _ = run_engine(engine, [[]], replace(o, cache=cache))
        (plain,), _ = run_engine(engine, [[]], replace(o, cache="none"))
        assert cached.token_ids == plain.token_ids and cached.commit_steps == plain.commit_steps
        assert cached.stats.rows == [24] * 24


def test_dream_shift():
    """The first generated position is read from row P - 1, and an oracle without the shift says something else."""
    pair = pair_of("dream")
    prompt = prompt_of("dream", 6)
    o = Options(gen_length=8, block_length=1, num_transfer_tokens=1, cache="none", stop_at_eos=False)
    (result,), _ = run_engine(pair.engine, [prompt], o)
    logits = pair.oracle.full_logits(prompt + [pair.oracle.shape.mask_id] * 8)
    logits[:, pair.oracle.shape.mask_id] = -float("inf")
    assert result.token_ids[0] == int(logits[5].argmax()) != int(logits[6].argmax())
    unshifted = ReferenceModel(models.dream_config(), models.random_tensors(models.dream_config()), torch.float64)
    unshifted.shape = replace(unshifted.shape, family="llada")
    assert loops.generate(unshifted, prompt, o).token_ids != result.token_ids


@pytest.mark.parametrize(
    "decoder",
    ["default", "factor", "steps 3", "temperature", "dream entropy", "dream random", "guidance", "prior", "klass"],
)
@pytest.mark.parametrize("cache", ALL_CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_each_alone(family, cache, decoder):
    """Prompts of different lengths, for any batch size: tokens, commits and counters."""
    engine = pair_of(family, stops=True).engine
    prompts = [prompt_of(family, n) for n in (3, 17, 1, 9, 30, 9, 2)]
    o = options_of(decoder, (0, 21, 6), cache)
    alone = [run_engine(engine, [prompt], o) for prompt in prompts]
    for batch_size in (2, 3, 7):
        results, events = run_engine(engine, prompts, o, batch_size=batch_size)
        for ((expected,), (expected_events,)), result, own in zip(alone, results, events, strict=True):
            assert result.token_ids == expected.token_ids and result.commit_steps == expected.commit_steps
            assert [e.positions for e in own] == [e.positions for e in expected_events]
            for name in ("rows", "layer_rows", "verify_rows", "logit_rows", "attention_pairs", "commits"):
                assert getattr(result.stats, name) == getattr(expected.stats, name)
            assert result.nfe == expected.nfe
    texts = {tuple(result.token_ids) for (result,), _ in alone}
    assert len(texts) >= 5  # the two prompts of length 9 are equal, and not much else is


@pytest.mark.parametrize("decoder", ["threshold", "steps 3", "temperature"])
@pytest.mark.parametrize("cache", ALL_CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_equals_oracle(family, cache, decoder):
    """The same, against the oracle: a batch whose sequences end at different steps."""
    pair = pair_of(family, stops=True)
    prompts = [prompt_of(family, n) for n in (12, 4, 25, 1)]
    o = options_of(decoder, (0, 17, 5), cache)
    results, events = run_engine(pair.engine, prompts, o, batch_size=3)
    runs = [loops.generate(pair.oracle, prompt, o) for prompt in prompts]
    assert [r.token_ids for r in results] == [run.token_ids for run in runs]
    assert [[e.positions for e in own] for own in events] == [
        [[i for i, _ in step.committed] for step in run.steps] for run in runs
    ]


@pytest.mark.parametrize("cache", ["dual", "dllm", "d2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generations_terminate(family, cache):
    """Without a stop every position is committed once; G steps suffice, each with a commit (not Dream's)."""
    pair = pair_of(family)
    prompt = prompt_of(family, 4)
    for decoder, settings in DECODERS.items():
        if not is_legal(decoder, cache):
            continue
        o = options_of(decoder, (4, 23, 6), cache, stop_at_eos=False)
        if o.token_frequencies is not None:
            o = replace(o, token_frequencies=o.token_frequencies[: pair.oracle.vocab_size])
        (result,), (events,) = run_engine(pair.engine, [prompt], o)
        assert sorted(i for e in events for i in e.positions) == list(range(4, 27)), decoder
        assert sum(result.stats.commits) == 23 and pair.oracle.shape.mask_id not in result.token_ids
        if "per_block" in settings and cache != "d2":  # which may not have computed enough of them
            assert len(events) <= 4 * settings["per_block"]
        if settings.get("schedule") != "dream" or "num_transfer_tokens" in settings:
            assert min(result.stats.commits) >= 1 and len(events) <= 23


@pytest.mark.parametrize("gen_length", [5, 16])
def test_llada_schedule_counts(gen_length):
    """Every step count of a block: m // n commits per step, one more in the first m % n steps."""
    engine = pair_of("llada").engine
    for steps in range(1, gen_length + 4):
        o = Options(gen_length=gen_length, block_length=gen_length, steps=steps, cache="dual", stop_at_eos=False)
        (result,), _ = run_engine(engine, [[1, 2]], o)
        counts = [n for n in loops.llada_schedule(gen_length, steps) if n]
        assert result.stats.commits == counts


@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.2])
def test_dream_schedule_counts(eps):
    """Every step count of a block: int(masked * (1 - s/t)) in fp32, with the bits of torch.linspace(1, eps, steps + 1).

    A time grid that is one ulp off moves commits to other steps (eps 0.2, 12 steps, 6 positions is the smallest case).
    """
    engine = pair_of("llada").engine
    for gen_length in (6, 9, 12, 16, 32):
        for steps in (1, 2, 7, 12, 16, 18, 20, 24, 32, 45):
            left, counts = gen_length, []
            for t in range(steps):
                counts.append(int(torch.tensor(left, dtype=torch.float32) * loops.dream_share(eps, steps, t)))
                left -= counts[-1]
                if not left:
                    break
            o = Options(gen_length=gen_length, block_length=gen_length, steps=steps, schedule="dream", eps=eps,
                        remasking="random", cache="dual", stop_at_eos=False)  # fmt: skip
            (result,), _ = run_engine(engine, [[1, 2]], o)
            assert result.stats.commits == counts, (gen_length, steps)
