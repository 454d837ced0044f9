"""Kernels of the adaptive caches: kept features, similarity of values, choice of rows, attention rollout."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_support import (
    BYTES,
    DTYPES,
    blank,
    exact,
    ints,
    is_blank,
    normal,
    report,
    rng,
    same_bits,
    stored,
    tensor,
)

from dllm_ext import _C, UsageError

WIDTHS = (1, 6, 36, 257, 1028)


def scattered(rows, positions, x_rows, *key):
    """A list: rows of x, each once, and positions in slabs of these lengths, each once per slab."""
    r = rng(rows, *key)
    sequence = r.integers(0, len(positions), rows)
    position = np.zeros(rows, np.int64)
    for s, n in enumerate(positions):
        mine = np.flatnonzero(sequence == s)[:n]
        position[mine] = r.permutation(n)[: len(mine)]
        sequence[np.flatnonzero(sequence == s)[n:]] = -1
    kept = sequence >= 0
    row = r.permutation(x_rows)[:rows]
    return tuple(a[kept].astype(np.int32) for a in (row, position, sequence))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,capacity", [(0, 2), (1, 1), (23, 40)])
def test_store_and_add(cuda, dtype, rows, capacity):
    for d in WIDTHS:
        positions = (31, 12, 3)
        lists = scattered(rows, positions, 50, d)
        y, x = normal(len(lists[0]), d, scale=300), normal(50, d, key=1)
        slabs = [blank(dtype, n, d) for n in positions]
        kept, expected = [s.copy() for s in slabs], x.copy()
        for i, (row, position, sequence) in enumerate(zip(*lists, strict=True)):
            expected[row] += y[i]
            kept[sequence][position] = stored(y[i], dtype)
        cuda.store_and_add(dtype, y, lists, capacity, slabs, x)
        assert same_bits(x, expected) and all(same_bits(a, b) for a, b in zip(slabs, kept, strict=True))
    report(cuda, f"store_and_add {dtype} {len(y)} x {d}", y.size * (12 + BYTES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,capacity", [(0, 2), (1, 1), (23, 40)])
def test_add_kept(cuda, dtype, rows, capacity):
    for d in WIDTHS:
        positions = (31, 12, 3)
        lists = scattered(rows, positions, 50, d)
        attention, mlp = ([stored(normal(n, d, key=k), dtype) for n in positions] for k in (1, 2))
        x = normal(50, d, key=3, scale=100)
        expected = x.copy()
        for row, position, sequence in zip(*lists, strict=True):
            a, f = (tensor(slabs[sequence][position], dtype).float().numpy() for slabs in (attention, mlp))
            expected[row] = (x[row] + a) + f
        cuda.add_kept(dtype, lists, capacity, attention, mlp, x)
        assert same_bits(x, expected)
    report(cuda, f"add_kept {dtype} {len(lists[0])} x {d}", len(lists[0]) * d * (8 + 2 * BYTES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_kv,head_dim", [(2, 128), (3, 80), (7, 16), (2, 6), (1, 64), (8, 128)])
@pytest.mark.parametrize("biased", [False, True])
def test_verify_values(cuda, dtype, n_kv, head_dim, biased):
    """Against torch's cosine in fp64 of the values as they are stored; then V is the new one, and K as before."""
    positions, width = (70, 9), n_kv * head_dim
    _, position, sequence = scattered(40, positions, 40, head_dim)
    n, capacity = len(position), len(position) + 5
    sizes = [np.float32(10.0) ** rng(p).integers(-3, 3, (1, p, 1)).astype(np.float32) for p in positions]
    cached = [normal(n_kv, p, head_dim, key=1) * size for p, size in zip(positions, sizes, strict=True)]
    before = [stored(c, dtype) for c in cached]
    of_row = np.stack([cached[s][:, p].reshape(-1) for s, p in zip(sequence, position, strict=True)])
    bias = normal(width, key=9, scale=0.01) if biased else None
    v = of_row + 0.3 * normal(n, width, key=4, scale=np.abs(of_row).mean())
    v[5] = 0 if bias is None else -bias  # like nothing
    v[6] = exact(stored(of_row[6], dtype), dtype).float().numpy()
    v[7] = np.nan
    fresh = v if bias is None else v + bias
    slabs = [(blank(dtype, n_kv, p, head_dim), b.copy()) for p, b in zip(positions, before, strict=True)]
    similarity = np.full(capacity, -1234.5)
    rows = (np.arange(n, dtype=np.int32), position, sequence)
    cuda.verify_values(dtype, v, bias, rows, slabs, similarity)

    cached_rows = torch.stack(
        [exact(before[s], dtype)[:, p].reshape(-1) for s, p in zip(sequence, position, strict=True)]
    )
    expected = F.cosine_similarity(exact(stored(fresh, dtype), dtype), cached_rows, dim=1, eps=1e-8).numpy()
    there = np.arange(n) != 7
    assert np.abs(similarity[:n] - expected)[there].max() < 1e-12
    assert similarity[5] == 0 and np.isnan(similarity[7]) and (similarity[n:] == -1234.5).all()
    if not biased:
        assert similarity[6] == 1  # exactly: rows that did not change tie
    after = [b.copy() for b in before]
    for i, (s, p) in enumerate(zip(sequence, position, strict=True)):
        after[s][:, p] = stored(fresh[i], dtype).reshape(n_kv, head_dim)
    for (k, new), wanted in zip(slabs, after, strict=True):
        assert is_blank(k)
        finite = tensor(wanted, dtype).isfinite()
        assert torch.equal(tensor(new, dtype).isfinite(), finite)
        assert torch.equal(tensor(new, dtype)[finite], tensor(wanted, dtype)[finite])
    report(cuda, f"verify_values {dtype} {n} x {width}", n * width * (4 + 2 * BYTES[dtype]))

    for i in (0, n - 1):  # alone, the same bits
        again, one = [(blank(dtype, *k.shape), b.copy()) for (k, _), b in zip(slabs, before, strict=True)], np.zeros(1)
        cuda.verify_values(dtype, v[i : i + 1], bias, tuple(a[i : i + 1] for a in rows), again, one)
        assert one[0] == similarity[i]


