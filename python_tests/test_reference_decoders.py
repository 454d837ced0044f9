"""Tests of the oracle's rules and scores (python_tests/reference: decoders.py, density.py), by hand and by law."""

import math
from dataclasses import replace
from functools import lru_cache

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import decoders, loops
from reference.decoders import Decisions
from reference.density import density, scores
from reference.loops import Options
from reference.model import ReferenceModel
from reference.proposals import Proposal

FAMILIES = models.FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")


@lru_cache
def oracle(family):
    config = models.config_of(family)
    return ReferenceModel(config, models.random_tensors(config), torch.float64)


def prompt_of(model, length, seed=0):
    return models.random_prompt(models.config_of(model.shape.family), length, seed)


def proposal(confidence, entropy=None, tokens=None):
    n = len(confidence)
    return Proposal(tokens or [1] * n, confidence, [1.0] * n, [False] * n, entropy=entropy or [0.0] * n)


def chosen(confidence, positions=None, t=0, masked=None, steps_of_block=None, entropy=None, extra=None, **options):
    """(indices, gaps) of decoders.choose; `extra` are its keyword arguments."""
    positions = positions or list(range(4, 4 + len(confidence)))
    decisions = Decisions()
    o = Options(**options)
    p = proposal(confidence, entropy)
    masked = len(confidence) if masked is None else masked
    indices = decoders.choose(p, positions, 3, t, masked, steps_of_block, o, decisions, **(extra or {}))
    return indices, decisions.smallest


# ------------------------------------------------------------------------------------------- EB-sampler


@given(st.lists(st.integers(0, 48), min_size=1, max_size=10), st.integers(0, 64))
@settings(deadline=None)
def test_number_for_gamma(entropy, gamma):
    """Against the definition: the longest prefix with sum - max <= gamma. The released sum leaves out the last.

    In whole numbers, as the sums must not be rounded here.
    """
    fits = [n for n in range(1, len(entropy) + 1) if sum(entropy[:n]) - max(entropy[:n]) <= gamma]
    assert decoders.number_for_gamma(entropy, gamma)[0] == max(fits) == len(fits)
    previous = [n for n in range(1, len(entropy) + 1) if sum(entropy[:n]) - entropy[n - 1] <= gamma]
    assert decoders.number_for_gamma(entropy, gamma, released=True)[0] == max(previous)


def test_gamma_by_hand():
    """In order of confidence the entropies are .3 .1 .5 .2: sum - max of 2, 3, 4 is .1, .4, .6; without the last .3."""
    c, h = [0.5, 0.9, 0.2, 0.7], [0.5, 0.3, 0.2, 0.1]
    assert chosen(c, entropy=h, gamma=0.05)[0] == [1]
    assert chosen(c, entropy=h, gamma=0.15)[0] == [1, 3]
    indices, gaps = chosen(c, entropy=h, gamma=0.5)
    assert indices == [0, 1, 3] and gaps == {"gamma": pytest.approx(0.1), "selection": pytest.approx(0.3)}
    assert chosen(c, entropy=h, gamma=0.6 + 1e-9)[0] == [0, 1, 2, 3]
    assert chosen(c, entropy=h, gamma=0.05, num_transfer_tokens=2)[0] == [1, 3]
    quirks = [chosen(c, entropy=h, gamma=g, reference_quirks=True)[0] for g in (0.29, 0.31, 0.41, 0.91)]
    assert quirks == [[1], [1, 3], [0, 1, 3], [0, 1, 2, 3]]  # .3, .4, .9
    by_score = chosen(c, entropy=h, gamma=0.2, extra={"score": [0.9, 0.1, 0.2, 0.3]})
    assert by_score[0] == [0, 3]  # .5 .1 .2 .3: sum - max .1, .3
    assert by_score[1] == {"gamma": pytest.approx(0.1), "score": pytest.approx(1 / 3)}


