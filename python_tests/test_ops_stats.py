"""Row statistics and the fused LM head: against fp64, against each other, and noise against the numpy formula."""

import numpy as np
import pytest
import torch
from ops_support import (
    DTYPES,
    ISAS,
    ROWS,
    check_error,
    empty,
    instruction_set,
    ops,
    stored,
    tensor,
    threads,
)
from reference import philox

VOCABS = (1, 2, 5, 31, 32, 33, 511, 512, 513, 1000, 2049)


@pytest.fixture(params=ISAS)
def isa(request):
    with instruction_set(request.param) as name:
        yield name


def logits_of(rows, vocab, spread=4.0, seed=0):
    r = np.random.default_rng([rows, vocab, seed])
    return (spread * r.standard_normal((rows, vocab))).astype(np.float32)


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


def expected(logits, mask_id=-1, banned_id=-1, temperature=1.0):
    """The definition, in fp64 on the (exactly represented) logits."""
    x = (logits / np.float32(temperature)).astype(np.float64)
    if 0 <= banned_id < x.shape[1]:
        x[:, banned_id] = -np.inf
    t = torch.from_numpy(x)
    p = torch.softmax(t, -1)
    lse = torch.logsumexp(t, -1).numpy()
    entropy = -torch.where(p > 0, p * (t - torch.from_numpy(lse)[:, None]), 0.0).sum(-1).numpy()
    proposed = x.copy()
    if 0 <= mask_id < x.shape[1]:
        proposed[:, mask_id] = -np.inf
    order = np.argsort(-proposed, axis=1, kind="stable")  # stable: ties keep the lowest id first
    return proposed, order, lse, entropy


def check(stats, logits, **params):
    proposed, order, lse, entropy = expected(logits, **params)
    rows = np.arange(len(logits))
    for name, rank in (("top1", 0), ("top2", 1)):
        if rank >= logits.shape[1]:
            assert (stats[name + "_id"] == -1).all()
            continue
        ids = order[:, rank]
        values = proposed[rows, ids]
        there = values > -np.inf
        assert np.array_equal(stats[name + "_id"], np.where(there, ids, -1))
        assert np.array_equal(stats[name + "_logit"][there], values[there].astype(np.float32))
    assert stats["finite"].all()
    assert np.allclose(stats["log_sum_exp"], lse, rtol=1e-7, atol=1e-7)
    assert np.allclose(stats["entropy"], entropy, rtol=1e-6, atol=1e-6)
    assert (stats["entropy"] >= 0).all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_row_stats(isa, vocab):
    for rows, spread in ((1, 0.1), (7, 4.0), (40, 30.0)):
        logits = logits_of(rows, vocab, spread)
        check(ops.row_stats(logits), logits)
        if vocab > 1:
            mask_id, banned_id = vocab - 1, int(logits[0].argmax())
            if mask_id != banned_id:
                for params in ({"mask_id": mask_id}, {"banned_id": banned_id, "temperature": 0.7}):
                    check(ops.row_stats(logits, **params), logits, **params)
    check(ops.row_stats(logits, temperature=1.7), logits, temperature=1.7)


def test_mask_id_is_never_proposed_but_counts(isa):
    logits = logits_of(3, 700)
    logits[:, 600] = 50.0
    stats = ops.row_stats(logits, mask_id=600)
    assert (stats["top1_id"] != 600).all() and (stats["top2_id"] != 600).all()
    assert np.allclose(stats["log_sum_exp"], 50.0)
    banned = ops.row_stats(logits, banned_id=600)
    assert np.array_equal(banned["top1_id"], stats["top1_id"])
    assert (banned["log_sum_exp"] < 49).all()
    sampled = ops.row_stats(logits, mask_id=600, noise_scale=1.0, positions=np.arange(3, dtype=np.int32))
    assert (sampled["sampled_id"] != 600).all()


def test_ties_go_to_the_lowest_id(isa):
    for a, b in ((3, 4), (0, 1999), (511, 512), (15, 31), (16, 40), (1000, 1030)):
        logits = np.full((1, 2000), -1.0, np.float32)
        logits[0, [a, b]] = 2.0
        stats = ops.row_stats(logits)
        assert (stats["top1_id"][0], stats["top2_id"][0]) == (a, b)
        assert (stats["top1_logit"][0], stats["top2_logit"][0]) == (2.0, 2.0)
    flat = ops.row_stats(np.zeros((1, 2000), np.float32))
    assert (flat["top1_id"][0], flat["top2_id"][0]) == (0, 1)
    assert np.isclose(flat["entropy"][0], np.log(2000), rtol=1e-12)
    signed = np.full((1, 40), -1.0, np.float32)
    signed[0, [7, 9]] = -0.0, 0.0
    assert ops.row_stats(signed)["top1_id"][0] == 7


def test_filtered_ids(isa):
    logits = np.full((1, 1500), -np.inf, np.float32)
    logits[0, [700, 1400]] = 1.0, 2.0
    stats = ops.row_stats(logits)
    assert (stats["top1_id"][0], stats["top2_id"][0], bool(stats["finite"][0])) == (1400, 700, True)
    assert np.isclose(stats["log_sum_exp"][0], np.logaddexp(1.0, 2.0))
    one = ops.row_stats(logits, banned_id=700)
    assert (one["top1_id"][0], one["top2_id"][0], one["entropy"][0]) == (1400, -1, 0.0)
    assert not ops.row_stats(logits, banned_id=700, mask_id=1400)["finite"][0]
    assert not ops.row_stats(np.full((1, 1500), -np.inf, np.float32))["finite"][0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.nan])