def chosen(position, is_response, sequences, plans, verified, verified_ranges, similarity):
    """The definition, in plain Python: rows that are computed, and the others."""
    live = np.zeros(len(position), bool)
    for (begin, end, _), (prompt, response, n_verify), (first, last, _) in zip(
        sequences, plans, verified_ranges, strict=True
    ):
        for r in range(begin, end):
            live[r] = response if is_response[r] else prompt
        if not response and n_verify > 0:
            change = [np.inf if np.isnan(s) else -s for s in similarity[first:last]]
            order = sorted(range(last - first), key=lambda i: (-change[i], verified[first + i]))
            live[verified[first:last][order[:n_verify]]] = True
    return live


@pytest.mark.parametrize("lengths", [(1,), (40,), (33, 0, 70, 1), (1500, 900), (0, 0)])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "nan"])
def test_choose_rows(cuda, lengths, kind):
    r = rng(*lengths, len(kind))
    n, n_sequences = sum(lengths), len(lengths)
    ends = np.cumsum(lengths)
    sequences = np.stack([ends - lengths, ends, np.array(lengths) + 5], 1).astype(np.int32)
    position = np.concatenate([np.sort(r.permutation(2 * m)[:m]) for m in lengths]).astype(np.int32)
    of = np.repeat(np.arange(n_sequences), lengths).astype(np.int32)
    for trial in range(4):
        is_response = (r.random(n) < (0.0, 0.3, 0.8, 1.0)[trial]).astype(np.int32)
        verified = np.flatnonzero(is_response).astype(np.int32)
        counts = np.array([is_response[b:e].sum() for b, e, _ in sequences])
        verified_ranges = np.stack([np.cumsum(counts) - counts, np.cumsum(counts), 0 * counts], 1).astype(np.int32)
        similarity = r.random(len(verified)) * 2 - 1
        if kind == "ties":
            similarity = np.round(similarity * 2) / 2
        elif kind == "equal":
            similarity[:] = 1.0
        elif kind == "nan":
            similarity[r.random(len(similarity)) < 0.3] = np.nan
        choice = [(0, 0, -1), (1, 0, 0), (0, 1, -1), (1, 1, 3), (0, 0, 1), (1, 0, 7), (0, 0, 100000)]
        plans = np.array([choice[i] for i in r.integers(0, len(choice), n_sequences)], np.int32)
        plans[0] = choice[(4, 5, 6, 1)[trial]]
        capacity = max(n, 1) + trial
        shapes = (capacity, capacity, capacity, (n_sequences, 3), 1)
        lists = [tuple(np.full(shape, -7, np.int32) for shape in shapes) for _ in range(2)]
        cuda.choose_rows(position, is_response, sequences, plans, (verified, verified_ranges), similarity, capacity,
                         *lists)  # fmt: skip
        live = chosen(position, is_response, sequences, plans, verified, verified_ranges, similarity)
        for mask, (row, at, sequence, ranges, count) in zip((live, ~live), lists, strict=True):
            expected = np.flatnonzero(mask)
            m = len(expected)
            assert count[0] == m and np.array_equal(row[:m], expected)
            assert np.array_equal(at[:m], position[expected]) and np.array_equal(sequence[:m], of[expected])
            assert all((a[m:] == -7).all() for a in (row, at, sequence))
            sizes = np.array([mask[b:e].sum() for b, e, _ in sequences])
            assert np.array_equal(ranges, np.stack([np.cumsum(sizes) - sizes, np.cumsum(sizes), sequences[:, 2]], 1))
    report(cuda, f"choose_rows {lengths} {kind}", 8 * len(verified) + 8 * n + 12 * n)


