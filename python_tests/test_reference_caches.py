"""Tests of the oracle's caches dllm and d2 (python_tests/reference): by hand, by brute force, by what must hold."""

import math
from dataclasses import replace
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import oracle, prompt_of
from reference import d2, dllm, loops
from reference.decoders import Decisions
from reference.density import density
from reference.loops import Options
from reference.model import ReferenceModel
from reference.proposals import Proposal

FAMILIES = models.FAMILIES
FULL_DLLM = {"cache": "dllm", "kp": 1, "kr": 1}
FULL_D2 = {"cache": "d2", "current_k": 10**6, "rollout_p": 1.0, "sigma": 0.0}

pytestmark = pytest.mark.usefixtures("one_thread")


def outcome(run):
    return run.token_ids, run.prompt_ids, [step.committed for step in run.steps]


# ------------------------------------------------------------------------------------------- density


def test_density_of_nothing_known():
    """The values of the released code for 64 masked positions and sigma 10."""
    d = density([False] * 64, 10.0)
    expected = {0: 0.480053, 1: 0.440358, 5: 0.291081, 10: 0.146758, 20: 0.0201406, 40: 2.5425e-5}
    assert {i: d[i] for i in expected} == pytest.approx(expected, rel=1e-5)


def circular_density(known, sigma):
    """By circular convolution over six lengths, as the released code does it with Fourier transforms."""
    size = len(known)
    padded = np.zeros(6 * size)
    padded[:size] = 1
    padded[size : 2 * size] = known
    padded[2 * size : 3 * size] = known[-1]
    distance = np.concatenate([np.arange(3 * size), np.arange(-3 * size, 0)])
    kernel = np.exp(-(distance**2) / (2 * sigma**2))
    at = [[(n - m) % (6 * size) for m in range(6 * size)] for n in range(size, 2 * size)]
    return (kernel[at] * padded).sum(-1) / kernel.sum()


@given(st.lists(st.booleans(), min_size=1, max_size=24), st.floats(0.3, 30))
@settings(deadline=None)
def test_density_against_convolution(known, sigma):
    d = density(known, sigma)
    assert d.dtype == np.float64 and np.abs(d - circular_density(known, sigma)).max() < 1e-12
    assert (d <= density([True] * len(known), sigma) + 1e-15).all()  # 1 but for what the window leaves out


# ------------------------------------------------------------------------------------------- rollout


def attention_rows(rows, length, layers=3, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, len(rows), length)
    return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1) for _ in range(layers)]


@pytest.mark.parametrize("rows", [[], [3], [0, 2, 5, 6], list(range(9))], ids=len)
def test_rollout_forms_agree(rows):
    """T x T products, products restricted to the computed rows, and a vector run backwards: the same sums, total T."""
    length = 9
    attention = attention_rows(rows, length)
    literal = d2.importance(rows, attention, length)
    assert float(literal.sum()) == pytest.approx(length, abs=1e-12)

    by_rows = torch.eye(length, dtype=torch.float64)
    for a in attention:
        by_rows[rows] = (by_rows[rows] + a.mean(0) @ by_rows) / 2
    assert torch.allclose(by_rows.sum(0), literal, atol=1e-13)

    c = torch.ones(length, dtype=torch.float64)
    for a in reversed(attention):
        u = c[rows].clone()
        c[rows] = u / 2
        c += u @ a.mean(0) / 2
    assert torch.allclose(c, literal, atol=1e-13)
    if not rows:
        assert torch.equal(literal, torch.ones(length, dtype=torch.float64))


def test_rollout_by_hand():
    """Two positions, row 1 computed, one layer, two heads of mean (.6, .4): W = [[1, 0], [.3, .7]]."""
    attention = [torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]]])]
    assert d2.importance([1], attention, 2).tolist() == pytest.approx([1.3, 0.7])
    assert d2.importance([1], attention * 2, 2).tolist() == pytest.approx([1.51, 0.49])  # W^2: row 1 is (.51, .49)