def test_not_finite(isa, value):
    for column in (0, 17, 511, 512, 999):
        logits = logits_of(3, 1000)
        logits[1, column] = value
        stats = ops.row_stats(logits)
        assert stats["finite"].tolist() == [True, False, True]
        assert stats["top1_id"][1] == -1
        assert ops.row_stats(logits, banned_id=column)["finite"].all()


def test_certainty_is_resolved(isa):
    """1 - p = 1 - exp(top1 - lse) far below the resolution of fp32."""
    logits = np.full((1, 1000), -30.0, np.float32)
    logits[0, 123] = 5.0
    stats = ops.row_stats(logits)
    missing = -np.expm1(np.float64(stats["top1_logit"][0]) - stats["log_sum_exp"][0])
    assert np.isclose(missing, 999 * np.exp(-35.0), rtol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k,vocab", [(64, 2000), (33, 513), (300, 50), (256, 1024)])
def test_lm_head_is_linear_then_row_stats(isa, dtype, k, vocab):
    r = np.random.default_rng([k, vocab])
    w = stored(r.standard_normal((vocab, k)), dtype)
    head = ops.PackedLinear([w], dtype)
    keys = {"seed": 11, "step": 2}
    for rows in (1, 6, 33, 150):
        x = stored(0.3 * r.standard_normal((rows, k)), dtype)
        logits = empty("float32", rows, vocab)
        ops.linear(head, x, logits)
        positions = r.integers(0, 1000, rows).astype(np.int32)
        for params in (
            {},
            {"mask_id": vocab - 1, "banned_id": 7, "temperature": 1.3},
            {"mask_id": 20, "noise_scale": 0.9, "positions": positions, **keys},
        ):
            assert same(ops.lm_head_stats(head, x, **params), ops.row_stats(logits, **params))
        reference = tensor(x).double() @ tensor(w).double().T
        check_error(logits, tensor(x).float() @ tensor(w).float().T, reference, "float32")


def test_lm_head_bias(isa):
    r = np.random.default_rng(0)
    x, w = r.standard_normal((5, 40)).astype(np.float32), r.standard_normal((700, 40)).astype(np.float32)
    head = ops.PackedLinear([w], "float32", bias=r.standard_normal(700).astype(np.float32))
    logits = empty("float32", 5, 700)
    ops.linear(head, x, logits)
    assert same(ops.lm_head_stats(head, x), ops.row_stats(logits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_invariance(isa, dtype):
    r = np.random.default_rng(5)
    head = ops.PackedLinear([stored(r.standard_normal((1300, 70)), dtype)], dtype)
    x = stored(0.3 * r.standard_normal((max(ROWS), 70)), dtype)
    positions = np.arange(max(ROWS), dtype=np.int32)

    def stats(rows):
        return ops.lm_head_stats(head, x[rows], noise_scale=0.8, seed=3, step=1, positions=positions[rows])

    def part(whole, rows):
        return {name: values[rows] for name, values in whole.items()}

    whole = stats(slice(None))
    for rows in ROWS:
        assert same(stats(slice(0, rows)), part(whole, slice(0, rows))), rows
        assert same(stats(slice(-rows, None)), part(whole, slice(-rows, None))), rows
    for count in (1, 2, 3):
        with threads(count):
            assert same(stats(slice(None)), whole), count


@pytest.mark.parametrize("noise_scale", [0.01, 0.5, 1.0, 3.0, 100.0])
def test_noise_is_the_formula(isa, noise_scale):
    for vocab, spread in ((3000, 4.0), (700, 0.0), (5, 1.0)):
        logits = logits_of(9, vocab, spread)
        positions = np.array([0, 5, 5, 17, 900, 4, 3, 2, 1], np.int32)
        noise = philox.token_gumbel(seed=2**40 + 5, step=6, positions=positions, vocab_size=vocab)
        score = logits.astype(np.float64) + noise_scale * noise
        score[:, 2] = -np.inf
        stats = ops.row_stats(logits, mask_id=2, noise_scale=noise_scale, seed=2**40 + 5, step=6, positions=positions)
        assert np.array_equal(stats["sampled_id"], score.argmax(-1))
        assert np.array_equal(stats["sampled_logit"], logits[np.arange(9), stats["sampled_id"]])
        plain = ops.row_stats(logits, mask_id=2)
        assert np.array_equal(plain["sampled_id"], plain["top1_id"])
        assert all(np.array_equal(plain[n], stats[n]) for n in plain if not n.startswith("sampled"))


def test_checks_its_arguments():
    logits = logits_of(2, 10)
    for params, message in [
        ({"temperature": 0.0}, "temperature"),
        ({"noise_scale": -1.0}, "noise_scale"),
        ({"noise_scale": 1.0}, "positions"),
        ({"positions": np.zeros(3, np.int32)}, "2 elements"),
    ]:
        with pytest.raises(Exception, match=message):
            ops.row_stats(logits, **params)
    with pytest.raises(Exception, match="float32"):
        ops.row_stats(logits.astype(np.float64))
