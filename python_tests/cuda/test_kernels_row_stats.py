"""Vocabulary statistics, tile by tile: against the CPU's for the same logits and keys, and against fp64."""

import numpy as np
import pytest
import torch
from cuda_support import normal, report, rng, stored, tensor
from reference import philox

from dllm_ext import _C, UsageError

VOCABS = (1, 2, 31, 33, 511, 1000, 2049)
EXACT = ("top1_id", "top2_id", "top1_logit", "top2_logit", "sampled_id", "sampled_logit", "finite")
SUMS = ("log_sum_exp", "entropy")
UNWRITTEN = 0x5A5A5A5A  # the bytes of rows that a launch must not write


def logits_of(rows, vocab, spread=4.0, *key):
    return (spread * rng(rows, vocab, *key).standard_normal((rows, vocab))).astype(np.float32)


def stats(cuda, logits, tile=None, spare=2, **params):
    """Of all rows; those between the count and the capacity are checked to be untouched."""
    out = cuda.row_stats(logits, len(logits) + spare, tile or logits.shape[1], **params)
    assert (out["top1_id"][len(logits) :] == UNWRITTEN).all() and (out["sampled_id"][len(logits) :] == UNWRITTEN).all()
    return out[: len(logits)]


def check(got, logits, **params):
    """Ids, logits and draws are the CPU's, exactly; the sums are the CPU's but for the last bits of exp and log."""
    cpu = _C.ops.row_stats(logits, **params)
    for name in EXACT:
        assert np.array_equal(got[name], cpu[name]), name
    for name in SUMS:
        assert np.allclose(got[name], cpu[name], rtol=2e-7, atol=2e-7), name
    there = cpu["finite"]
    if there.any():
        x = torch.from_numpy(logits[there] / np.float32(params.get("temperature", 1))).double()
        banned = params.get("banned_id", -1)
        if 0 <= banned < x.shape[1]:
            x[:, banned] = -np.inf
        lse = torch.logsumexp(x, -1)
        p = torch.softmax(x, -1)
        entropy = -torch.where(p > 0, p * (x - lse[:, None]), 0.0).sum(-1)
        assert np.allclose(got["log_sum_exp"][there], lse, rtol=1e-7, atol=1e-7)
        assert np.allclose(got["entropy"][there], entropy, rtol=1e-6, atol=1e-6) and (got["entropy"] >= 0).all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_row_stats(cuda, vocab):
    """In one tile, in tiles that divide the vocabulary, and in ragged ones that begin at any id."""
    for rows, spread in ((1, 0.1), (7, 4.0), (20, 30.0)):
        logits = logits_of(rows, vocab, spread)
        for tile in {vocab, max(1, vocab // 2), min(vocab, 300)}:
            check(stats(cuda, logits, tile), logits)
            params = {"mask_id": vocab - 1, "banned_id": int(logits[0].argmax()), "temperature": 0.7}
            check(stats(cuda, logits, tile, **params), logits, **params)
    report(cuda, f"row_stats_tile {rows} x {vocab} in tiles of {tile}", 4 * logits.size)


def test_a_wide_tile_goes_in_parts(cuda):
    """A block takes 8192 logits at a time."""
    logits = logits_of(2, 20011)
    logits[1, [8191, 8192, 16384]] = 40.0
    for tile in (20011, 8192, 9000):
        check(stats(cuda, logits, tile), logits)
    report(cuda, "row_stats_tile 2 x 20011", 4 * logits.size)


def test_no_rows(cuda):
    assert len(stats(cuda, np.zeros((0, 50), np.float32), 20, spare=3)) == 0


def test_ties_go_to_the_lowest_id(cuda):
    for a, b in ((3, 4), (0, 1999), (511, 512), (255, 256), (1023, 1024), (1000, 1030)):
        logits = np.full((1, 2000), -1.0, np.float32)
        logits[0, [a, b]] = 2.0
        for tile in (2000, 512, 256, b):
            got = stats(cuda, logits, tile)
            assert (got["top1_id"][0], got["top2_id"][0]) == (a, b), tile
    flat = np.zeros((2, 2000), np.float32)
    flat[1, ::2] = -0.0  # equal to 0
    for tile in (2000, 77):
        got = stats(cuda, flat, tile)
        assert (got["top1_id"] == 0).all() and (got["top2_id"] == 1).all()
        assert np.allclose(got["entropy"], np.log(2000), rtol=1e-12)


def test_filtered_ids_and_what_is_not_finite(cuda):
    logits = np.full((1, 1500), -np.inf, np.float32)
    logits[0, [700, 1400]] = 1.0, 2.0
    for tile in (1500, 100):
        for params in ({}, {"banned_id": 700}, {"mask_id": 1400}, {"banned_id": 700, "mask_id": 1400}):
            check(stats(cuda, logits, tile, **params), logits, **params)
        nothing = np.full((2, 300), -np.inf, np.float32)
        assert not stats(cuda, nothing, min(tile, 300))["finite"].any()
    for value in (np.nan, np.inf, -np.nan):
        for column in (0, 17, 511, 512, 999):
            logits = logits_of(3, 1000)
            logits[1, column] = value
            for tile in (1000, 512, 300):
                got = stats(cuda, logits, tile)
                assert got["finite"].tolist() == [True, False, True] and got["top1_id"][1] == -1
                assert stats(cuda, logits, tile, banned_id=column)["finite"].all()


def test_certainty_is_resolved(cuda):
    """1 - p = 1 - exp(top1 - lse), far below the resolution of fp32."""
    logits = np.full((1, 1000), -30.0, np.float32)
    logits[0, 123] = 5.0
    for tile in (1000, 130, 64):
        got = stats(cuda, logits, tile)
        missing = -np.expm1(np.float64(got["top1_logit"][0]) - got["log_sum_exp"][0])
        assert np.isclose(missing, 999 * np.exp(-35.0), rtol=0.02), tile


@pytest.mark.parametrize("noise_scale", [0.01, 0.5, 1.0, 3.0, 100.0])
def test_draws_are_the_cpu_s(cuda, noise_scale):
    """The same id as the CPU's and as comparing all noisy logits in fp64."""
    seed, step = 2**40 + 5, 6
    for vocab, spread in ((3000, 4.0), (700, 0.0), (5, 1.0)):
        logits = logits_of(9, vocab, spread)
        positions = np.array([0, 5, 5, 17, 900, 4, 3, 2, 1], np.int32)
        noise = philox.token_gumbel(seed=seed, step=step, positions=positions, vocab_size=vocab)
        score = logits.astype(np.float64) + noise_scale * noise
        score[:, 2] = -np.inf
        params = {"mask_id": 2, "noise_scale": noise_scale, "seed": seed, "step": step, "positions": positions}
        for tile in {vocab, min(vocab, 256), max(1, vocab // 3)}:
            got = stats(cuda, logits, tile, **params)
            check(got, logits, **params)
            assert np.array_equal(got["sampled_id"], score.argmax(-1))
            assert np.array_equal(got["sampled_logit"], logits[np.arange(9), got["sampled_id"]])


def test_a_row_does_not_depend_on_its_company(cuda):
    logits, positions = logits_of(12, 1100), np.arange(12, dtype=np.int32)
    params = {"noise_scale": 0.8, "seed": 3, "step": 1, "temperature": 1.3}
    whole = stats(cuda, logits, 400, positions=positions, **params)
    for rows in (slice(0, 1), slice(3, 4), slice(5, 12)):
        for spare in (0, 300):
            part = stats(cuda, logits[rows].copy(), 400, spare, positions=positions[rows].copy(), **params)
            assert all(part[name].tobytes() == whole[name][rows].tobytes() for name in whole.dtype.names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lm_head(cuda, dtype):
    """Product and statistics together against the CPU's fused LM head, where no decision is closer than rounding."""
    k, vocab, rows = 96, 1000, 9
    w, x = stored(normal(vocab, k), dtype), stored(normal(rows, k, key=1), dtype)
    logits = np.zeros((rows, vocab), np.float32)
    cuda.dense_linear(dtype, w, x, logits)
    params = {"mask_id": 7, "noise_scale": 0.9, "seed": 11, "step": 2, "positions": np.arange(rows, dtype=np.int32)}
    got = stats(cuda, logits, 256, **params)
    if dtype == "float16":  # not a type of the CPU's: its fp32 on the same values
        w, x = (tensor(a, dtype).float().numpy() for a in (w, x))
        dtype = "float32"
    cpu = _C.ops.lm_head_stats(_C.ops.PackedLinear([w], dtype), x, **params)
    for name in ("top1_id", "top2_id", "sampled_id", "finite"):
        assert np.array_equal(got[name], cpu[name]), name
    for name in ("top1_logit", "top2_logit", "sampled_logit", "log_sum_exp", "entropy"):
        assert np.allclose(got[name], cpu[name], rtol=1e-5, atol=1e-5), name


def test_misuse(cuda):
    logits = logits_of(2, 10)
    for arguments, message in [
        ({"capacity": 1}, "2 rows are more than the capacity 1"),
        ({"tile": 0}, "tile = 0"),
        ({"noise_scale": 1.0}, "noise needs positions"),
        ({"noise_scale": 1.0, "positions": np.zeros(3, np.int32)}, "noise needs positions"),
        ({"logits": logits.astype(np.float64)}, "logits: expected float32, got float64"),
    ]:
        with pytest.raises(UsageError, match=message):
            cuda.row_stats(**({"logits": logits, "capacity": 2, "tile": 10} | arguments))
