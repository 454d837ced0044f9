"""Attention and its head means: ragged batches, grouped heads, all head dims, against torch and fp64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_support import (
    BYTES,
    DTYPES,
    HALVES,
    TORCH,
    blank,
    check_error,
    exact,
    ints,
    is_blank,
    normal,
    report,
    same_bits,
    stored,
    tensor,
)

from dllm_ext import ConfigError, UsageError

# head_dim, n_heads, n_kv
HEADS = [(64, 2, 2), (64, 6, 2), (64, 7, 1), (128, 4, 2), (128, 3, 3)]
HEADS_F32 = [(8, 3, 1), (80, 2, 2), (256, 2, 1)]
# (rows, keys) of sequences: a chunk is 256 keys, a tile 64
BATCHES = [
    [(1, 1)],
    [(16, 64), (1, 3), (0, 5), (9, 65)],
    [(5, 256), (0, 0), (3, 31)],
    [(33, 257), (7, 600), (1, 513)],
]


def slab(dtype, keys, n_kv, head_dim, spare=3, key=0):
    """K and V; beyond the keys NaN, which no result may show."""
    k, v = (normal(n_kv, keys + spare, head_dim, key=key + i) for i in (1, 2))
    k[:, keys:], v[:, keys:] = np.nan, np.nan
    return stored(k, dtype), stored(v, dtype)


class Case:
    def __init__(self, dtype, heads, batch, key=0):
        self.dtype, (self.head_dim, self.n_heads, self.n_kv), self.batch = dtype, heads, batch
        self.rows, self.max_keys = sum(r for r, _ in batch), max(n for _, n in batch)
        self.scale = self.head_dim**-0.5
        self.q = stored(normal(max(self.rows, 1), self.n_heads * self.head_dim, scale=2, key=key), dtype)
        self.slabs = [slab(dtype, n, self.n_kv, self.head_dim, key=10 * i + key) for i, (_, n) in enumerate(batch)]
        ends = np.cumsum([r for r, _ in batch])
        self.sequences = np.array([(e - r, e, n) for e, (r, n) in zip(ends, batch, strict=True)], np.int32)

    def alone(self, s, rows=None):
        """A sequence by itself, or some of its rows."""
        begin, end, keys = self.sequences[s]
        one = object.__new__(Case)
        one.__dict__ |= self.__dict__
        one.rows, one.max_keys = end - begin if rows is None else rows, keys
        one.q, one.slabs = self.q[begin : begin + one.rows], [self.slabs[s]]
        one.sequences = ints(0, one.rows, keys)[None]
        return one

    def nbytes(self):
        size = BYTES[self.dtype]
        kv = sum(2 * n * self.n_kv * self.head_dim for r, n in self.batch if r)
        return size * (kv + 2 * self.rows * self.n_heads * self.head_dim)

    def attention(self, cuda, spare_rows=2, spare_keys=0, spare_columns=0):
        width = self.n_heads * self.head_dim
        q = np.zeros((len(self.q), width + spare_columns), self.q.dtype)
        q[:, :width] = self.q
        out = blank(self.dtype, self.rows + spare_rows, width + spare_columns)
        lse = blank("float32", self.rows + spare_rows, self.n_heads)
        cuda.attention(
            self.dtype, q, self.slabs, self.sequences, self.n_heads, self.scale, self.max_keys + spare_keys, out, lse
        )
        assert is_blank(out[self.rows :]) and is_blank(lse[self.rows :]) and is_blank(out[:, width:])
        return np.ascontiguousarray(out[: self.rows, :width]), lse

    def head_mean(self, cuda, lse, spare_keys=0, spare_columns=5):
        mean = blank("float32", len(lse), self.max_keys + spare_keys + spare_columns)
        cuda.head_mean(
            self.dtype, self.q, self.slabs, self.sequences, self.n_heads, self.scale, self.max_keys + spare_keys,
            lse, mean,
        )  # fmt: skip
        assert is_blank(mean[self.rows :])
        return mean

    def terms(self, s, type_of):
        """q, k, v [heads, .., head_dim] of a sequence; type_of makes tensors of the stored arrays."""
        begin, end, keys = self.sequences[s]
        q = type_of(self.q, self.dtype)[begin:end].view(end - begin, self.n_heads, self.head_dim).transpose(0, 1)
        group = self.n_heads // self.n_kv
        k, v = (type_of(x, self.dtype)[:, :keys].repeat_interleave(group, 0) for x in self.slabs[s])
        return q, k, v


def single(x, dtype):
    return tensor(x, dtype).float()


def rows_of(x):
    """[heads, rows, head_dim] -> [rows, heads * head_dim]"""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


CASES = [(d, h) for d in DTYPES for h in HEADS] + [("float32", h) for h in HEADS_F32]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: "-".join(f"{r}x{n}" for r, n in b))
@pytest.mark.parametrize("dtype,heads", CASES, ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)))
def test_attention(cuda, dtype, heads, batch):
    """The error rule for out, lse and head means of each sequence.

    A probability inherits the rounding of its exponent: in fp32, units in the last place by the size of the scores.
    """
    case = Case(dtype, heads, batch)
    out, lse = case.attention(cuda)
    nbytes, seconds = case.nbytes(), cuda.seconds
    mean = case.head_mean(cuda, lse)
    worst = {"out": 0.0, "lse": 0.0, "mean": 0.0}
    for s, (begin, end, keys) in enumerate(case.sequences):
        if begin == end:
            continue
        mine = slice(begin, end)
        q, k, v = case.terms(s, exact)
        scores = case.scale * (q @ k.transpose(1, 2))
        same_q, same_k, same_v = case.terms(s, tensor)
        same = F.scaled_dot_product_attention(same_q[None], same_k[None], same_v[None], scale=case.scale)[0]
        assert same.dtype == TORCH[dtype]
        every_p = torch.softmax(scores, -1)
        results = [("out", out[mine], rows_of(same), rows_of(every_p @ v), dtype, every_p @ v.abs())]
        q32, k32, _ = case.terms(s, single)
        scores32 = case.scale * (q32 @ k32.transpose(1, 2))
        results += [("lse", lse[mine], torch.logsumexp(scores32, -1).T, torch.logsumexp(scores, -1).T, "float32", None)]
        columns = np.ascontiguousarray(mean[mine, :keys])
        results += [("mean", columns, torch.softmax(scores32, -1).mean(0), every_p.mean(0), "float32", None)]
        assert is_blank(mean[mine, keys:])
        ulps = max(4, 2 * scores.abs().max().item())
        for name, result, other, expected, type_name, terms in results:
            ratio = check_error(result, other, expected, type_name, f"{name} of sequence {s}", ulps, terms)
            worst[name] = max(worst[name], ratio)
        assert np.abs(columns.sum(1, dtype=np.float64) - 1).max() < 1e-5
    text = ", ".join(f"{name} {x:.2f}" for name, x in worst.items() if name != "out")
    report(cuda, f"attention {dtype} {heads} {batch} ({text})", nbytes, worst["out"], seconds)


@pytest.mark.parametrize("dtype,heads", [("float32", (16, 4, 2)), *((d, h) for d in HALVES for h in HEADS[1:4:2])])
def test_a_row_does_not_depend_on_its_company(cuda, dtype, heads):
    """Nor on the capacities, which decide whether keys are split, nor on the strides."""
    case = Case(dtype, heads, [(6, 300), (0, 7), (19, 70), (2, 513)], key=5)
    out, lse = case.attention(cuda)
    mean = case.head_mean(cuda, lse)
    for more in ({"spare_rows": 0, "spare_keys": 511}, {"spare_columns": 24}, {"spare_rows": 90}):
        again, again_lse = case.attention(cuda, **more)
        assert same_bits(again, out) and same_bits(again_lse[: case.rows], lse[: case.rows]), more
    wide = case.head_mean(cuda, lse, spare_keys=200, spare_columns=0)
    for s, (begin, end, keys) in enumerate(case.sequences):
        for rows in {end - begin, min(1, end - begin)} - {0}:
            one, mine = case.alone(s, rows), slice(begin, begin + rows)
            for spare in (0, 40):
                out_one, lse_one = one.attention(cuda, spare_rows=spare)
                assert same_bits(out_one, out[mine]) and same_bits(lse_one[:rows], lse[mine]), (s, rows, spare)
            assert same_bits(one.head_mean(cuda, lse_one)[:rows, :keys], mean[mine, :keys])
        assert same_bits(wide[begin:end, :keys], mean[begin:end, :keys])


@pytest.mark.parametrize("dtype", HALVES)
def test_uncut_sequences_give_the_bits_of_cut_ones(cuda, dtype):
    """Above 8192 (row, head) pairs of capacity a block goes through all chunks: the same sums in the same order."""
    case = Case(dtype, (64, 2, 1), [(20, 530), (3, 200)])
    out, lse = case.attention(cuda)
    uncut, uncut_lse = case.attention(cuda, spare_rows=4100)
    assert same_bits(uncut, out) and same_bits(uncut_lse[: case.rows], lse[: case.rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scores(cuda, dtype):
    """Scores in the thousands: one key takes all, in whichever chunk it lies, and nothing overflows."""
    keys, head_dim = 530, 64
    for winner in (0, 300, 529):
        k = np.zeros((1, keys, head_dim), np.float32)
        k[:, :, 0] = -50
        k[0, winner, 0] = 50
        v = np.broadcast_to(np.arange(keys, dtype=np.float32)[:, None] % 100, (1, keys, head_dim))
        q = np.zeros((3, head_dim), np.float32)
        q[:, 0] = 100
        out, lse = blank(dtype, 3, head_dim), blank("float32", 3, 1)
        cuda.attention(dtype, stored(q, dtype), [(stored(k, dtype), stored(v, dtype))], ints(0, 3, keys)[None], 1, 1.0,
                       keys, out, lse)  # fmt: skip
        assert (exact(out, dtype) == winner % 100).all() and np.allclose(lse, 5000, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_head(cuda, dtype):
    case = Case(dtype, (64, 4, 2), [(5, 300)])
    clean, _ = case.attention(cuda)
    case.q = case.q.copy()
    case.q[2, 64 + 7] = np.nan if dtype == "float32" else 0x7FFF
    out, lse = case.attention(cuda)
    heads, before = (exact(x, dtype).view(5, 4, 64) for x in (out, clean))
    assert heads[2, 1].isnan().all() and np.isnan(lse[2, 1])
    others = torch.ones(5, 4, dtype=torch.bool)
    others[2, 1] = False
    assert torch.equal(heads[others], before[others])


def test_misuse(cuda):
    def call(dtype="float32", head_dim=64, n_heads=2, keys=10, rows=4, max_keys=10, n_kv=1, sequences=None, width=None):
        q = stored(normal(rows, width or n_heads * head_dim), dtype)
        slabs = [slab(dtype, 10, n_kv, head_dim, spare=0)]
        at = ints(0, rows, keys)[None] if sequences is None else sequences
        out = blank(dtype, 4, n_heads * head_dim)
        cuda.attention(dtype, q, slabs, at, n_heads, 0.1, max_keys, out)

    call()
    for error, message, arguments in [
        (ConfigError, "no kernel for head_dim 80 in bfloat16", {"dtype": "bfloat16", "head_dim": 80}),
        (ConfigError, "no kernel for head_dim 264 in float32", {"head_dim": 264}),
        (UsageError, "n_heads = 3 over n_kv = 2", {"n_heads": 3, "n_kv": 2}),
        (UsageError, "11 keys of 10", {"keys": 11, "max_keys": 11}),
        (UsageError, "10 keys of 9", {"max_keys": 9}),
        (UsageError, r"rows \[0, 5\) of 4", {"rows": 5}),
        (UsageError, r"rows \[1, 4\) of 4", {"sequences": ints(1, 4, 10)[None]}),
        (UsageError, "expected 1, got 2", {"sequences": ints(0, 2, 3, 2, 4, 3).reshape(2, 3)}),
        (UsageError, "q: 120 columns for 2 heads of 64", {"width": 120}),
    ]:
        with pytest.raises(error, match=message):
            call(**arguments)