# ------------------------------------------------------------------------------------------- threshold and factor


def test_scores_decide_only_for_want_of_confidence():
    """Confidences .5 .7 .5 .1 and scores in the reverse order."""
    c, extra = [0.5, 0.7, 0.55, 0.1], {"score": [0.1, 0.2, 0.3, 0.4]}
    assert chosen(c, extra=extra, threshold=0.5)[0] == [0, 1, 2]
    assert chosen(c, extra=extra, threshold=0.6)[0] == [1]
    indices, gaps = chosen(c, extra=extra, threshold=0.8)
    assert indices == [3] and gaps == {"threshold": pytest.approx(0.1), "score": pytest.approx(0.25)}
    assert chosen(c, extra=extra, threshold=0.6, num_transfer_tokens=2)[0] == [2, 3]  # instead, not besides
    assert chosen(c, extra=extra, num_transfer_tokens=2)[0] == [2, 3]
    assert chosen(c, extra=extra, steps=2, steps_of_block=2)[0] == [2, 3]
    # factor: (k + 1)(1 - c_k) is .6, 1.35, 2, 4.5
    assert chosen(c, extra=extra, factor=1.4)[0] == [1, 2]
    assert chosen(c, extra=extra, factor=0.7)[0] == [1]
    assert chosen(c, extra=extra, factor=0.5)[0] == [3] and chosen(c, factor=0.5)[0] == [1]
    assert chosen(c, extra=extra, factor=0.7, num_transfer_tokens=2)[0] == [2, 3]
    # the released code compares the scores
    assert chosen(c, extra=extra, threshold=0.3, reference_quirks=True)[0] == [2, 3]
    assert chosen(c, extra=extra, threshold=0.5, reference_quirks=True)[0] == [3]
    assert chosen(c, threshold=0.6, reference_quirks=True)[0] == [1]


def test_score_gaps_are_relative():
    assert decoders.relative_gap(2e-9, 1e-9) == 0.5 and decoders.relative_gap(-1.0, -4.0) == 0.75
    assert decoders.relative_gap(0.0, 0.0) == math.inf and decoders.relative_gap(0.5, 0.5) == 0.0


@given(st.lists(st.floats(0, 1), max_size=9), st.floats(0.05, 4))
@settings(deadline=None)
def test_released_factor(confidence, factor):
    """One less than the first that fails, or than all."""
    confidence = sorted(confidence, reverse=True)
    failing = [n for n, c in enumerate(confidence, start=1) if (n + 1) * (1 - c) >= factor]
    expected = max(0, min([*failing, len(confidence)]) - 1)
    assert decoders.number_for_factor(confidence, factor, free=0, released=True)[0] == expected
    count = decoders.number_for_factor(confidence, factor, free=0)[0]
    assert count == min([*failing, len(confidence) + 1]) - 1


def test_released_factor_by_hand():
    c = [0.95, 0.9, 0.8, 0.9]  # sorted .95 .9 .9 .8: (n + 1)(1 - c_n) is .1, .3, .4, 1
    assert chosen(c, factor=1.1)[0] == [0, 1, 2, 3]
    assert chosen(c, factor=1.1, reference_quirks=True)[0] == [0, 1, 3]  # all but the last
    assert chosen(c, factor=0.35, reference_quirks=True)[0] == [0, 1]
    assert chosen(c, factor=0.05, reference_quirks=True)[0] == [0]  # none: the best
    assert chosen([0.99], factor=1.0, reference_quirks=True)[0] == [0]


# ------------------------------------------------------------------------------------------- scores


def score(p, positions, density_at=None, start=4, **options):
    return scores(p, positions, density_at or {}, start, Options(**options))


