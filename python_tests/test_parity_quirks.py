"""reference_quirks: the engine against the oracle's model of the released d2Cache harness, alone and in batches."""

from dataclasses import replace

import pytest
from parity import ALL_CACHES, CACHE_SETTINGS, FAMILIES, frequencies, pair_of, prompt_of, run_engine
from reference.loops import Options, generate_batch

pytestmark = pytest.mark.usefixtures("one_thread")

QUIRKY = {
    "one per step": {"num_transfer_tokens": 1, "sigma": 0.0},
    "threshold": {"threshold": 0.3},
    "factor": {"factor": 1.3, "num_transfer_tokens": 2},
    "prior": {"num_transfer_tokens": 2, "sigma": 6.0},
    "prior, threshold": {"threshold": 0.2, "sigma": 6.0},
    "entropy": {"num_transfer_tokens": 1, "remasking": "entropy"},
    "margin": {"num_transfer_tokens": 2, "remasking": "topk_margin"},
    "eb": {"gamma": 1.5},
    "klass": {"kl_threshold": 0.4, "threshold": 0.3},
    "klass, factor": {"kl_threshold": 0.4, "factor": 1.5},
    "pc": {"num_transfer_tokens": 1, "token_frequencies": True, "sigma": 0.0},
    "left to right": {"num_transfer_tokens": 1, "autoregressive": True},
    "left to right, threshold": {"threshold": 0.2, "autoregressive": True},
    "filters": {"threshold": 0.4, "top_k": 9, "top_p": 0.9},
}


def options_of(decoder, cache, family, **more):
    settings = CACHE_SETTINGS.get(cache, {}) | QUIRKY[decoder] | {"cache": cache, "reference_quirks": True} | more
    if settings.get("token_frequencies"):
        settings["token_frequencies"] = frequencies()[: pair_of(family).oracle.vocab_size]
    return Options(gen_length=24, **settings)


def same(pair, prompts, o, report, where):
    results, events = run_engine(pair.engine, prompts, o, batch_size=len(prompts))
    runs = generate_batch(pair.oracle, prompts, o)
    for result, own, run in zip(results, events, runs, strict=True):
        report.note(run, where)
        committed = [list(zip(e.positions, e.token_ids, strict=True)) for e in own]
        assert committed == [step.committed for step in run.steps], where
        assert result.token_ids == run.token_ids and result.nfe == run.nfe, where
        if o.cache != "dllm":
            assert [e.rows for e in own] == [len(step.rows) for step in run.steps], where


@pytest.mark.parametrize("decoder", QUIRKY)
@pytest.mark.parametrize("cache", ALL_CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_sequence(report, family, cache, decoder):
    for stops, block_length in ((False, 8), (True, 24), (False, 24)):
        o = options_of(decoder, cache, family, block_length=block_length)
        prompt = prompt_of(family, 9, seed=block_length)
        same(pair_of(family, stops), [prompt], o, report, f"{family}, {cache}, {decoder}, quirks, {block_length}")


@pytest.mark.parametrize("decoder", [d for d in QUIRKY if d != "eb"])  # gamma runs over the released batch
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_topped_up(report, family, decoder):
    prompts = [prompt_of(family, 9, seed=seed) for seed in range(3)]
    for stops, block_length in ((False, 6), (True, 24)):
        o = options_of(decoder, "d2", family, block_length=block_length, current_k=4)
        same(pair_of(family, stops), prompts, o, report, f"{family}, d2, {decoder}, quirks, batch, {block_length}")


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_change_results_only_with_quirks(family):
    """The one exception to the rule that a batch changes nothing."""
    engine, prompts = pair_of(family).engine, [prompt_of(family, 9, seed=seed) for seed in range(4)]
    o = Options(gen_length=24, block_length=24, cache="d2", threshold=0.3, current_k=4, rollout_p=0.6)
    for quirks in (False, True):
        chosen = replace(o, reference_quirks=quirks)
        together, _ = run_engine(engine, prompts, chosen)
        alone = [run_engine(engine, [prompt], chosen)[0][0] for prompt in prompts]
        equal = [a.stats.rows == b.stats.rows for a, b in zip(together, alone, strict=True)]
        assert all(equal) != quirks