# ------------------------------------------------------------------------------------------- d2: rows


def select(c, p, others=None):
    c = torch.tensor(c, dtype=torch.float64)
    decisions = Decisions()
    return d2.nucleus(c, range(len(c)) if others is None else others, p, decisions), decisions.smallest


def test_nucleus_by_hand():
    """Shares .05, .04, .03, ... of .1: two, where the paper's wording would take three."""
    c = [0.03, 0.05, 0.04, *[0.02] * 44]
    picked, gaps = select(c, 0.1)
    assert picked == [1, 2] and gaps == {"nucleus": pytest.approx(0.01), "importance": pytest.approx(0.25)}
    assert select(c, 0.0)[0] == [1] and select(c, 0.04)[0] == [1]  # the first in any case
    assert select(c, 1.0)[0] == list(range(47)) and select(c, 0.5, others=[])[0] == []
    assert select([1.0, 2.0, 2.0, 3.0], 0.72, others=[0, 1, 2])[0] == [1]  # shares .2 .4 .4 of what is left; a tie
    assert select([1.0, 2.0, 2.0, 3.0], 0.82, others=[0, 1, 2])[0] == [1, 2]


def test_inflate_by_hand():
    assert d2.inflate([1, 5, 10], 0) == [1, 5, 10]
    assert d2.inflate([1, 5, 10], 4) == [1, 2, 3, 4, 5, 10]
    assert d2.inflate([1, 5, 10], 5) == list(range(1, 11))
    assert d2.inflate([3], 4) == [3] and d2.inflate([], 4) == []


def planner(shift=0, prompt=4, gen_length=12, block_length=4, certainty=None, **options):
    o = Options(gen_length=gen_length, block_length=block_length, cache="d2", **options)
    total = prompt + gen_length
    blocks = loops.block_positions(prompt, gen_length, block_length, [])
    x = d2.D2Planner(shift, blocks, total, o, Decisions())
    x.importance = torch.ones(total, dtype=torch.float64)
    x.certainty = certainty or {i: 0.5 for i in range(prompt, total)}
    return x


def test_candidates_by_hand():
    """Positions 4..15 in blocks of 4, of which 5, 8, 10, 13, 14 and 15 are masked; the current block is 4..7."""
    masked = [5, 8, 10, 13, 14, 15]
    s = {5: 0.1, 8: 0.2, 10: 0.9, 13: 0.7, 14: 0.8, 15: 0.95}

    def chosen(k, masked=masked, block=(4, 5, 6, 7)):
        x = planner(current_k=k)
        return sorted(x.candidates(list(block), masked, s)), x.decisions.smallest

    assert chosen(1) == ([5], {})
    # the second candidate is 8: up to 11, and of 8 and 10 the better one
    assert chosen(2) == ([5, 10], {"candidate": pytest.approx(0.7 / 0.9)})
    assert chosen(3) == ([5, 8, 10], {})
    assert chosen(4) == ([5, 10, 14, 15], {"candidate": pytest.approx(0.1 / 0.8)})  # the fourth is 13: up to 15
    assert chosen(6)[0] == chosen(99)[0] == masked
    assert chosen(2, masked=[5, 8, 10])[0] == [5, 10]  # others lie behind a stop id
    assert chosen(1, masked=masked[1:], block=(8, 9, 10, 11))[0] == [10]
    tie = planner(current_k=1)
    assert tie.candidates([8, 9, 10, 11], [8, 10], {8: 0.5, 10: 0.5}) == [8]
    assert tie.decisions.smallest == {"candidate": 0.0}