def test_scores_by_hand():
    p = proposal([0.5, 0.2], entropy=[0.7, 1.1], tokens=[0, 2])
    d = {4: 0.4, 6: 0.3}
    frequencies = (0.01, 0.0, 0.3)
    assert score(p, [4, 6]) is None
    assert score(p, [4, 6], d, sigma=2.0) == pytest.approx([0.2, 0.06])
    assert score(p, [4, 6], position_decay=0.5) == pytest.approx([0.5, 0.2 * math.exp(-1)])
    debiased = [0.5 * math.log(100), 0.2 * -math.log(0.3)]
    pc = {"token_frequencies": frequencies}
    assert score(p, [4, 6], **pc) == pytest.approx(debiased, rel=1e-7)
    assert score(p, [4, 6], clip_alpha=1.0, **pc) == pytest.approx([1.0, debiased[1]])
    all_of_it = score(p, [4, 6], d, sigma=2.0, position_decay=0.5, **pc)
    assert all_of_it == pytest.approx([debiased[0] * 0.4, debiased[1] * 0.3 * math.exp(-1)])
    unseen = proposal([0.5], entropy=[0.0], tokens=[1])
    assert score(unseen, [4], clip_alpha=99.0, **pc) == pytest.approx([0.5 * math.log(1e10)])


def test_scores_with_entropy():
    """A factor needs a positive certainty: exp(-H); the released code multiplies -H, and debiases p(x0) alone."""
    p = proposal([-0.7, -1.1], entropy=[0.7, 1.1], tokens=[0, 0])
    d = {4: 0.4, 6: 0.3}
    entropy = {"remasking": "entropy", "sigma": 2.0}
    assert score(p, [4, 6], d, **entropy) == pytest.approx([0.4 * math.exp(-0.7), 0.3 * math.exp(-1.1)])
    assert score(p, [4, 6], d, reference_quirks=True, **entropy) == pytest.approx([-0.28, -0.33])
    pc = {"token_frequencies": (0.1,)}
    assert score(p, [4, 6], remasking="entropy", **pc) == pytest.approx(
        [math.exp(-h) * math.log(10) for h in (0.7, 1.1)], rel=1e-6
    )
    assert score(p, [4, 6], remasking="entropy", reference_quirks=True, **pc) == [-0.7, -1.1]


@pytest.mark.parametrize("family", FAMILIES)
def test_prior_orders_generations(family):
    """One commit a step: the best of s D, recomputed from the logits and the canvas of each step."""
    model = oracle(family)
    shift, mask = model.shape.shift, model.shape.mask_id
    prompt = prompt_of(model, 6)
    prompt[2] = mask
    o = Options(gen_length=10, block_length=10, num_transfer_tokens=1, cache="none", stop_at_eos=False, infill=True)
    for more in ({"sigma": 1.5}, {"sigma": 4.0, "remasking": "entropy"}, {"sigma": 2.0, "position_decay": 0.3}):
        run = loops.generate(model, prompt, replace(o, **more))
        canvas = torch.tensor(prompt + [mask] * 10)
        for step in run.steps:
            open_ = [i for i in range(2, 16) if canvas[i] == mask]
            p = model.full_logits(canvas)[[i - shift for i in open_]].softmax(-1)
            if "remasking" in more:
                s = torch.special.xlogy(p, p).sum(-1).exp()
            else:
                s = p[:, [i for i in range(model.vocab_size) if i != mask]].max(-1).values
            d = density([int(x) != mask for x in canvas[2:]], more["sigma"])
            value = [float(x) * d[i - 2] for x, i in zip(s, open_, strict=True)]
            if "position_decay" in more:
                value = [x * math.exp(-0.3 * (i - 2)) for x, i in zip(value, open_, strict=True)]
            ((position, token),) = step.committed
            assert position == open_[value.index(max(value))]
            canvas[position] = token
    without = loops.generate(model, prompt, o)
    assert without.steps != run.steps and loops.generate(model, prompt, replace(o, sigma=0.0)).steps == without.steps


