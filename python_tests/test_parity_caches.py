"""dLLM-Cache and d2Cache: their parameters against the oracle, when they are exact, and how much they compute."""

from dataclasses import replace

import numpy as np
import pytest
from parity import FAMILIES, check, options_of, pair_of, prompt_of, run_engine
from reference.loops import Options

from dllm_ext import _C

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_PER_STEP = {"num_transfer_tokens": 1, "sigma": 0.0, "stop_at_eos": False}

DLLM = {
    "always": {"kp": 1, "kr": 1},
    "response often": {"kp": 9, "kr": 1},
    "prompt often": {"kp": 1, "kr": 5},
    "never verified": {"kp": 6, "kr": 3, "rou": 0.0},
    "V only": {"kp": 6, "kr": 4, "rou": 0.01},
    "all verified": {"kp": 6, "kr": 4, "rou": 1.0},
    "no layer always": {"kp": 5, "kr": 3, "always_refresh_layers": ()},
    "last layer always": {"kp": 7, "kr": 4, "always_refresh_layers": (2,)},
    "every layer always": {"kp": 7, "kr": 4, "always_refresh_layers": (0, 1, 2)},
    "longer than the generation": {"kp": 1000, "kr": 1000},
    "guidance kept": {"kp": 6, "kr": 2, "cfg_interval_steps": 3, "cfg_scale": 0.8},
    "guidance kept, KLASS": {
        "kp": 6, "kr": 2, "cfg_interval_steps": 4, "cfg_scale": 0.8, "kl_threshold": 0.5, "threshold": 0.3,
    },
}  # fmt: skip
D2 = {
    "one at a time": {"current_k": 1},
    "more than there are": {"current_k": 1000},
    "no rollout": {"current_k": 5, "rollout_p": 0.0},
    "much rollout": {"current_k": 5, "rollout_p": 0.7},
    "all rollout": {"current_k": 5, "rollout_p": 1.0},
    "narrow": {"current_k": 4, "d2_sigma": 0.7, "inflate_w": 0},
    "wide": {"current_k": 4, "d2_sigma": 100.0, "inflate_w": 0},
    "inflated": {"current_k": 4, "inflate_w": 12},
    "guidance": {"current_k": 4, "cfg_scale": 0.7},
    "entropy": {"current_k": 4, "remasking": "entropy"},
    "margin, two": {"current_k": 4, "remasking": "topk_margin", "num_transfer_tokens": 2},
}


@pytest.mark.parametrize("name", DLLM)
@pytest.mark.parametrize("family", FAMILIES)
def test_dllm_parameters(report, family, name):
    for stops in (False, True):
        settings = {"num_transfer_tokens": 1} | DLLM[name]
        o = Options(gen_length=22, block_length=8, cache="dllm", **settings)
        check(pair_of(family, stops), prompt_of(family, 11), o, report, f"{family}, dllm, {name}")


@pytest.mark.parametrize("name", D2)
@pytest.mark.parametrize("family", FAMILIES)
def test_d2_parameters(report, family, name):
    for stops, block_length in ((False, 8), (True, 22)):
        settings = {"num_transfer_tokens": 1} | D2[name]
        o = Options(gen_length=22, block_length=block_length, cache="d2", **settings)
        check(pair_of(family, stops), prompt_of(family, 11), o, report, f"{family}, d2, {name}")


