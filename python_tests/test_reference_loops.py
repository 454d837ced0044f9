"""Tests of the oracle's decoders (python_tests/reference/loops.py): by hand, by brute force, and by what must hold."""

import math
from dataclasses import replace

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import oracle, prompt_of
from reference import loops, philox, published
from reference.loops import Options
from reference.model import ReferenceModel

FAMILIES = models.FAMILIES
CACHES = ("none", "prefix", "dual")


pytestmark = pytest.mark.usefixtures("one_thread")


def with_frequent_eos(family, prompt, o):
    """The model, its EOS id being one that it generates in the middle of the text."""
    run = loops.generate(oracle(family), prompt, replace(o, stop_at_eos=False))
    middle = [i for i, step in enumerate(run.steps) if len(run.steps) // 4 < i]
    token = next(x for i in middle for at, x in run.steps[i].committed if at > len(prompt) + 2)
    return oracle(family, eos_token_id=token)


# ------------------------------------------------------------------------------------------- numbers per step


@given(st.integers(0, 200), st.integers(1, 100))
@settings(deadline=None)
def test_llada_schedule(masked, steps):
    counts = loops.llada_schedule(masked, steps)
    assert len(counts) == steps and sum(counts) == masked
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)
    assert loops.llada_schedule(10, 4) == [3, 3, 2, 2]


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([1e-3, 1e-2, 0.1]))
@settings(deadline=None)
def test_dream_share(masked, steps, eps):
    """The shares are those of a linear time grid and the last one takes everything: the numbers sum to #masked."""
    left = masked
    for t in range(steps):
        share = loops.dream_share(eps, steps, t)
        if t < steps - 1:
            now, then = 1 - t * (1 - eps) / steps, 1 - (t + 1) * (1 - eps) / steps
            assert share.dtype == torch.float32 and float(share) == pytest.approx(1 - then / now, abs=2e-5)
        n = int(torch.tensor(left, dtype=torch.float32) * share)
        assert 0 <= n <= left
        left -= n
    assert left == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.05, 4))
@settings(deadline=None)
def test_number_for_factor(confidence, factor):
    """Against the definition: the largest n that satisfies the condition for every k <= n."""
    confidence = sorted(confidence, reverse=True)

    def holds(k):
        return k == 1 or (k + 1) * (1 - confidence[k - 1]) < factor

    expected = max(n for n in range(1, len(confidence) + 1) if all(holds(k) for k in range(1, n + 1)))
    assert loops.number_for_factor(confidence, factor)[0] == expected


def test_number_for_factor_by_hand():
    """(k + 1)(1 - c_k) for k = 2, 3, 4 is 0.3, 0.8, 0.5: the third fails at 0.6, and the fourth no longer counts."""
    confidence = [0.95, 0.9, 0.8, 0.9]
    assert [loops.number_for_factor(confidence, f)[0] for f in (0.2, 0.6, 0.81)] == [1, 2, 4]
    assert loops.number_for_factor(confidence, 0.6)[1] == pytest.approx(0.2)


def test_choice_by_hand():
    """Positions 4, 6, 7 and 9 with confidences .5 .7 .5 .1: thresholds are inclusive, equals go from left to right."""
    proposal = loops.Proposal([1, 2, 3, 4], [0.5, 0.7, 0.5, 0.1], [1.0] * 4, [False] * 4)

    def chosen(t=0, steps_of_block=None, **options):
        decisions = loops.Decisions()
        indices = loops.choose(proposal, [4, 6, 7, 9], 3, t, 4, steps_of_block, Options(**options), decisions)
        return indices, decisions.smallest

    assert chosen(threshold=0.5) == ([0, 1, 2], {"threshold": 0.0, "selection": pytest.approx(0.4)})
    assert (
        chosen(threshold=0.6)[0] == [1] and chosen(threshold=0.9)[0] == [1] and chosen(threshold=0.1)[0] == [0, 1, 2, 3]
    )
    assert chosen()[1]["threshold"] == pytest.approx(0.2)  # 0.9 by default
    assert chosen(num_transfer_tokens=2) == ([0, 1], {"selection": 0.0})
    assert chosen(threshold=0.6, num_transfer_tokens=3)[0] == [0, 1, 2]
    assert [chosen(t, 3, steps=3)[0] for t in range(4)] == [[0, 1], [1], [1], [0, 1, 2, 3]]
    assert [len(chosen(t, 3, steps=3, schedule="dream")[0]) for t in range(3)] == [1, 1, 4]  # shares .333, .4995, 1
    drawn = [chosen(5, 9, steps=9, alg_temp=1e9, num_transfer_tokens=1, seed=s)[0] for s in range(40)]
    assert {i for pick in drawn for i in pick} == {0, 1, 2, 3}
    assert chosen(5, 9, steps=9, alg_temp=1e-9, num_transfer_tokens=1)[0] == [1]


