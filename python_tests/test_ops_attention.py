"""Rotary embedding, the KV slab and attention: every instruction set against PyTorch and fp64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ops_support import (
    DTYPES,
    ISAS,
    TORCH,
    check_error,
    exact,
    instruction_set,
    ops,
    padded_rows,
    stored,
    tensor,
    threads,
)


@pytest.fixture(params=ISAS)
def isa(request):
    with instruction_set(request.param) as name:
        yield name


def rope_tables(positions, head_dim, theta=10000.0):
    angle = np.arange(positions)[:, None] * theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x, cos, sin):
    """x [rows, heads, head_dim], half-split; any precision."""
    lo, hi = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], -1)


def filled_slab(dtype, keys, n_kv, head_dim, seed=0):
    """A slab with every position below `keys` written, and K and V as they are stored, [keys, n_kv, head_dim]."""
    r = np.random.default_rng([seed, keys, n_kv, head_dim])
    qkv = r.standard_normal((keys, 3 * n_kv * head_dim)).astype(np.float32)
    slab = ops.KvSlab(n_kv, head_dim, keys, dtype)
    cos, sin = rope_tables(keys, head_dim)
    positions = r.permutation(keys).astype(np.int32)
    ops.rope_kv_write(qkv, cos, sin, positions, [slab], np.zeros(keys, np.int32), n_kv)
    k, v = slab.read(np.arange(keys, dtype=np.int32))
    return slab, torch.from_numpy(k), torch.from_numpy(v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim,n_heads,n_kv", [(16, 2, 2), (32, 6, 2), (64, 4, 1), (128, 2, 2), (6, 3, 3), (80, 4, 2)]
)
def test_rope_kv_write(isa, dtype, head_dim, n_heads, n_kv):
    r = np.random.default_rng(head_dim)
    rows, capacity = 43, 70
    qkv = r.standard_normal((rows, (n_heads + 2 * n_kv) * head_dim)).astype(np.float32)
    cos, sin = rope_tables(capacity, head_dim)
    slabs = [ops.KvSlab(n_kv, head_dim, capacity, dtype) for _ in range(2)]
    assert slabs[0].capacity == 96
    owner = r.integers(0, 2, rows).astype(np.int32)
    positions = np.empty(rows, np.int32)
    for s in range(2):
        positions[owner == s] = r.permutation(capacity)[: (owner == s).sum()]
    q = ops.rope_kv_write(padded_rows(qkv, 4), cos, sin, positions, slabs, owner, n_heads)

    heads = torch.from_numpy(qkv).view(rows, n_heads + 2 * n_kv, head_dim)
    table = [torch.from_numpy(t[positions]) for t in (cos, sin)]
    same = rotate(heads[:, : n_heads + n_kv], *table).to(TORCH[dtype])
    reference = rotate(heads[:, : n_heads + n_kv].double(), *table)
    q = q.reshape(rows, n_heads, head_dim)
    check_error(q, same[:, :n_heads], reference[:, :n_heads], dtype)
    for s in range(2):
        mine = owner == s
        k, v = slabs[s].read(positions[mine])
        check_error(k, same[mine, n_heads:], reference[mine, n_heads:], dtype)
        assert np.array_equal(v, heads[mine, n_heads + n_kv :].to(TORCH[dtype]).float())
        unwritten = np.setdiff1d(np.arange(96), positions[mine]).astype(np.int32)
        assert not any(np.any(t) for t in slabs[s].read(unwritten))


def attend(q, k, v, n_heads, scale):
    """q [rows, n_heads * hd], k and v [keys, n_kv, hd]."""
    rows, group = len(q), n_heads // k.shape[1]
    q = q.view(rows, n_heads, -1).transpose(0, 1)
    k, v = (t.transpose(0, 1).repeat_interleave(group, 0) for t in (k, v))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0].transpose(0, 1).reshape(rows, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim,n_heads,n_kv", [(16, 4, 2), (32, 2, 2), (64, 6, 2), (128, 2, 1), (80, 2, 2), (10, 7, 1)]
)
def test_attention(isa, dtype, head_dim, n_heads, n_kv):
    """The error rule over 64 rows; 1, 5 and 40 of them alone give the same bits, so it holds for those too."""
    r = np.random.default_rng([head_dim, n_heads])
    scale = head_dim**-0.5
    worst = 0.0
    for keys in (1, 2, 31, 32, 33, 63, 100, 257, 320, 511, 512, 513, 700, 1025):
        slab, k, v = filled_slab(dtype, keys, n_kv, head_dim)
        q = stored(2 * r.standard_normal((64, n_heads * head_dim)), dtype)
        out = ops.attention(q, [(0, 64, keys, slab)], n_heads, scale)
        reference = attend(exact(q), k.double(), v.double(), n_heads, scale)
        same = attend(tensor(q), k.to(TORCH[dtype]), v.to(TORCH[dtype]), n_heads, scale)
        worst = max(worst, check_error(out, same, reference, dtype, what=f"{keys} keys"))
        for rows in (1, 5, 40):
            assert np.array_equal(ops.attention(q[:rows], [(0, rows, keys, slab)], n_heads, scale), out[:rows])
    print(f"\n{isa} {dtype} hd {head_dim}: worst error / torch's (or the floor) {worst:.2f}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_ragged_batch_and_invariance(isa, dtype):
    n_heads, n_kv, head_dim = 6, 2, 32
    keys, rows = (33, 700, 256), (40, 7, 0)
    slabs = [filled_slab(dtype, n, n_kv, head_dim, seed=i)[0] for i, n in enumerate(keys)]
    q = stored(np.random.default_rng(0).standard_normal((sum(rows), n_heads * head_dim)), dtype)
    ends = np.cumsum(rows)
    sequences = [(int(e - n), int(e), m, s) for e, n, m, s in zip(ends, rows, keys, slabs, strict=True)]
    whole = ops.attention(q, sequences, n_heads, 0.2)
    assert np.array_equal(ops.attention(padded_rows(q, 6), sequences, n_heads, 0.2), whole)
    for begin, end, n, slab in sequences:
        for r in range(begin, end):
            alone = ops.attention(q[r : r + 1], [(0, 1, n, slab)], n_heads, 0.2)
            assert np.array_equal(alone[0], whole[r]), r
    for count in (1, 2, 3):
        with threads(count):
            assert np.array_equal(ops.attention(q, sequences, n_heads, 0.2), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_heads,n_kv,head_dim", [(4, 4, 128), (7, 1, 64), (2, 2, 10)])
def test_attention_split_over_rows_and_keys(isa, dtype, n_heads, n_kv, head_dim):
    """More threads than heads: tiles get shorter and their chunks go to several threads, and no bit changes."""
    for keys in (320, 512, 513, 1024, 1025, 2100):
        slab, _, _ = filled_slab(dtype, keys, n_kv, head_dim)
        q = stored(np.random.default_rng(keys).standard_normal((33, n_heads * head_dim)), dtype)
        for rows in (1, 8, 33):
            sequences = [(0, rows, keys, slab)]
            with threads(1):
                alone = ops.attention(q[:rows], sequences, n_heads, 0.2)
            for count in (2, 3, 5, 64):
                with threads(count):
                    assert np.array_equal(ops.attention(q[:rows], sequences, n_heads, 0.2), alone), (keys, rows, count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_ignores_keys_beyond_the_end(isa, dtype):
    full, k, v = filled_slab(dtype, 600, 2, 64)
    for keys in (1, 7, 32, 45, 257, 513, 599):
        short = ops.KvSlab(2, 64, keys, dtype)
        write_kv(short, k[:keys], v[:keys])
        q = stored(np.random.default_rng(keys).standard_normal((9, 128)), dtype)
        a, b = (ops.attention(q, [(0, 9, keys, s)], 2, 0.125) for s in (short, full))
        assert np.array_equal(a, b), keys


def write_kv(slab, k, v):
    """K and V as given: a rotation by angle 0."""
    n, n_kv, head_dim = k.shape
    qkv = torch.cat([k, k, v], 1).reshape(n, -1).contiguous().numpy()
    cos, sin = np.ones((n, head_dim // 2), np.float32), np.zeros((n, head_dim // 2), np.float32)
    ops.rope_kv_write(qkv, cos, sin, np.arange(n, dtype=np.int32), [slab], np.zeros(n, np.int32), n_kv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_extreme_scores(isa, dtype):
    """Scores in the thousands: one key takes all, and nothing overflows, in whichever chunk it lies."""
    keys, head_dim = 600, 32
    for winner in (0, 300, 599):
        k = torch.zeros(keys, 1, head_dim)
        k[:, 0, 0] = -50.0
        k[winner, 0, 0] = 50.0
        v = torch.arange(keys, dtype=torch.float32)[:, None, None].remainder(100).expand(-1, 1, head_dim).contiguous()
        slab = ops.KvSlab(1, head_dim, keys, dtype)
        write_kv(slab, k, v)
        q = np.zeros((3, head_dim))
        q[:, 0] = 100.0
        out = ops.attention(stored(q, dtype), [(0, 3, keys, slab)], 1, 1.0)
        assert (exact(out) == winner % 100).all()


def test_attention_nan_is_not_hidden(isa):
    for dtype in DTYPES:
        slab, _, _ = filled_slab(dtype, 300, 1, 32)
        q = stored(np.random.default_rng(0).standard_normal((4, 32)), dtype).copy()
        clean = exact(ops.attention(q, [(0, 4, 300, slab)], 1, 0.2))
        q[2, 5] = np.nan if dtype == "float32" else 0x7FC0
        out = exact(ops.attention(q, [(0, 4, 300, slab)], 1, 0.2))
        assert out[2].isnan().all() and torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def probabilities(q, k, n_heads, scale):
    """Mean over heads of the softmax, in the precision of q [rows, n_heads * hd] and k [keys, n_kv, hd]."""
    q = q.view(len(q), n_heads, -1).transpose(0, 1)
    k = k.transpose(0, 1).repeat_interleave(n_heads // k.shape[1], 0)
    return torch.softmax(scale * (q @ k.transpose(1, 2)), -1).mean(0)


def attend_with_mean(q, sequences, n_heads, scale, extra=0):
    """Output and the sequences' means, which are NaN where nothing may be written or read."""
    means = [np.full((end - begin, keys + extra), np.nan, np.float32) for begin, end, keys, _ in sequences]
    return ops.attention(q, sequences, n_heads, scale, means), means


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim,n_heads,n_kv", [(16, 4, 2), (32, 2, 2), (64, 14, 2), (128, 2, 1), (80, 2, 2), (10, 7, 1), (6, 40, 1)]
)
def test_attention_mean(isa, dtype, head_dim, n_heads, n_kv):
    """Against fp64, and the output keeps its bits. Single rows give the same bits, so the check holds for those too."""
    r = np.random.default_rng([head_dim, n_heads, 1])
    scale = head_dim**-0.5
    for keys in (1, 31, 33, 257, 512, 513, 700, 1025):
        slab, k, _ = filled_slab(dtype, keys, n_kv, head_dim)
        q = stored(2 * r.standard_normal((70, n_heads * head_dim)), dtype)
        plain = ops.attention(q, [(0, 70, keys, slab)], n_heads, scale)
        out, (mean,) = attend_with_mean(q, [(0, 70, keys, slab)], n_heads, scale, extra=5)
        assert np.array_equal(out, plain)
        assert np.isnan(mean[:, keys:]).all()
        mean = np.ascontiguousarray(mean[:, :keys])
        check_error(mean, probabilities(tensor(q).float(), k, n_heads, scale),
                    probabilities(exact(q), k.double(), n_heads, scale), "float32", what=f"{keys} keys")  # fmt: skip
        assert np.abs(mean.sum(1, dtype=np.float64) - 1).max() < 1e-6
        for row in (0, 41, 69):
            _, (alone,) = attend_with_mean(q[row : row + 1], [(0, 1, keys, slab)], n_heads, scale)
            assert np.array_equal(alone[0], mean[row]), row


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_mean_ragged_batch_and_invariance(isa, dtype):
    """Sequences with and without a mean in one call, in any company and on any number of threads."""
    n_heads, n_kv, head_dim = 14, 2, 32
    keys, rows = (33, 700, 256, 300, 290), (40, 7, 0, 70, 5)
    slabs = [filled_slab(dtype, n, n_kv, head_dim, seed=i)[0] for i, n in enumerate(keys)]
    q = stored(np.random.default_rng(0).standard_normal((sum(rows), n_heads * head_dim)), dtype)
    ends = np.cumsum(rows)
    sequences = [(int(e - n), int(e), m, s) for e, n, m, s in zip(ends, rows, keys, slabs, strict=True)]
    plain = ops.attention(q, sequences, n_heads, 0.2)
    out, means = attend_with_mean(q, sequences, n_heads, 0.2)
    assert np.array_equal(out, plain)
    assert all(np.isfinite(m).all() for m in means)
    for (begin, end, n, slab), mean in zip(sequences, means, strict=True):
        _, (alone,) = attend_with_mean(q[begin:end], [(0, end - begin, n, slab)], n_heads, 0.2)
        assert np.array_equal(alone, mean)
    for count in (1, 2, 3, 5, 16):
        with threads(count):
            out, again = attend_with_mean(q, sequences, n_heads, 0.2)
            assert np.array_equal(out, plain)
            assert all(np.array_equal(a, b) for a, b in zip(again, means, strict=True)), count
            some = [np.full_like(m, np.nan) if i % 2 else None for i, m in enumerate(means)]
            assert np.array_equal(ops.attention(q, sequences, n_heads, 0.2, some), plain)
            assert all(np.array_equal(a, b) for a, b in zip(some, means, strict=True) if a is not None), count


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_mean_extreme_scores(isa, dtype):
    """One key takes all, in whichever chunk; a NaN stays in its row."""
    keys, head_dim = 600, 32
    for winner in (0, 300, 599):
        k = torch.zeros(keys, 1, head_dim)
        k[:, 0, 0] = -50.0
        k[winner, 0, 0] = 50.0
        slab = ops.KvSlab(1, head_dim, keys, dtype)
        write_kv(slab, k, k)
        q = np.zeros((3, head_dim))
        q[:, 0] = 100.0
        q[1, 1] = np.nan
        _, (mean,) = attend_with_mean(stored(q, dtype), [(0, 3, keys, slab)], 1, 1.0)
        assert np.isnan(mean[1]).all()
        assert (mean[[0, 2]] == np.eye(keys)[winner]).all()