@pytest.mark.parametrize("decoder", ["prior off", "threshold", "guidance", "temperature"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_where_everything_is_computed(family, decoder):
    """The same tokens as without a cache: refreshed at every step; all rows verified; all rows selected."""
    engine, prompt = pair_of(family, stops=True).engine, prompt_of(family, 13)
    o = options_of(decoder, (13, 24, 8), "none", sigma=0.0)

    def outcome(**settings):
        (result,), _ = run_engine(engine, [prompt], replace(o, **settings))
        return result.token_ids, result.commit_steps

    expected = outcome()
    assert outcome(cache="dllm", kp=1, kr=1) == expected
    for kr in (2, 5, 1000):
        assert outcome(cache="dllm", kp=1, kr=kr, rou=1.0) == expected
    assert outcome(cache="d2", current_k=24, rollout_p=1.0) == expected
    if decoder == "prior off":  # approximations otherwise
        assert outcome(cache="dllm", kp=50, kr=7, rou=0.1, stop_at_eos=False) != outcome(stop_at_eos=False)
        assert outcome(cache="d2", current_k=3, rollout_p=0.0, stop_at_eos=False) != outcome(stop_at_eos=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_step_is_a_full_one(family):
    """Step 0 of every cache commits what it does without a cache."""
    engine, prompt = pair_of(family).engine, prompt_of(family, 9)
    first = []
    for cache in ("none", "prefix", "dual", "dllm", "d2"):
        o = Options(gen_length=30, block_length=30, threshold=0.2, cache=cache, stop_at_eos=False)
        _, (events,) = run_engine(engine, [prompt], o)
        assert events[0].is_full and events[0].rows == 39
        first.append((events[0].positions, events[0].token_ids))
    assert all(x == first[0] for x in first)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("always", [(), (0,), (0, 2)])
def test_dllm_computes_what_it_says(family, always):
    """Rows of every step: n_layers = 3, counted by the rule of docs/semantics.md."""
    engine, prompt_length, gen_length, kp, kr = pair_of(family).engine, 12, 20, 7, 3
    shift = engine.spec.logit_shift
    o = Options(gen_length=gen_length, block_length=10, cache="dllm", kp=kp, kr=kr, rou=0.25,
                always_refresh_layers=always, **ONE_PER_STEP)  # fmt: skip
    (result,), (events,) = run_engine(engine, [prompt_of(family, prompt_length)], o)
    first_committed = events[[prompt_length in e.positions for e in events].index(True)].step
    for t in range(gen_length):
        needs_prompt = [t % kp == 0 or layer in always for layer in range(3)]
        carried = prompt_length if any(needs_prompt[1:]) else int(shift and t <= first_committed)
        layer_rows = verify_rows = 0
        for layer in range(3):
            layer_rows += carried if needs_prompt[layer] else 0
            refreshed = t % kr == 0 or layer in always
            layer_rows += gen_length if refreshed else gen_length // 4
            verify_rows += 0 if refreshed else gen_length
        assert result.stats.layer_rows[t] == layer_rows, t
        assert result.stats.verify_rows[t] == verify_rows, t
        assert result.stats.rows[t] == carried + gen_length, t
    assert sum(result.stats.layer_rows) < 0.8 * 3 * gen_length * (prompt_length + gen_length)


@pytest.mark.parametrize("family", FAMILIES)
def test_d2_computes_few_rows(family):
    """current_k masked rows, one just decoded, the nucleus; one full step. All layers alike."""
    engine, prompt = pair_of(family).engine, prompt_of(family, 40)
    o = Options(gen_length=40, block_length=40, cache="d2", current_k=6, rollout_p=0.0, inflate_w=0, **ONE_PER_STEP)
    (result,), _ = run_engine(engine, [prompt], o)
    assert result.stats.rows[0] == 80
    assert all(rows <= 8 for rows in result.stats.rows[1:])
    assert result.stats.layer_rows == [3 * rows for rows in result.stats.rows]
    assert all(n <= 8 for n in result.stats.logit_rows[1:])


@pytest.mark.parametrize("cache", ["dllm", "d2"])
def test_weights_that_are_not_needed_are_not_counted(cache):
    """Bytes of weights: all of them where every layer computes rows, fewer where only V is compared."""
    engine, prompt = pair_of("llada").engine, prompt_of("llada", 20)
    o = Options(gen_length=12, block_length=12, cache=cache, kp=50, kr=50, rou=0.01, **ONE_PER_STEP)
    (result,), _ = run_engine(engine, [prompt], o)
    first, *later = result.stats.weight_bytes
    for rows, read in zip(result.stats.layer_rows[1:], later, strict=True):
        assert read == first if cache == "d2" else rows == 12 and read < 0.7 * first


def test_the_default_threshold_is_the_explicit_one():
    """A rule that is in force by default decides like one that is spelled out; a d2 cache then brings no sigma."""
    engine, prompt = pair_of("llada").engine, prompt_of("llada", 8)
    for cache in ("prefix", "d2"):
        o = Options(gen_length=20, block_length=20, cache=cache, current_k=5)
        (default,), _ = run_engine(engine, [prompt], o)
        (spelled,), _ = run_engine(engine, [prompt], replace(o, threshold=0.9))
        assert default.commit_steps == spelled.commit_steps and default.token_ids == spelled.token_ids


def test_selection_time_is_counted():
    engine, prompt = pair_of("llada").engine, prompt_of("llada", 20)
    spent = {}
    for cache in ("none", "dllm", "d2"):
        o = Options(gen_length=24, block_length=24, cache=cache, **ONE_PER_STEP)
        (result,), _ = run_engine(engine, [prompt], o)
        spent[cache] = sum(result.stats.selection_seconds)
        assert 0 <= spent[cache] < sum(result.stats.seconds)
    assert min(spent["dllm"], spent["d2"]) > spent["none"]


@pytest.mark.parametrize("sigma", [1e-170, 0.6, 10.0, 300.0, 1e300])
@pytest.mark.parametrize("length", [1, 5, 64])
def test_density_is_the_direct_sum(length, sigma):
    """numpy, the defining sum over three times the length; 1e-12, also relative where the density is tiny."""
    generator = np.random.default_rng(length)
    for share in (0.0, 0.3, 1.0):
        known = generator.random(length) < share
        padded = np.concatenate([np.ones(length), known, np.full(length, known[-1])])
        phi = lambda d: np.exp(-0.5 * np.minimum(np.abs(d) / sigma, 1e9) ** 2)  # noqa: E731
        at, j = np.arange(length), np.arange(-length, 2 * length)
        expected = (phi(at[:, None] - j) * padded).sum(1) / phi(np.arange(-3 * length, 3 * length)).sum()
        np.testing.assert_allclose(_C.decode.certainty_density(known.tolist(), sigma), expected, rtol=1e-12)


def test_a_cached_prompt_row_is_read_where_dream_needs_it():
    """Dream reads the first generated token from the prompt's last row, which dLLM-Cache refreshes with the prompt."""
    engine, prompt = pair_of("dream").engine, prompt_of("dream", 7)
    o = Options(gen_length=12, block_length=12, cache="dllm", kp=50, kr=2, **ONE_PER_STEP)
    (result,), (events,) = run_engine(engine, [prompt], o)
    step = next(e.step for e in events if 7 in e.positions)
    assert [rows - 12 for rows in result.stats.rows] == [7] + [1] * step + [0] * (11 - step)