def test_pc_order():
    """With a steep decay from left to right; a frequent token late; alg_temp draws by the score."""
    model = oracle("llada")
    prompt = prompt_of(model, 6)
    o = Options(gen_length=12, block_length=6, num_transfer_tokens=1, cache="none", stop_at_eos=False)
    steep = loops.generate(model, prompt, replace(o, position_decay=50.0))
    assert [i for step in steep.steps for i, _ in step.committed] == list(range(6, 18))
    plain = loops.generate(model, prompt, o)
    first = plain.steps[0].committed[0][1]
    frequencies = tuple(0.999999 if i == first else 1e-4 for i in range(model.vocab_size))
    late = loops.generate(model, prompt, replace(o, token_frequencies=frequencies))
    assert late.steps[0].committed[0][1] != first
    c, extra = [0.5, 0.5, 0.5], {"score": [1e-3, 1e-3, 50.0]}
    for seed in range(5):
        assert chosen(c, extra=extra, num_transfer_tokens=1, alg_temp=1.0, seed=seed)[0] == [2]


# ------------------------------------------------------------------------------------------- KLASS


def followed(distributions, **options):
    o = Options(threshold=0.5, **options)
    stability = decoders.Stability(o)
    verdicts = []
    for p in distributions:
        stability.follow(7, torch.tensor(p, dtype=torch.float64))
        verdicts.append(stability.stable(7, Decisions()))
    return verdicts, stability.history[7]


def test_stability_by_hand():
    """KL((.5, .5) || (.9, .1)) = .5 ln(.5 / .9) + .5 ln 5 = .51083; the first is against nothing, and huge."""
    a, b = [0.9, 0.1], [0.5, 0.5]
    verdicts, history = followed([a, b, b, b], kl_threshold=0.6)
    assert verdicts == [False, False, True, True] and history == [0.0, 0.0]
    verdicts, history = followed([a, b, b], kl_threshold=0.5)
    assert verdicts == [False] * 3 and history == pytest.approx([0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), 0])
    assert followed([a, b, b], kl_threshold=0.5, kl_history_length=1)[0] == [False, False, True]
    first = sum(x * math.log((x + 1e-12) / 1e-12) for x in a)
    assert followed([a], kl_threshold=1.0)[1] == pytest.approx([first]) and first > 20
    # without a history nothing is stable, unless missing values count as 0
    assert followed([a, a], kl_threshold=99.0)[0] == [False, True]
    assert followed([a, a], kl_threshold=99.0, reference_quirks=True)[0] == [True, True]
    # filtered distributions: what has no probability adds nothing
    assert followed([[1.0, 0.0], [1.0, 0.0]], kl_threshold=1.0)[1][-1] == 0.0


def test_klass_choice_by_hand():
    c = [0.5, 0.9, 0.8, 0.1]

    def klass(stable, **options):
        return chosen(c, extra={"stable": stable}, kl_threshold=0.1, **options)[0]

    assert klass([True] * 4, threshold=0.6) == [1, 2] and klass([True, False, True, True], threshold=0.6) == [2]
    assert klass([True, False, False, True], threshold=0.6) == [1]  # nothing stable reaches it: the best of all
    assert klass([False] * 4, threshold=0.6, num_transfer_tokens=3) == [0, 1, 2]
    assert klass([True, False, True, True], threshold=0.6, num_transfer_tokens=3) == [2]
    assert klass([True] * 4, factor=0.7) == [1, 2]  # .2, .6, 2, 4.5
    assert klass([False, False, True, True], factor=0.7) == [2]  # .4, 2.7
    assert klass([True, False, False, True], factor=0.7) == [1]  # 1, 2.7: none
    scored = {"stable": [False] * 4, "score": [4.0, 3.0, 2.0, 1.0]}
    assert chosen(c, extra=scored, kl_threshold=0.1, threshold=0.6)[0] == [0]