def test_attention_checks_its_arguments():
    slab = ops.KvSlab(2, 16, 40, "float32")
    q = np.zeros((3, 64), np.float32)
    for sequences, heads, scale, message in [
        ([(0, 4, 10, slab)], 4, 1.0, "rows"),
        ([(0, 3, 65, slab)], 4, 1.0, "keys"),
        ([(0, 3, 0, slab)], 4, 1.0, "keys"),
        ([(0, 3, 10, slab)], 3, 1.0, "n_heads"),
        ([(0, 3, 10, slab)], 2, 1.0, "columns"),
        ([(0, 3, 10, slab)], 4, 0.0, "scale"),
        ([], 4, 1.0, "no sequence"),
    ]:
        with pytest.raises(Exception, match=message):
            ops.attention(q, sequences, heads, scale)
    read_only = np.zeros((3, 10), np.float32)
    read_only.flags.writeable = False
    for means, message in [
        ([None, None], "means: expected 1"),
        ([np.zeros((2, 10), np.float32)], "mean"),
        ([np.zeros((3, 9), np.float32)], "mean"),
        ([np.zeros((3, 10), np.uint16)], "float32"),
        ([read_only], "read-only"),
    ]:
        with pytest.raises(Exception, match=message):
            ops.attention(q, [(0, 3, 10, slab)], 4, 1.0, means)