def test_rows_by_hand():
    """Chosen positions, what was just committed, the nucleus of the others, and the gaps."""
    x = planner(current_k=2, rollout_p=0.0, inflate_w=0)
    x.importance[1] = 5.0
    x.committed = [6]
    masked = set(range(4, 16)) - {6}
    assert x.rows([4, 5, 6, 7], masked, 16) == [1, 4, 5, 6]  # the denser side first: 4 and 5
    assert replaced(x, inflate_w=3).rows([4, 5, 6, 7], masked, 16) == list(range(1, 7))
    shifted = planner(shift=1, current_k=2, rollout_p=0.0, inflate_w=0)
    shifted.importance[3] = 5.0
    shifted.committed = [6]
    assert shifted.rows([4, 5, 6, 7], masked, 16) == [0, 3, 4, 6]  # 3 is in the set, so the nucleus is another one
    assert x.rows([4, 5, 6, 7], masked, 4) == [1, 6]  # everything lies behind a stop id
    x.importance = None
    assert x.rows([4, 5, 6, 7], masked, 16) == list(range(16))


def replaced(x, **options):
    x.o = replace(x.o, **options)
    return x


def test_density_decides_among_equals():
    """All equally certain: those beside known tokens first."""
    x = planner(gen_length=12, block_length=12, current_k=3, d2_sigma=2.0)
    known = {9}
    s = density([i in known for i in range(4, 16)], 2.0)
    picked = x.candidates(range(4, 16), [i for i in range(4, 16) if i not in known], dict(enumerate(s, start=4)))
    assert set(picked) == {4, 5, 8}


# ------------------------------------------------------------------------------------------- d2: generations

DECODERS = [
    {"num_transfer_tokens": 1},
    {"threshold": 0.5},
    {"factor": 1.0},
    {"gamma": 0.5, "num_transfer_tokens": 1},
    {"steps": 9, "schedule": "dream", "remasking": "entropy"},
    {"steps": 9, "remasking": "topk_margin", "temperature": 0.7, "seed": 3},
    {"threshold": 0.6, "cfg_scale": 1.0},
    {"threshold": 0.3, "kl_threshold": 0.5},
    {"autoregressive": True, "num_transfer_tokens": 2},
]