# ------------------------------------------------------------------------------------------- one row


def test_filters_by_hand():
    z = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64))

    def kept(top_p, top_k):
        filtered, gap = loops.keep_tokens(z, top_p, top_k)
        assert torch.equal(filtered[filtered > -math.inf], z[filtered > -math.inf])
        return [int(i) for i in (filtered > -math.inf).nonzero()[:, 0]], gap

    assert kept(None, None) == ([0, 1, 2, 3], math.inf)
    assert kept(0.0, None)[0] == [1]
    assert kept(0.39, None)[0] == [1] and kept(0.41, None)[0] == [1, 3]  # the token that crosses p stays
    assert kept(0.41, None)[1] == pytest.approx(0.01) and kept(0.6, None)[1] == pytest.approx(0.1)
    assert kept(None, 3)[0] == [1, 2, 3] and kept(None, 3)[1] == pytest.approx(math.log(2))
    assert kept(0.41, 3)[0] == [1, 3] and kept(0.75, 1)[0] == [1] and kept(None, 9)[0] == [0, 1, 2, 3]
    ties = torch.tensor([1.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    assert (loops.keep_tokens(ties, None, 1)[0] > -math.inf).tolist() == [False, True, True, False]
    assert (loops.keep_tokens(ties, 0.1, None)[0] > -math.inf).tolist() == [False, True, False, False]
    assert (loops.keep_tokens(z, None, 1, mask_id=1)[0] > -math.inf).tolist() == [False, True, False, True]
    assert (loops.keep_tokens(z, None, 2, mask_id=1)[0] > -math.inf).tolist() == [False, True, False, True]


def propose(logits, positions=(5,), step=0, **options):
    shape = replace(oracle("llada").shape, mask_id=2, stop_ids=(3, 1))
    return loops.propose(torch.tensor(logits, dtype=torch.float64), list(positions), step, shape, Options(**options))


def test_proposals_by_hand():
    """Probabilities .1 .2 .4 .3 of ids 0..3; 2 is the mask, 3 is EOS, 1 is the end of turn."""
    row = [[math.log(x) for x in (0.1, 0.2, 0.4, 0.3)]]
    plain = propose(row)
    assert plain.tokens == [3] and plain.confidence == pytest.approx([0.3])  # the mask keeps its probability
    assert plain.token_gap == pytest.approx([math.log(0.3 / 0.2)])
    assert propose(row, remasking="topk_margin").confidence == pytest.approx([0.1])
    entropy = sum(x * math.log(x) for x in (0.1, 0.2, 0.4, 0.3))
    assert propose(row, remasking="entropy").confidence == pytest.approx([entropy])
    no_eos = propose(row, logits_eos_inf=True)
    assert no_eos.tokens == [1] and no_eos.confidence == pytest.approx([0.2 / 0.7])
    late = propose(row, logits_eos_inf=True, confidence_eos_eot_inf=True)
    assert late.tokens == [1] and late.confidence == [0.0] and late.exact == [True]
    assert propose(row, confidence_eos_eot_inf=True, remasking="topk_margin").confidence == [0.0]
    assert propose(row, confidence_eos_eot_inf=True, remasking="entropy").confidence == pytest.approx([entropy])
    filtered = propose(row, top_k=2)
    assert filtered.tokens == [3] and filtered.confidence == pytest.approx([0.3 / 0.7])
    assert propose(row, top_k=2, remasking="topk_margin").confidence == pytest.approx([0.3 / 0.7])
    cooled = propose(row, schedule="dream", temperature=0.5, top_k=3)
    assert cooled.confidence[0] == pytest.approx({3: 9, 1: 4}[cooled.tokens[0]] / (4 + 16 + 9))
    assert propose([[1.0, 5.0, 9.0, 5.0]]).tokens == [1]  # ties: lowest id
    u = philox.selection_uniform(9, 4, [5, 6])
    assert propose(row * 2, (5, 6), step=4, remasking="random", seed=9).confidence == pytest.approx(u)


@pytest.mark.parametrize("schedule", ["llada", "dream"])
def test_sampling_follows_the_distribution(schedule):
    """Over many positions x0 is distributed as softmax(logits / temperature), the mask id left out."""
    logits = [0.5, 1.5, 3.0, 1.0]
    count = 4000
    run = propose([logits] * count, range(count), schedule=schedule, temperature=0.7, seed=1)
    p = (torch.tensor(logits) / 0.7)[[0, 1, 3]].softmax(-1)
    for token, expected in zip((0, 1, 3), p.tolist(), strict=True):
        share = run.tokens.count(token) / count
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    p = torch.tensor(logits).div(0.7 if schedule == "dream" else 1.0).softmax(-1)
    assert run.confidence == pytest.approx([float(p[x]) for x in run.tokens])


# ------------------------------------------------------------------------------------------- whole generations

DECODERS = [
    {"steps": 18},
    {"threshold": 0.5},
    {"factor": 1.0},
    {"num_transfer_tokens": 3},
    {"threshold": 0.8, "num_transfer_tokens": 2},
    {"steps": 9, "remasking": "random"},
    {"steps": 9, "remasking": "topk_margin", "temperature": 0.7},
    {"steps": 9, "remasking": "entropy", "schedule": "dream", "alg_temp": 0.5},
    {"steps": 9, "remasking": "origin", "schedule": "dream", "temperature": 1.0},
    {"threshold": 0.6, "cfg_scale": 1.0},
]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_generation(family, decoder, cache):
    """Termination, one commit per position, blocks in order, least progress, the rows of the cache, and the counts."""
    model = oracle(family)
    prompt = prompt_of(model, 6)
    o = Options(gen_length=17, block_length=6, cache=cache, stop_at_eos=False, seed=2, **decoder)
    run = loops.generate(model, prompt, o)
    committed = [pair for step in run.steps for pair in step.committed]
    assert sorted(committed) == list(zip(range(6, 23), run.token_ids, strict=True))
    blocks = [(i - 6) // 6 for i, _ in committed]
    assert blocks == sorted(blocks)
    assert model.shape.mask_id not in run.token_ids and run.prompt_ids == prompt
    assert run.nfe == len(run.steps) * (2 if "cfg_scale" in decoder else 1)
    if decoder.get("schedule") != "dream":
        assert all(step.committed for step in run.steps) and len(run.steps) <= 17
    if "num_transfer_tokens" in decoder:
        left = {b: 6 for b in range(2)} | {2: 5}
        for step in run.steps:
            b = (step.committed[0][0] - 6) // 6
            assert len(step.committed) >= min(left[b], decoder["num_transfer_tokens"])
            left[b] -= len(step.committed)
    if "steps" in decoder:
        assert len(run.steps) <= decoder["steps"]
    for step in run.steps:
        assert set(step.logit_rows) <= set(step.rows)
        assert {i - model.shape.shift for i, _ in step.committed} <= set(step.logit_rows)
    computed = sum(len(step.rows) for step in run.steps)
    assert (computed == 23 * len(run.steps)) == (cache == "none")
    assert run.margin > 0


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_stop_at_eos(family, cache):
    prompt = prompt_of(oracle(family), 6)
    o = Options(gen_length=30, block_length=10, steps=30, cache=cache, stop_at_eos=False)
    model = with_frequent_eos(family, prompt, o)
    stop = model.shape.eos_id
    whole = loops.generate(model, prompt, o)
    run = loops.generate(model, prompt, replace(o, stop_at_eos=True))
    assert whole.nfe == 30 and stop in whole.token_ids
    first = run.token_ids.index(stop)
    assert set(run.token_ids[first:]) == {stop} and stop not in run.token_ids[:first]
    assert run.nfe < 30
    limit = 36
    for step in run.steps:  # nothing is committed to the right of a stop id that was already there
        assert all(i < limit for i, _ in step.committed)
        limit = min([limit] + [i for i, x in step.committed if x == stop])
    assert limit == 6 + first
    done = {i for step in run.steps for i, _ in step.committed}
    assert set(range(6, limit + 1)) <= done
    prompt[2] = stop  # one in the prompt stops nothing
    assert len(loops.generate(model, prompt, replace(o, stop_at_eos=True)).steps[0].logit_rows) == 10


def test_end_of_turn_stops():
    model = oracle("llada")
    prompt = prompt_of(model, 6)
    o = Options(gen_length=12, block_length=4, steps=12)
    first = loops.generate(model, prompt, o)
    twin = ReferenceModel(models.llada_config(), models.random_tensors(models.llada_config()), torch.float64)
    twin.shape = replace(twin.shape, stop_ids=(model.shape.eos_id, first.token_ids[5]))
    run = loops.generate(twin, prompt, o)
    at = run.token_ids.index(twin.shape.stop_ids[1])
    assert run.nfe < 12 and set(run.token_ids[at + 1 :]) == {model.shape.eos_id}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_infill(family, cache):
    """Masked prompt positions belong to block 0; without `infill` a mask id in the prompt is data."""
    model = oracle(family)
    mask = model.shape.mask_id
    prompt = prompt_of(model, 9)
    holes = [3, 4, 7]
    for i in holes:
        prompt[i] = mask
    o = Options(gen_length=12, block_length=4, steps=12, cache=cache, stop_at_eos=False)
    data = loops.generate(model, prompt, o)
    run = loops.generate(model, prompt, replace(o, infill=True))
    assert data.prompt_ids == prompt and mask not in run.prompt_ids
    assert [x for i, x in enumerate(run.prompt_ids) if i not in holes] == [x for x in prompt if x != mask]
    first_block = [i for step in run.steps[:4] for i, _ in step.committed]
    assert sorted(first_block) == [*holes, 9, 10, 11, 12] and run.nfe == 12
    assert [len(step.committed) for step in run.steps[:4]] == [2, 2, 2, 1]
    assert run.token_ids != data.token_ids


def test_guidance_leaves_out_the_known_prompt():
    """With cfg the prompt is hidden from the second pass, so a prompt of masks (as data) makes it change nothing."""
    model = oracle("llada")
    o = Options(gen_length=12, block_length=4, steps=12, stop_at_eos=False)
    prompt = prompt_of(model, 6)
    assert (
        loops.generate(model, prompt, replace(o, cfg_scale=2.0)).token_ids != loops.generate(model, prompt, o).token_ids
    )
    hidden = [model.shape.mask_id] * 6
    assert (
        loops.generate(model, hidden, replace(o, cfg_scale=2.0)).token_ids == loops.generate(model, hidden, o).token_ids
    )


def test_guidance_keeps_filled_positions():
    """As published, what is hidden from the second pass is what the prompt gave, not what was filled into it."""
    model = oracle("llada")
    sizes = {"gen_length": 4, "block_length": 4, "cfg_scale": 3.0}
    o = Options(num_transfer_tokens=1, cache="none", infill=True, stop_at_eos=False, **sizes)
    seen_later = 0
    for seed in range(8):
        prompt = prompt_of(model, 8, seed)
        for i in (2, 3, 6, 7):
            prompt[i] = model.shape.mask_id
        run = loops.generate(model, prompt, o)
        noise = {"token_uniform": None, "select_uniform": None}
        ids, committed = published.llada(model.full_logits, prompt, model.shape.mask_id, steps=4, **sizes, **noise)
        assert [[i for i, _ in step.committed] for step in run.steps[:4]] == committed
        assert all(int(ids[i]) == token for step in run.steps[:4] for i, token in step.committed)
        seen_later += any(i < 8 for step in committed[:3] for i in step)
    assert seen_later >= 4


def test_dream_reads_row_before():
    """caching.md 8.1 no. 9: the first generated position depends on row P - 1, and the shift is not cosmetic."""
    model = oracle("dream")
    prompt = prompt_of(model, 6)
    o = Options(gen_length=8, block_length=8, steps=8, cache="none", stop_at_eos=False)
    run = loops.generate(model, prompt, o)
    assert run.steps[0].logit_rows == list(range(5, 13))
    canvas = torch.tensor(prompt + [model.shape.mask_id] * 8)
    position, token = run.steps[0].committed[0]
    assert int(model.full_logits(canvas)[position - 1].argmax()) == token
    unshifted = ReferenceModel(models.dream_config(), models.random_tensors(models.dream_config()), torch.float64)
    unshifted.shape = replace(model.shape, family="llada")
    assert loops.generate(unshifted, prompt, o).token_ids != run.token_ids
    with pytest.raises(ValueError, match="position 0"):
        loops.generate(model, [], o)


def test_seed_and_dtype():
    model = oracle("llada")
    prompt = prompt_of(model, 6)
    o = Options(gen_length=12, block_length=4, steps=12, temperature=1.0, stop_at_eos=False)
    runs = [loops.generate(model, prompt, replace(o, seed=s)).token_ids for s in (0, 1, 2**32, 2**32 + 1)]
    assert len({tuple(x) for x in runs}) == 4
    config = models.llada_config()
    single = ReferenceModel(config, models.random_tensors(config), torch.float32)
    half = ReferenceModel(config, models.random_tensors(config), torch.bfloat16)
    for seed in range(4):
        exact = loops.generate(model, prompt, replace(o, seed=seed))
        assert exact.margin > 1e-4  # then fp32 must agree
        assert loops.generate(single, prompt, replace(o, seed=seed)).token_ids == exact.token_ids
        assert loops.generate(half, prompt, replace(o, seed=seed)).steps[0].rows == exact.steps[0].rows


def test_margins_are_what_it_takes_to_change_the_outcome():
    """Adding more than the token gap to the second best token's logit changes the token; half of it does not."""
    row = [[0.3, 1.0, -1.0, 0.8]]
    gap = propose(row).token_gap[0]
    assert propose([[0.3, 1.0, -1.0, 0.8 + 0.5 * gap]]).tokens == [1]
    assert propose([[0.3, 1.0, -1.0, 0.8 + 1.01 * gap]]).tokens == [3]
    model = oracle("llada")
    prompt = prompt_of(model, 6)
    o = Options(gen_length=12, block_length=12, threshold=0.5, cache="none", stop_at_eos=False)
    run = loops.generate(model, prompt, o)
    gap = run.margins["threshold"]
    for sign in (1, -1):
        assert loops.generate(model, prompt, replace(o, threshold=0.5 + sign * 0.99 * gap)).steps == run.steps
    moved = [loops.generate(model, prompt, replace(o, threshold=0.5 + sign * 1.01 * gap)).steps for sign in (1, -1)]
    assert any(steps != run.steps for steps in moved)


def test_token_margin_covers_every_proposal_where_noise_makes_confidence_jump():
    model = oracle("llada")
    prompt = prompt_of(model, 6)
    logits = model.full_logits(prompt + [model.shape.mask_id] * 12)[6:]
    for seed in range(8):
        o = Options(
            gen_length=12, block_length=12, num_transfer_tokens=1, temperature=1.0, seed=seed, stop_at_eos=False
        )
        gaps = loops.propose(logits, list(range(6, 18)), 0, model.shape, o).token_gap
        assert loops.generate(model, prompt, o).margins["token"] <= min(gaps)


def test_impossible_requests():
    model = oracle("llada")
    for o in (Options(gen_length=8, block_length=4, steps=1), Options(gen_length=8, block_length=4, steps=5)):
        with pytest.raises(ValueError, match="multiple"):
            loops.generate(model, [1, 2], o)
    with pytest.raises(ValueError, match="cache"):
        loops.generate(model, [1, 2], Options(gen_length=8, block_length=4, threshold=0.99, cache="none?"))