def means(layers, rows, ld, keys, *key):
    """Rows that sum to 1, then NaN."""
    mean = np.full((layers, rows, ld), np.nan, np.float32)
    x = 3 * rng(layers, rows, ld, keys, *key).standard_normal((layers, rows, keys))
    mean[:, :, :keys] = torch.softmax(torch.from_numpy(x), -1).float().numpy()
    return mean


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(
    "batch",
    [[(1, 1)], [(5, 31), (0, 7), (32, 32)], [(40, 257), (129, 300)], [(1, 64), (0, 0), (128, 1000)]],
    ids=lambda b: "-".join(f"{r}x{n}" for r, n in b),
)
def test_rollout(cuda, batch, odd):
    """Layer by layer, against the product of the layers' matrices in fp64, and within rounding of the CPU's op."""
    layers, rows, max_keys = 3, sum(r for r, _ in batch), max(n for _, n in batch)
    ld = max_keys + 8 - max_keys % 4 + odd  # rows on multiples of 16 bytes, or not
    mean = np.full((layers, rows, ld), np.nan, np.float32)
    ends = np.cumsum([r for r, _ in batch])
    sequences = np.array([(e - r, e, n) for e, (r, n) in zip(ends, batch, strict=True)], np.int32)
    positions = np.zeros(rows, np.int32)
    for begin, end, n in sequences:
        mean[:, begin:end] = means(layers, end - begin, ld, n)
        positions[begin:end] = np.sort(rng(n).permutation(n)[: end - begin])
    c = None
    for layer in reversed(range(layers)):
        out = blank("float32", len(batch), ld)
        cuda.rollout(mean[layer], sequences, positions, max_keys, c, out)
        c = out
    for s, (begin, end, n) in enumerate(sequences):
        assert is_blank(c[s, n:])
        if n == 0:
            continue
        product = np.eye(n)
        for layer in mean[:, begin:end, :n]:
            e = np.eye(n)
            e[positions[begin:end]] = layer
            product = 0.5 * (e + np.eye(n)) @ product
        assert np.abs(c[s, :n] / product.sum(0) - 1).max() < 1e-5
        mine = np.ascontiguousarray(mean[:, begin:end])
        cpu = _C.ops.rollout(mine, positions[begin:end], int(n))
        assert np.abs(c[s, :n] / cpu - 1).max() < 1e-6
        alone = None  # in other company and with another capacity, the same bits
        for layer in reversed(range(layers)):
            out = blank("float32", 1, ld)
            cuda.rollout(mine[layer], ints(0, end - begin, n)[None], positions[begin:end], int(n), alone, out)
            alone = out
        assert same_bits(alone[0, :n], c[s, :n])
    report(cuda, f"rollout {batch}", 4 * sum(r * n for r, n in batch))


def test_misuse(cuda):
    y, x = normal(2, 8), normal(4, 8)
    lists, slabs = (ints(0, 1), ints(0, 1), ints(0, 0)), [blank("float32", 3, 8)]

    def with_lists(*new):
        return lambda: cuda.store_and_add("float32", y, new, 2, slabs, x)

    for call, message in [
        (with_lists(ints(0, 4), *lists[1:]), r"row\[1\] = 4"),
        (with_lists(lists[0], ints(0, 3), lists[2]), r"position\[1\] = 3 is not in \[0, 3\)"),
        (with_lists(*lists[:2], ints(0, 1)), r"sequence\[1\] = 1"),
        (with_lists(lists[0], ints(0), lists[2]), r"position: expected \[2\], got \[1\]"),
        (lambda: cuda.store_and_add("float32", y, lists, 1, slabs, x), "2 rows are more than the capacity 1"),
        (lambda: cuda.store_and_add("float16", y, lists, 2, slabs, x), "slab: expected uint16"),
        (lambda: cuda.add_kept("float32", lists, 2, slabs, [blank("float32", 2, 8)], x), "slabs of .* differ"),
        (lambda: cuda.rollout(normal(3, 10), ints(0, 3, 10)[None], ints(0, 1), 10, None, blank("float32", 1, 10)),
         r"positions: expected \[3\]"),
        (lambda: cuda.rollout(normal(3, 10), ints(0, 3, 11)[None], ints(0, 1, 2), 10, None, blank("float32", 1, 12)),
         "11 keys of 10"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            call()
    assert is_blank(slabs[0])