@pytest.mark.parametrize("full", [FULL_DLLM, {"cache": "dllm", "kp": 1, "kr": 3, "rou": 1.0}, FULL_D2], ids=str)
@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_where_everything_is_recomputed(family, decoder, full):
    model = oracle(family)
    prompt = prompt_of(model, 7)
    o = Options(gen_length=13, block_length=5, stop_at_eos=False, **decoder)
    plain = loops.generate(model, prompt, replace(o, cache="none"))
    run = loops.generate(model, prompt, replace(o, **full))
    assert outcome(run) == outcome(plain) and run.nfe == plain.nfe
    assert all(step.rows == list(range(20)) for step in run.steps)
    for kind in plain.margins.keys() - {"origin"}:
        assert run.margins[kind] <= plain.margins[kind] * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("full", [FULL_DLLM, FULL_D2], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_with_infill_and_stop(family, full):
    model = oracle(family)
    prompt = prompt_of(model, 9)
    for i in (3, 4, 7):
        prompt[i] = model.shape.mask_id
    o = Options(gen_length=12, block_length=4, threshold=0.5, infill=True, stop_at_eos=False)
    middle = loops.generate(model, prompt, replace(o, cache="none")).token_ids[5]
    model = oracle(family, eos_token_id=middle)
    o = replace(o, stop_at_eos=True)
    plain = loops.generate(model, prompt, replace(o, cache="none"))
    assert outcome(loops.generate(model, prompt, replace(o, **full))) == outcome(plain)
    nothing = replace(o, gen_length=0, **full)
    assert loops.generate(model, prompt, nothing).prompt_ids.count(model.shape.mask_id) == 0


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("decoder", DECODERS[:-1], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_d2_generation(family, decoder, quirks):
    """The rows of every step, and that approximations approximate: some other tokens, in the end all of them."""
    model = oracle(family)
    shift = model.shape.shift
    prompt = prompt_of(model, 10)
    o = Options(gen_length=21, block_length=7, cache="d2", current_k=6, inflate_w=0, stop_at_eos=False, **decoder)
    run = loops.generate(model, prompt, replace(o, reference_quirks=quirks))
    assert run.steps[0].rows == list(range(31))
    masked = set(range(10, 31))
    just = []
    for n, step in enumerate(run.steps):
        assert set(just) <= set(step.rows) and set(step.logit_rows) <= set(step.rows)
        if not quirks:
            assert step.logit_rows == [i - shift for i in sorted(masked) if i - shift in step.rows]
            assert {i - shift for i, _ in step.committed} <= set(step.rows)
            block = sorted(i for i in masked if (i - 10) // 7 == (min(masked) - 10) // 7)
            if n and len(block) <= 6:  # the current block comes first
                assert {i - shift for i in block} <= set(step.rows)
        just = [i for i, _ in step.committed]
        masked -= set(just)
    assert not masked and model.shape.mask_id not in run.token_ids
    assert sum(len(step.rows) for step in run.steps[1:]) < 31 * len(run.steps[1:])


def test_d2_certainties_are_updated():
    """A certainty is that of the last step that computed the row; under quirks that of step 0."""
    for quirks in (False, True):
        model = oracle("llada")
        o = Options(gen_length=12, block_length=12, cache="d2", current_k=4, num_transfer_tokens=1, stop_at_eos=False)
        sequence = loops.Generation(model, prompt_of(model, 8), replace(o, reference_quirks=quirks))
        sequence.step(sequence.plan())
        first = dict(sequence.planner.certainty)
        assert sorted(first) == list(range(8, 20))
        rows = sequence.plan()
        masked = set(sequence.masked)
        sequence.step(rows)
        changed = {i for i in first if sequence.planner.certainty[i] != first[i]}
        assert changed == (set() if quirks else masked & set(rows))


def test_d2_sigma_by_default():
    """Where steps are counted the cache brings its prior along; a rule on probabilities and 0 turn it off."""
    assert Options(cache="d2", d2_sigma=7.0).prior_sigma == 0.0  # threshold 0.9 is in force
    o = Options(cache="d2", d2_sigma=7.0, num_transfer_tokens=1)
    assert o.prior_sigma == 7.0 and o.tau is None
    for change in ({"threshold": 0.9}, {"factor": 1.0}, {"gamma": 0.1}, {"sigma": 0.0}, {"cache": "prefix"}):
        assert replace(o, **change).prior_sigma == 0.0
    assert replace(o, autoregressive=True).prior_sigma == 0.0
    assert replace(o, sigma=3.0, threshold=0.9).prior_sigma == 3.0


# ------------------------------------------------------------------------------------------- dllm


def test_least_similar():
    """The row that was changed comes first; scaling changes nothing."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    new = old * torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.float64)[:, None]
    new[4] += 0.5 * torch.randn(8, generator=generator, dtype=torch.float64)
    new[2] = -new[2]
    decisions = Decisions()
    assert dllm.least_similar(new, old, 1, decisions) == [2] and dllm.least_similar(new, old, 2, decisions) == [2, 4]
    cosine = torch.nn.functional.cosine_similarity(new, old, dim=-1)
    assert decisions.smallest["verify"] == pytest.approx(min(float(cosine[4] + 1), float(1 - cosine[4])))
    assert dllm.least_similar(torch.ones(4, 3), torch.ones(4, 3), 2, Decisions()) == [0, 1]


def dllm_steps(model, tokens, changed, response, o):
    """Features after evaluating `tokens`, then after evaluating `changed`; and the second step's results."""
    features = dllm.Features.of(model, len(tokens))
    dllm.forward(model, tokens, features, response, o, Decisions())
    before = dllm.Features(*(x.clone() for x in (features.k, features.v, features.a, features.f)))
    hidden, rows = dllm.forward(model, changed, features, response, o, Decisions())
    return before, features, hidden, rows


@pytest.mark.parametrize("family", FAMILIES)
def test_dllm_refresh(family):
    """What each kind of step leaves alone, bit by bit; layer by layer for the second layer (the first is refreshed)."""
    model = oracle(family)
    response = [6, 7, 8, 9, 10, 11, 12, 13]
    prompt = [0, 1, 2, 3, 4, 5]
    tokens = torch.tensor(prompt_of(model, 6) + [model.shape.mask_id] * 8)
    changed = tokens.clone()
    changed[[7, 9]] = torch.tensor([5, 6])

    def equal(a, b, rows):
        return torch.equal(a[1][rows], b[1][rows])

    def differ(a, b, rows):
        return all(not torch.equal(a[1][i], b[1][i]) for i in rows)

    never = {"kp": 99, "kr": 99}
    a, b, _, rows = dllm_steps(model, tokens, changed, response, Options(rou=0.0, **never))
    assert rows == list(range(14))  # of the first layer
    assert all(torch.equal(x[1:], y[1:]) for x, y in ((a.k, b.k), (a.v, b.v), (a.a, b.a), (a.f, b.f)))
    assert not torch.equal(a.a[0], b.a[0])

    a, b, _, _ = dllm_steps(model, tokens, changed, response, Options(rou=0.25, **never))
    picked = [i for i in response if not torch.equal(a.k[1, i], b.k[1, i])]
    assert len(picked) == 2 and differ(a.v, b.v, response) and equal(a.v, b.v, prompt)
    left = [i for i in range(14) if i not in picked]
    assert all(differ(x, y, picked) and equal(x, y, left) for x, y in ((a.a, b.a), (a.f, b.f)))

    a, b, _, _ = dllm_steps(model, tokens, changed, response, Options(kp=1, kr=99, rou=0.0))
    assert differ(a.a, b.a, prompt) and equal(a.a, b.a, response) and equal(a.k, b.k, response)
    a, b, _, _ = dllm_steps(model, tokens, changed, response, Options(kp=99, kr=1))
    assert differ(a.a, b.a, response) and equal(a.a, b.a, prompt) and equal(a.k, b.k, prompt)

    nothing = Options(rou=0.0, always_refresh_layers=(), **never)
    _, b, hidden, rows = dllm_steps(model, tokens, changed, response, nothing)
    stream = model.embed[changed] + b.a.sum(0) + b.f.sum(0)
    scale = stream.pow(2).mean(-1, keepdim=True) + model.shape.eps
    assert rows == [] and torch.allclose(hidden, stream / scale.sqrt() * model.final_norm, atol=1e-12)
    assert (a.evaluations, b.evaluations) == (0, 2)


def test_dllm_schedule():
    """t mod kp and t mod kr over the whole generation, not by block; the verified share of the whole response."""
    model = oracle("llada")
    o = Options(gen_length=12, block_length=4, cache="dllm", kp=5, kr=3, rou=0.3, always_refresh_layers=())
    one = replace(o, num_transfer_tokens=1, stop_at_eos=False)
    run = loops.generate(model, prompt_of(model, 6), replace(one, rou=0.0))
    assert [len(step.rows) for step in run.steps] == [18, 0, 0, 12, 0, 6, 12, 0, 0, 12, 6, 0]
    run = loops.generate(single_layer(model), prompt_of(model, 6), one)
    assert [len(step.rows) for step in run.steps] == [18, 3, 3, 12, 3, 9, 12, 3, 3, 12, 9, 3]  # floor(.3 * 12) = 3


def single_layer(model):
    config = models.llada_config(n_layers=1)
    return ReferenceModel(config, models.random_tensors(config), torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_dllm_is_an_approximation(family):
    """Other tokens than without a cache, but more of them agree than by chance."""
    model = oracle(family)
    o = Options(gen_length=32, block_length=16, num_transfer_tokens=1, stop_at_eos=False)
    agreement = []
    for seed in range(3):
        prompt = prompt_of(model, 12, seed)
        plain = loops.generate(model, prompt, replace(o, cache="none")).token_ids
        run = loops.generate(model, prompt, replace(o, cache="dllm", kp=10, kr=4)).token_ids
        agreement.append(sum(a == b for a, b in zip(plain, run, strict=True)))
    assert 3 < sum(agreement) / 3 < 32


def test_guidance_at_intervals():
    """The second pass runs in the first five steps and every c-th; in between the last difference is used."""
    model = oracle("llada")
    prompt = prompt_of(model, 6)
    o = Options(gen_length=12, block_length=12, num_transfer_tokens=1, cfg_scale=1.5, stop_at_eos=False, **FULL_DLLM)
    every = loops.generate(model, prompt, o)
    assert every.nfe == 24 and outcome(every) == outcome(loops.generate(model, prompt, replace(o, cache="none")))
    some = loops.generate(model, prompt, replace(o, cfg_interval_steps=4))
    assert some.nfe == 12 + 5 + 1  # and step 8
    assert outcome(some)[2][:5] == outcome(every)[2][:5] and outcome(some)[2] != outcome(every)[2]
    assert [len(step.logit_rows) for step in some.steps] == [12 - n for n in range(12)]
    spread = replace(o, block_length=4, cfg_interval_steps=4)
    rows = [len(step.logit_rows) for step in loops.generate(model, prompt, spread).steps]
    assert rows == [12, 11, 10, 9, 8, 3, 2, 1, 4, 3, 2, 1]  # where it is computed, for every masked position

    sequence = loops.Generation(model, prompt, replace(o, cfg_interval_steps=99))
    for _ in range(5):
        sequence.step(sequence.plan())
    kept = {i: x.clone() for i, x in sequence.guidance.items()}
    eligible = sequence.eligible()
    canvas = sequence.tokens.clone()
    logits = model.full_logits(canvas)[eligible] + 1.5 * torch.stack([kept[i] for i in eligible])
    logits[:, model.shape.mask_id] = -math.inf
    sequence.step(sequence.plan())
    ((position, token),) = sequence.trace[-1].committed
    assert int(logits[eligible.index(position)].argmax()) == token and sequence.nfe == 11


# ------------------------------------------------------------------------------------------- reference_quirks


def quirky(searched, **options):
    x = planner(reference_quirks=True, **options)
    x.searched = searched
    return x


def test_released_candidates_by_hand():
    """Positions 4..15. The block of the last step had 3 masked positions left: ends fall on 6, 9, 12, 15."""
    masked = [5, 8, 10, 13, 14, 15]
    s = {i: 0.5 for i in range(4, 16)} | {5: 0.1, 8: 0.2, 10: 0.9, 13: 0.7, 14: 0.8, 15: 0.95}

    def chosen(k, searched=(4, 5, 7), masked=masked):
        x = quirky(list(searched), current_k=k)
        return sorted(x.candidates_released(masked, s)), x

    assert chosen(1)[0] == [5]
    assert chosen(2)[0] == [5, 8]  # the second candidate is 8: up to 9
    assert chosen(3)[0] == [5, 8, 10]  # the third is 10: up to 12
    assert chosen(4)[0] == [5, 10, 14, 15]  # the fourth is 13: up to 15
    assert chosen(2, searched=(8, 10))[0] == [8]  # the search begins at 8, but counts from 5: up to 9
    assert chosen(2, searched=(8, 10), masked=masked[1:])[0] == [8, 10]
    assert chosen(1, searched=(9,))[0] == []  # up to 5, from 9
    # the bonus: 4, 5 and 7 get the largest score of all, committed positions included
    x = chosen(6)[1]
    assert {i: x.scores[i] for i in (4, 5, 8)} == pytest.approx({4: 0.5 + 0.95, 5: 0.1 + 0.95, 8: 0.2})
    x.bonus = 3.0  # of another sequence
    x.candidates_released(masked, s)
    assert x.scores[5] == pytest.approx(3.1)


def test_released_bonus_needs_positive_scores():
    """With negative scores (entropy) the bonus is a malus, and the block comes last."""
    x = quirky([4, 5, 6, 7], current_k=2)
    s = {i: -1.0 for i in range(4, 16)} | {8: -0.5, 9: -0.9}
    assert sorted(x.candidates_released([4, 8, 9], s)) == [8, 9]


def test_released_rows_of_dream():
    """Row P - 1 is computed exactly if position P is chosen; it still takes part in the nucleus."""
    x = quirky([4, 5, 6, 7], shift=1, current_k=1, rollout_p=0.0, inflate_w=0)
    x.importance[3] = 9.0
    x.importance[1] = 2.0
    x.committed = []
    assert x.assemble_released([4]) == [3]  # as the first of the nucleus, then by its own rule
    assert x.assemble_released([5]) == [4]  # the first of the nucleus is taken out again
    assert x.assemble([5]) == [3, 4] and x.assemble([4]) == [1, 3]
    x.importance[3] = 0.0
    assert x.assemble_released([4]) == [1, 3]
    assert replaced(x, inflate_w=9).assemble_released([5]) == [1, 2, 3, 4]


def test_uncomputed_positions_can_be_committed():
    """Blocks of two, one row a step, everything committed at once: token 0 for the position that was not chosen."""
    model = oracle("llada")
    vocab = model.vocab_size
    o = Options(gen_length=8, block_length=2, cache="d2", current_k=1, rollout_p=0.0, inflate_w=0, threshold=0.0)
    o = replace(o, stop_at_eos=False, reference_quirks=True)
    run = loops.generate(model, prompt_of(model, 6), o)
    assert [len(step.committed) for step in run.steps] == [2] * 4
    for step in run.steps[1:]:
        blank = [token for position, token in step.committed if position not in step.rows]
        assert blank in ([0], []) and len(step.logit_rows) == 2 - len(blank)
    assert run.token_ids.count(0) >= 2
    proposal = loops.propose(torch.zeros(1, vocab), [9], 0, model.shape, o, [9])
    assert proposal.confidence == [pytest.approx(1 / vocab)] and proposal.exact == [True]
    assert proposal.entropy == [pytest.approx(math.log(vocab))] and proposal.token_gap == [math.inf]
    few = loops.propose(torch.zeros(1, vocab), [9], 0, model.shape, replace(o, top_p=0.0999, top_k=3), [9])
    assert few.tokens == [0] and few.confidence == [pytest.approx(1 / 30)]  # top_p: ids in order; top_k: all equal
    assert few.p[0][:30].min() > 0 and float(few.p[0][30:].sum()) == 0
    plain = loops.generate(model, prompt_of(model, 6), replace(o, reference_quirks=False))
    assert all(position in step.rows for step in plain.steps for position, _ in step.committed)


def test_released_prefix_of_dream():
    model = oracle("dream")
    o = Options(gen_length=8, block_length=4, num_transfer_tokens=1, stop_at_eos=False, reference_quirks=True)
    rows = [step.rows for step in loops.generate(model, prompt_of(model, 6), o).steps]
    assert rows[0] == list(range(14)) and rows[1] == list(range(5, 13)) and rows[5] == list(range(9, 13))
    plain = loops.generate(model, prompt_of(model, 6), replace(o, reference_quirks=False))
    assert plain.steps[1].rows == list(range(5, 14))
    dual = loops.generate(model, prompt_of(model, 6), replace(o, cache="dual"))
    assert dual.steps[1].rows == [5, 6, 7, 8]
    llada = oracle("llada")
    assert loops.generate(llada, prompt_of(llada, 6), o).steps[1].rows == list(range(6, 14))


def test_top_up_by_hand():
    """Positions 0, 1 are the prompt, 2..4 generated; generated ones first by c + score, then the prompt by c."""
    a = SimpleNamespace(total=5, first=2, decisions=Decisions(), scores={2: 0.1, 3: 0.2, 4: 0.3})
    a.importance = torch.tensor([3.0, 9.0, 1.0, 0.5, 0.45], dtype=torch.float64)
    b = SimpleNamespace(total=5, first=2, decisions=Decisions(), scores=a.scores, importance=torch.ones(5))
    assert d2.top_up([a, b], [[2], [0, 1, 2, 3]]) == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert d2.top_up([a, b], [[2], [0, 1]])[0] == [2, 4]  # .45 + .3 before .5 + .2
    assert a.decisions.smallest["top up"] == pytest.approx(0.05)
    assert d2.top_up([a, b], [[], [0, 1]])[0] == [2, 4] and d2.top_up([a], [[3]]) == [[3]]


@pytest.mark.parametrize("family", FAMILIES)
def test_released_batches(family):
    """Equal numbers of rows, as many as the most that one asks for."""
    model = oracle(family)
    prompts = [prompt_of(model, 7, seed) for seed in range(3)]
    o = Options(gen_length=16, block_length=8, cache="d2", current_k=3, threshold=0.4, stop_at_eos=False)
    o = replace(o, reference_quirks=True, inflate_w=2)
    alone = [loops.generate(model, prompt, o) for prompt in prompts]
    batch = loops.generate_batch(model, prompts, o)
    of_block = [
        [[len(s.rows) for s in run.steps if (s.committed[0][0] - 7) // 8 == b] for run in batch] for b in (0, 1)
    ]
    for counts in of_block:  # sequences that are done with a block wait for the others
        for t in range(max(map(len, counts))):
            assert len({x[t] for x in counts if t < len(x)}) == 1
    assert any(x.steps[1].rows != y.steps[1].rows for x, y in zip(batch, alone, strict=True))
    for x, y in zip(batch, alone, strict=True):
        assert set(y.steps[1].rows) <= set(x.steps[1].rows)
    with pytest.raises(ValueError, match="length"):
        loops.generate_batch(model, [prompts[0], prompts[1][:-1]], o)
    for cache in ("d2", "prefix"):  # otherwise sequences know nothing of each other
        plain = replace(o, cache=cache, reference_quirks=cache == "prefix")
        assert [outcome(x) for x in loops.generate_batch(model, prompts, plain)] == [
            outcome(loops.generate(model, prompt, plain)) for prompt in prompts
        ]


def test_released_stop():
    """Only EOS stops, and candidates behind it are still computed."""
    model = oracle("llada")
    prompt = prompt_of(model, 6)
    o = Options(gen_length=12, block_length=12, num_transfer_tokens=1, cache="none", stop_at_eos=False)
    ids = loops.generate(model, prompt, o).token_ids
    config = models.llada_config(eos_token_id=[model.shape.eos_id, ids[4]])
    twin = ReferenceModel(config, models.random_tensors(config), torch.float64)
    o = replace(o, stop_at_eos=True)
    assert loops.generate(twin, prompt, o).nfe < 12
    assert loops.generate(twin, prompt, replace(o, reference_quirks=True)).token_ids == ids
    x = quirky([4, 5, 6, 7], current_k=12, rollout_p=0.0, inflate_w=0)
    assert set(range(4, 16)) <= set(x.rows([4, 5, 6, 7], set(range(4, 16)), 6))
    with pytest.raises(ValueError, match="prompts"):
        hole = [model.shape.mask_id, *prompt]
        loops.generate(model, hole, Options(cache="d2", infill=True, reference_quirks=True))


def test_observed_certainty():
    """exp(-H) with entropy; under quirks the released confidences: negative entropies, and debiased probabilities."""
    proposal = Proposal([1], [-0.7], [1.0], [False], entropy=[0.7])
    attention = attention_rows([0], 16)
    for quirks, expected in ((False, math.exp(-0.7)), (True, -0.7)):
        x = planner(remasking="entropy", reference_quirks=quirks)
        x.certainty = {}
        x.observe([5], proposal, [0], attention, [5], [])
        assert x.certainty == {5: pytest.approx(expected)}
    for quirks, expected in ((False, 0.6), (True, -0.6 * math.log(0.25))):
        x = planner(token_frequencies=(0.5, 0.25), reference_quirks=quirks)
        x.certainty = {}
        x.observe([5], replace(proposal, confidence=[0.6]), [0], attention, [5], [6])
        assert x.certainty == {5: pytest.approx(expected)} and x.committed == [6] and x.searched == [5]
