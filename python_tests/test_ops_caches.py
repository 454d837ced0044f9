"""Kernels of the adaptive caches: attention rollout, similarity of values, kept features. Against fp64 formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ops_support import DTYPES, ISAS, TORCH, empty, exact, instruction_set, ops, padded_rows, stored, tensor, threads


@pytest.fixture(params=ISAS)
def isa(request):
    with instruction_set(request.param) as name:
        yield name


def attention_means(layers, rows, keys, seed=0):
    """Rows that sum to 1, some of them sharp; [layers, rows, keys] with a gap of NaN after each row."""
    r = np.random.default_rng([layers, rows, keys, seed])
    p = torch.softmax(torch.from_numpy(r.standard_normal((layers, rows, keys)) * 3), -1).float().numpy()
    return padded_rows(p.reshape(-1, keys), 7).reshape(layers, rows, -1) if rows else p


def positions_of(rows, keys, seed=0):
    return np.sort(np.random.default_rng([rows, keys, seed]).permutation(keys)[:rows]).astype(np.int32)


@pytest.mark.parametrize("rows,keys", [(1, 1), (1, 40), (5, 31), (32, 32), (40, 257), (300, 300), (90, 1000), (0, 20)])
@pytest.mark.parametrize("layers", [1, 2, 9])
def test_rollout_is_the_product_of_the_matrices(isa, layers, rows, keys):
    mean, at = attention_means(layers, rows, keys), positions_of(rows, keys)
    c = ops.rollout(mean, at, keys)
    product = np.eye(keys)
    for layer in mean:
        e = np.eye(keys)
        e[at] = layer[:, :keys]
        product = 0.5 * (e + np.eye(keys)) @ product
    expected = product.sum(0)
    assert c.shape == (keys,)
    assert np.abs(c / expected - 1).max() < 1e-5
    assert abs(c.sum(dtype=np.float64) / keys - 1) < 1e-5


def test_rollout_does_not_depend_on_threads(isa):
    for rows, keys in ((40, 333), (700, 1001)):
        mean, at = attention_means(4, rows, keys), positions_of(rows, keys)
        whole = ops.rollout(mean, at, keys)
        for count in (1, 2, 3, 7):
            with threads(count):
                assert np.array_equal(ops.rollout(mean, at, keys), whole), count


def test_rollout_checks_its_arguments():
    mean, at = np.zeros((2, 3, 10), np.float32), np.array([1, 4, 7], np.int32)
    for args, message in [
        ((mean, at[:2], 10), "3 elements"),
        ((mean, at, 11), "n_keys"),
        ((mean, at, 0), "n_keys"),
        ((mean, at, 7), "rows"),
        ((mean, at[::-1].copy(), 10), "ascend"),
        ((mean[0], at, 10), "mean"),
        ((mean.astype(np.float64), at, 10), "mean"),
        ((mean[:0], at, 10), "no layer"),
        ((mean[::-1], at, 10), "layers"),
    ]:
        with pytest.raises(Exception, match=message):
            ops.rollout(*args)


WIDTHS = [(2, 128), (1, 32), (3, 80), (7, 16), (2, 6), (4, 64)]  # n_kv, head_dim


def slab_with(dtype, k, v):
    """A slab whose positions 0.. hold K and V [positions, n_kv, head_dim]; K is not rotated."""
    n, n_kv, head_dim = v.shape
    slab = ops.KvSlab(n_kv, head_dim, n, dtype)
    qkv = np.concatenate([k, k, v], 1).reshape(n, -1).astype(np.float32)
    cos, sin = np.ones((n, head_dim // 2), np.float32), np.zeros((n, head_dim // 2), np.float32)
    ops.rope_kv_write(qkv, cos, sin, np.arange(n, dtype=np.int32), [slab], np.zeros(n, np.int32), n_kv)
    return slab


def values(seed, n, n_kv, head_dim):
    r = np.random.default_rng([seed, n, n_kv, head_dim])
    return (r.standard_normal((n, n_kv, head_dim)) * 10.0 ** r.integers(-3, 3, (n, 1, 1))).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_kv,head_dim", WIDTHS)
def test_value_similarity(isa, dtype, n_kv, head_dim):
    cached = values(1, 70, n_kv, head_dim)
    slab = slab_with(dtype, values(2, 70, n_kv, head_dim), cached)
    at = np.random.default_rng(3).permutation(70)[:43].astype(np.int32)
    fresh = (cached[at] + 0.3 * values(4, 43, n_kv, head_dim)).reshape(43, -1)
    fresh[5] = 0  # a zero vector is like nothing
    fresh[6] = cached[at[6]].reshape(-1)
    fresh[7] = -cached[at[7]].reshape(-1)
    got = ops.value_similarity(padded_rows(fresh, 3), at, slab)
    a, b = exact(stored(fresh, dtype)), exact(stored(cached[at].reshape(43, -1), dtype))
    assert got.dtype == np.float64
    assert np.abs(got - F.cosine_similarity(a, b, dim=1, eps=1e-8).numpy()).max() < 1e-12
    assert got[5] == 0
    assert abs(got[6] - 1) < 1e-12 and abs(got[7] + 1) < 1e-12
    for r in (0, 17, 42):
        assert ops.value_similarity(fresh[r : r + 1], at[r : r + 1], slab)[0] == got[r]
    for count in (1, 2, 3):
        with threads(count):
            assert np.array_equal(ops.value_similarity(fresh, at, slab), got)
    with instruction_set("portable"):
        assert np.array_equal(ops.value_similarity(fresh, at, slab), got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_similarity_small_and_not_finite(isa, dtype):
    cached = values(1, 4, 1, 40)
    cached[1] *= 1e-12
    slab = slab_with(dtype, cached, cached)
    fresh = cached.reshape(4, -1).copy()
    fresh[2, 35] = np.nan
    fresh[3] = 0
    fresh[3, 0] = 1e-20
    got = ops.value_similarity(fresh, np.arange(4, dtype=np.int32), slab)
    a, b = exact(stored(fresh, dtype)), exact(stored(cached.reshape(4, -1), dtype))
    guarded = (a * b).sum(1) / (a.norm(dim=1).clamp(min=1e-8) * b.norm(dim=1).clamp(min=1e-8))
    assert np.isnan(got[2])
    assert np.allclose(got[[0, 1, 3]], guarded[[0, 1, 3]], rtol=1e-12, atol=0)
    assert got[1] < 0.5  # it would be 1 without the guard


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_kv,head_dim", WIDTHS)
def test_write_values_is_what_rope_kv_write_writes(isa, dtype, n_kv, head_dim):
    k, before, after = (values(i, 70, n_kv, head_dim) for i in (1, 2, 3))
    after[11, 0, 3] = np.inf
    at = np.random.default_rng(3).permutation(70)[:43].astype(np.int32)
    expected = before.copy()
    expected[at] = after[at]
    whole = [slab_with(dtype, k, expected).read(np.arange(70, dtype=np.int32))]
    for count in (1, 3):
        slab = slab_with(dtype, k, before)
        with threads(count):
            ops.write_values(padded_rows(after[at].reshape(43, -1), 5), at, slab)
        whole.append(slab.read(np.arange(70, dtype=np.int32)))
        unwritten = slab.read(np.arange(70, slab.capacity, dtype=np.int32))
        assert not any(np.any(t) for t in unwritten)
    for k_read, v_read in whole[1:]:
        assert np.array_equal(k_read, whole[0][0]) and np.array_equal(v_read, whole[0][1])
    finite = np.setdiff1d(at, [11])
    rows = stored(after[finite].reshape(len(finite), -1), dtype)
    assert np.abs(ops.value_similarity(exact(rows).float().numpy(), finite, slab) - 1).max() < 1e-12


def test_values_check_their_arguments():
    slab = ops.KvSlab(2, 16, 40, "float32")
    v, at = np.zeros((3, 32), np.float32), np.array([0, 5, 63], np.int32)
    ops.write_values(v, at, slab)
    for kernel in (ops.value_similarity, ops.write_values):
        for args, message in [
            ((v[:, :31], at, slab), "32 columns"),
            ((v, at[:2], slab), "3 elements"),
            ((v, at + np.int32(1), slab), "positions"),
            ((v, at.astype(np.int64), slab), "int32"),
            ((stored(v, "bfloat16"), at, slab), "float32"),
        ]:
            with pytest.raises(Exception, match=message):
                kernel(*args)
    with pytest.raises(Exception, match="twice"):
        ops.write_values(v, np.array([1, 2, 1], np.int32), slab)


def feature_problem(rows, d):
    r = np.random.default_rng([rows, d])
    y, x = r.standard_normal((rows, d)).astype(np.float32), r.standard_normal((90, d)).astype(np.float32)
    at, to = (r.permutation(90)[:rows].astype(np.int32) for _ in range(2))
    return y, x, at, to


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 5, 64, 333, 2048])
def test_store_and_add(isa, dtype, d):
    for rows in (0, 1, 43):
        y, x, at, to = feature_problem(rows, d)
        kept = stored(np.random.default_rng(d).standard_normal((90, d)), dtype)
        kept_after, x_after = kept.copy(), x.copy()
        kept_after[at] = stored(y, dtype)
        x_after[to] = x[to] + y
        for count in (1, 3):
            wide_kept, wide_x = padded_rows(kept, 6), padded_rows(x, 3)
            with threads(count):
                ops.store_and_add(padded_rows(y, 2), wide_kept, at, wide_x, to)
            assert np.array_equal(wide_kept, kept_after)
            assert np.array_equal(wide_x, x_after)


@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("f_dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 5, 64, 333, 2048])
def test_add_kept(isa, a_dtype, f_dtype, d):
    """(x + a) + f in fp32, in this order."""
    for rows in (0, 1, 43):
        _, x, at, to = feature_problem(rows, d)
        r = np.random.default_rng(d)
        a, f = (stored(r.standard_normal((90, d)), t) for t in (a_dtype, f_dtype))
        expected = x.copy()
        expected[to] = (x[to] + tensor(a).float().numpy()[at]) + tensor(f).float().numpy()[at]
        for count in (1, 3):
            out = padded_rows(x, 3)
            with threads(count):
                ops.add_kept(padded_rows(a, 4), padded_rows(f, 1), at, out, to)
            assert np.array_equal(out, expected)


def test_kept_features_round_trip(isa):
    """What store_and_add keeps is what add_kept adds: exactly in fp32, rounded once in bf16."""
    for dtype in DTYPES:
        y, x, at, to = feature_problem(20, 100)
        kept, nothing = empty(dtype, 90, 100), np.zeros((90, 100), np.float32)
        computed, added = x.copy(), x.copy()
        ops.store_and_add(y, kept, at, computed, to)
        ops.add_kept(kept, nothing, at, added, to)
        rounded = torch.from_numpy(y).to(TORCH[dtype]).float().numpy()
        assert np.array_equal(added[to], x[to] + rounded)
        assert dtype == "bfloat16" or np.array_equal(added, computed)


def test_features_check_their_arguments():
    y, x, at, to = feature_problem(4, 10)
    kept = np.zeros((90, 10), np.float32)
    same, outside = np.zeros(4, np.int32), np.full(4, 90, np.int32)
    for args, message in [
        ((y, kept[:, :9], at, x, to), "10 columns"),
        ((y, kept, at, x[:, :9], to), "10 columns"),
        ((y, kept, at[:3], x, to), "4 elements"),
        ((y, kept, same, x, to), "positions: 0 occurs twice"),
        ((y, kept, at, x, same), "x_rows: 0 occurs twice"),
        ((y, kept, outside, x, to), "positions"),
        ((y, kept, at, x, outside), "x_rows"),
        ((stored(y, "bfloat16"), kept, at, x, to), "float32"),
        ((y, kept, at, stored(x, "bfloat16"), to), "float32"),
    ]:
        with pytest.raises(Exception, match=message):
            ops.store_and_add(*args)
    for args, message in [
        ((kept[:, :9], kept, at, x, to), "10 columns"),
        ((kept, kept[:80], outside - np.int32(5), x, to), "positions"),
        ((kept, kept, at, x, to[:3]), "4 elements"),
        ((kept, kept, at, x, same), "twice"),
        ((kept, kept, at, stored(x, "bfloat16"), to), "float32"),
    ]:
        with pytest.raises(Exception, match=message):
            ops.add_kept(*args)