@pytest.mark.parametrize("rule", [{"threshold": 0.3}, {"factor": 1.3}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_klass_with_a_huge_threshold(family, rule):
    """Everything is stable from the first step on if one value is enough: the rule alone."""
    model = oracle(family)
    prompt = prompt_of(model, 7)
    for cache in ("none", "prefix", "dual", "dllm"):
        o = Options(gen_length=14, block_length=5, cache=cache, stop_at_eos=False, **rule)
        plain = loops.generate(model, prompt, o)
        klass = loops.generate(model, prompt, replace(o, kl_threshold=1e9, kl_history_length=1))
        assert [s.committed for s in klass.steps] == [s.committed for s in plain.steps]
        never = loops.generate(model, prompt, replace(o, kl_threshold=1e-30))
        assert [len(s.committed) for s in never.steps] == [1] * 14
        two = loops.generate(model, prompt, replace(o, kl_threshold=1e9, kl_history_length=2))
        assert len(two.steps[0].committed) == 1  # no history yet
        assert len(two.steps) < 14


def test_klass_follows_positions_outside_the_block():
    model = oracle("dream")
    prompt = prompt_of(model, 7)
    o = Options(gen_length=12, block_length=4, threshold=0.3, kl_threshold=0.5, stop_at_eos=False)
    for cache, rows in (("none", list(range(6, 18))), ("prefix", list(range(6, 18))), ("dual", list(range(6, 10)))):
        run = loops.generate(model, prompt, replace(o, cache=cache))
        assert run.steps[0].logit_rows == list(range(6, 18))
        left = [i for i in range(7, 19) if i != run.steps[0].committed[0][0]]
        assert run.steps[1].logit_rows == [i - 1 for i in left if i - 1 in rows]
    with pytest.raises(ValueError, match="KLASS"):
        loops.generate(model, prompt, replace(o, threshold=None, num_transfer_tokens=1))


def test_klass_counts_blank_rows_as_uniform():
    """Under quirks a position that is not computed has a distribution all the same."""
    model = oracle("llada")
    o = Options(gen_length=8, block_length=4, threshold=0.3, kl_threshold=0.5, stop_at_eos=False, cache="dual")
    for quirks in (False, True):
        sequence = loops.Generation(model, prompt_of(model, 6), replace(o, reference_quirks=quirks))
        for _ in range(2):
            sequence.step(sequence.plan())
        p = sequence.stability.before[13]
        assert torch.equal(p, torch.full_like(p, 1 / model.vocab_size)) == quirks
        assert len(sequence.stability.history[13]) == 1 + quirks
        assert sequence.trace[1].logit_rows == [i for i in range(6, 10) if i in sequence.masked or i in just(sequence)]


def just(sequence):
    return [i for i, _ in sequence.trace[-1].committed]


# ------------------------------------------------------------------------------------------- left to right


def test_left_to_right_by_hand():
    """Positions 4 5 6 9 10 with confidences .9 .8 .3 .95 .99: the run is 4 5 6."""
    c, positions = [0.9, 0.8, 0.3, 0.95, 0.99], [4, 5, 6, 9, 10]

    def ar(extra=None, **options):
        return chosen(c, positions, extra=extra, autoregressive=True, **options)

    assert ar(threshold=0.85) == ([0], {"threshold": pytest.approx(0.05)})
    assert ar(threshold=0.5)[0] == [0, 1] and ar(threshold=0.2)[0] == [0, 1, 2] and ar(threshold=0.95)[0] == [0]
    assert ar(threshold=0.95, num_transfer_tokens=2)[0] == [0, 1] and ar()[0] == [0]
    assert ar(num_transfer_tokens=2)[0] == [0, 1] and ar(num_transfer_tokens=9)[0] == [0, 1, 2]
    assert ar(steps=2, steps_of_block=2)[0] == [0, 1, 2] and ar(steps=5, steps_of_block=5, t=1)[0] == [0]
    assert ar(steps=5, steps_of_block=5, num_transfer_tokens=2)[0] == [0, 1]
    assert ar(num_transfer_tokens=1, reference_quirks=True)[0] == [0, 1, 2]  # the whole run
    assert ar(threshold=0.5, reference_quirks=True)[0] == [0, 1]
    score = {"score": [0.4, 0.9, 0.9, 0.9, 0.9]}
    assert ar(score, threshold=0.5)[0] == [0, 1] and ar(score, threshold=0.5, reference_quirks=True)[0] == [0]
    assert ar({"eligible": [3, *positions]}, num_transfer_tokens=2)[0] == []  # position 3 was not computed


@pytest.mark.parametrize("family", FAMILIES)
def test_left_to_right_generation(family):
    model = oracle(family)
    prompt = prompt_of(model, 6)
    for more in ({"num_transfer_tokens": 2}, {"threshold": 0.3}, {"steps": 6}, {"steps": 6, "schedule": "dream"}):
        for cache in ("none", "dual", "dllm", "d2"):
            o = Options(gen_length=13, block_length=5, cache=cache, autoregressive=True, stop_at_eos=False, **more)
            order = [i for step in loops.generate(model, prompt, o).steps for i, _ in step.committed]
            assert order == list(range(6, 19))
    hole = list(prompt)
    hole[3] = model.shape.mask_id
    o = Options(gen_length=8, block_length=8, autoregressive=True, num_transfer_tokens=4, infill=True)
    run = loops.generate(model, hole, replace(o, stop_at_eos=False))
    assert [[i for i, _ in step.committed] for step in run.steps] == [[3], [6, 7, 8, 9], [10, 11, 12, 13]]
    for more in ({"factor": 1.0}, {"gamma": 0.1}, {"kl_threshold": 0.1}):
        with pytest.raises(ValueError, match="left to right"):
            loops.generate(model, prompt, Options(autoregressive=True, **more))


def test_left_to_right_needs_the_first_row():
    """d2 may never compute the first masked position of a block that is longer than current_k: no progress."""
    model = oracle("llada")
    o = Options(gen_length=16, block_length=16, cache="d2", current_k=1, rollout_p=0.0, inflate_w=0, d2_sigma=50.0)
    o = replace(o, autoregressive=True, num_transfer_tokens=1, stop_at_eos=False)
    outcomes = set()
    for seed in range(4):
        try:
            outcomes.add(len(loops.generate(model, prompt_of(model, 6, seed), o).steps) >= 16)
        except RuntimeError as e:
            outcomes.add(str(e).split(":")[0])
    assert outcomes <= {True, "no progress"} and "no progress" in outcomes


# ------------------------------------------------------------------------------------------- schedules and caches


def test_dream_schedule_counts_all_eligible_positions():
    """floor(#eligible (1 - s/t)) positions, if so many are computed."""
    extra = {"eligible": list(range(4, 17))}
    few = chosen([0.5, 0.6, 0.7], t=0, steps_of_block=4, steps=4, schedule="dream", extra=extra)[0]
    assert few == [0, 1, 2]  # a quarter of 13
    assert chosen([0.5, 0.6, 0.7], t=0, steps_of_block=4, steps=4, schedule="dream")[0] == []


@pytest.mark.parametrize("rule", [{"steps": 12}, {"steps": 6, "schedule": "dream"}, {"threshold": 0.4}], ids=str)
def test_schedules_end_where_rows_are_missing(rule):
    """d2 with fewer rows than the schedule asks for: the rest is committed when it is computed."""
    model = oracle("llada")
    o = Options(gen_length=18, block_length=6, cache="d2", current_k=1, rollout_p=0.0, inflate_w=0, stop_at_eos=False)
    run = loops.generate(model, prompt_of(model, 6), replace(o, **rule))
    assert sorted(i for step in run.steps for i, _ in step.committed) == list(range(6, 24))
    assert all({i for i, _ in step.committed} <= set(step.rows) for step in run.steps)
