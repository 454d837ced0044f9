"""Embedding, RMSNorm, rotary embedding with the KV write, SiLU gating: against torch and fp64, in all element types."""

import numpy as np
import pytest
import torch
from cuda_support import (
    BYTES,
    DTYPES,
    TORCH,
    blank,
    check_error,
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

from dllm_ext import UsageError

# Rows and the capacity that sizes the launch.
COUNTS = [(0, 3), (1, 1), (5, 9), (37, 64)]
WIDTHS = (1, 3, 36, 257, 1030, 2048)  # of them 36 and 2048 go in steps of four


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_is_a_copy(cuda, dtype):
    for d in WIDTHS:
        table = stored(normal(19, d), dtype)
        for rows, capacity in COUNTS:
            tokens = rng(rows, d).integers(0, 19, rows).astype(np.int32)
            out = blank("float32", capacity, d)
            cuda.embedding(dtype, table, tokens, out)
            assert np.array_equal(out[:rows], tensor(table, dtype).float().numpy()[tokens]), (d, rows)
            assert is_blank(out[rows:])
    report(cuda, f"embedding {dtype} {rows} x {d}", rows * d * (4 + BYTES[dtype]))


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [*WIDTHS, 8190, 8192])
def test_rms_norm(cuda, dtype, d):
    weight, worst = 1 + normal(d, key=1, scale=0.3), 0.0
    for rows, capacity in COUNTS if d < 4096 else [(3, 4)]:
        x = normal(rows, d) * np.float32(10.0) ** rng(rows).integers(-4, 5, (rows, 1)).astype(np.float32)
        out = blank(dtype, capacity, d)
        cuda.rms_norm(dtype, x, weight, 1e-5, out)
        same = norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-5).to(TORCH[dtype])
        reference = norm(torch.from_numpy(x).double(), torch.from_numpy(weight).double(), 1e-5)
        worst = max(worst, check_error(out[:rows], same, reference, dtype, what=f"{rows} rows"))
        assert is_blank(out[rows:])
    report(cuda, f"rms_norm {dtype} {rows} x {d}", rows * d * (4 + BYTES[dtype]), worst)
    # Rows that are picked: the same bits, in any company and with any capacity.
    picked = rng(d).permutation(rows).astype(np.int32)[: rows // 2 + 1]
    some = blank(dtype, len(picked) + 2, d)
    cuda.rms_norm(dtype, x, weight, 1e-5, some, rows=picked)
    assert same_bits(some[: len(picked)], out[picked]) and is_blank(some[len(picked) :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(cuda, dtype):
    for m in WIDTHS:
        worst = 0.0
        for rows, capacity in COUNTS:
            gate_up = normal(rows, 2 * m, scale=4.0)
            out = blank(dtype, capacity, m)
            cuda.silu_mul(dtype, gate_up, out)
            gate, up = torch.from_numpy(gate_up).chunk(2, -1)
            same = (torch.nn.functional.silu(gate) * up).to(TORCH[dtype])
            reference = gate.double() / (1 + torch.exp(-gate.double())) * up.double()
            worst = max(worst, check_error(out[:rows], same, reference, dtype, what=f"{rows} x {m}"))
            assert is_blank(out[rows:])
            alone = blank(dtype, 1, m)
            for r in range(0, rows, 17):
                cuda.silu_mul(dtype, gate_up[r : r + 1].copy(), alone)
                assert same_bits(alone[0], out[r])
    report(cuda, f"silu_mul {dtype} {rows} x {m}", rows * m * (8 + BYTES[dtype]), worst)


def test_silu_mul_at_the_ends(cuda):
    """exp overflows where the gate is far below zero: the result is a zero, not NaN."""
    gate_up = np.array([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4] + [2.0] * 6], np.float32)
    out = blank("float32", 1, 6)
    cuda.silu_mul("float32", gate_up, out)
    assert np.abs(out[0, :4]).max() < 1e-37 and np.array_equal(out[0, 4:], np.float32([200, 2e4]))


def tables(positions, head_dim, theta=10000.0):
    angle = np.arange(positions)[:, None] * theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x, cos, sin):
    low, high = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim,n_heads,n_kv", [(64, 4, 4), (64, 6, 2), (128, 3, 1), (16, 2, 2), (6, 5, 5), (80, 4, 2)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_rope_kv_write(cuda, dtype, head_dim, n_heads, n_kv, biased):
    """Scattered positions of sequences with slabs of different lengths; what no row names keeps its bits."""
    r, capacities = rng(head_dim, n_heads), (70, 33, 1)
    rows_of = (21, 0, 1)
    rows, heads = sum(rows_of), n_heads + 2 * n_kv
    qkv = normal(rows, heads * head_dim)
    bias = normal(heads * head_dim, key=3) if biased else None
    cos, sin = tables(max(capacities), head_dim)
    positions = np.concatenate([r.permutation(c)[:n] for c, n in zip(capacities, rows_of, strict=True)])
    sequence = np.repeat(np.arange(3), rows_of)
    order = r.permutation(rows)  # rows of sequences may be mixed
    positions, sequence = (x[order].astype(np.int32) for x in (positions, sequence))
    slabs = [(blank(dtype, n_kv, c, head_dim), blank(dtype, n_kv, c, head_dim)) for c in capacities]
    q_out = blank(dtype, rows + 3, n_heads * head_dim)
    cuda.rope_kv_write(dtype, qkv, bias, cos, sin, positions, sequence, slabs, q_out)

    x = torch.from_numpy(qkv) + (torch.from_numpy(bias) if biased else 0)
    precise = torch.from_numpy(qkv).double() + (torch.from_numpy(bias).double() if biased else 0)
    x, precise = (t.view(rows, heads, head_dim) for t in (x, precise))
    table = [torch.from_numpy(t[positions]) for t in (cos, sin)]
    rotated = rotate(x[:, : n_heads + n_kv], *table).to(TORCH[dtype])
    reference = rotate(precise[:, : n_heads + n_kv], *table)
    q = q_out[:rows].reshape(rows, n_heads, head_dim)
    worst = check_error(q, rotated[:, :n_heads], reference[:, :n_heads], dtype, "q")
    assert is_blank(q_out[rows:])
    for s, (k, v) in enumerate(slabs):
        mine, at = np.flatnonzero(sequence == s), positions[sequence == s]
        stored_k = np.ascontiguousarray(k[:, at].transpose(1, 0, 2))
        worst = max(worst, check_error(stored_k, rotated[mine, n_heads:], reference[mine, n_heads:], dtype, "k"))
        values = x[mine, n_heads + n_kv :].to(TORCH[dtype])
        assert torch.equal(tensor(np.ascontiguousarray(v[:, at].transpose(1, 0, 2)), dtype), values)
        others = np.setdiff1d(np.arange(capacities[s]), at)
        assert is_blank(k[:, others]) and is_blank(v[:, others])
    report(cuda, f"rope_kv_write {dtype} {rows} x {heads} x {head_dim}", qkv.size * (4 + BYTES[dtype]), worst)

    # A row alone, with a larger capacity: the same bits.
    for i in (0, rows - 1):
        again = [(blank(dtype, *k.shape), blank(dtype, *v.shape)) for k, v in slabs]
        q = blank(dtype, 50, n_heads * head_dim)
        cuda.rope_kv_write(dtype, qkv[i : i + 1], bias, cos, sin, positions[i : i + 1], sequence[i : i + 1], again, q)
        s, p = sequence[i], positions[i]
        assert same_bits(q[0], q_out[i]) and is_blank(q[1:])
        assert same_bits(again[s][0][:, p], slabs[s][0][:, p]) and same_bits(again[s][1][:, p], slabs[s][1][:, p])


def test_values_are_rounded_to_nearest_even(cuda):
    """Through rope_kv_write's V, which is only rounded: halfway cases, subnormal numbers, overflow."""
    x = np.array([1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-12, 6e-8, 3e-8, 65519.0, 65520.0, 1e-40], np.float32)
    for dtype in DTYPES:
        qkv = np.concatenate([np.zeros(16, np.float32), x])[None]
        cos, sin = tables(1, 8)
        k, v = blank(dtype, 1, 1, 8), blank(dtype, 1, 1, 8)
        cuda.rope_kv_write(dtype, qkv, None, cos, sin, ints(0), ints(0), [(k, v)], blank(dtype, 1, 8))
        assert same_bits(v[0, 0], stored(x, dtype)), dtype


def test_misuse(cuda):
    x, w = normal(4, 8), normal(8)
    out = blank("float32", 4, 8)
    for call, message in [
        (lambda: cuda.rms_norm("float64", x, w, 1e-5, out), 'dtype = "float64"'),
        (lambda: cuda.rms_norm("bfloat16", x, w, 1e-5, out), "out: expected uint16, got float32"),
        (lambda: cuda.rms_norm("float32", x, w[:7].copy(), 1e-5, out), r"weight: expected \[8\], got \[7\]"),
        (lambda: cuda.rms_norm("float32", x, w, 1e-5, out[:3].copy()), "4 rows are more than the capacity 3"),
        (lambda: cuda.rms_norm("float32", x, w, 1e-5, out, rows=ints(0, 4)), r"rows\[1\] = 4"),
        (lambda: cuda.rms_norm("float32", x[:, ::2], w[:4], 1e-5, out[:, :4].copy()), "C-contiguous"),
        (lambda: cuda.embedding("float32", x, ints(0, -1), out), r"tokens\[1\] = -1"),
        (lambda: cuda.silu_mul("float32", x, out), r"gate_up: expected \[4, 16\]"),
    ]:
        with pytest.raises(UsageError, match=message):
            call()
    wide = normal(1, 8193)
    with pytest.raises(Exception, match="rms_norm: width 8193 is above 8192"):
        cuda.rms_norm("float32", wide, wide[0], 1e-5, blank("float32", 1, 8193))
    slab = [(blank("float32", 1, 4, 8), blank("float32", 1, 4, 8))]
    cos, sin = tables(4, 8)
    for position, sequence, message in [(4, 0, "positions"), (0, 1, "sequence")]:
        with pytest.raises(UsageError, match=message):
            cuda.rope_kv_write("float32", normal(1, 24), None, cos, sin, ints(position), ints(sequence), slab,
                               blank("float32", 1, 8))  # fmt: skip
    assert is_blank(out) and exact(slab[0][0], "float32").eq(-1234.5).all()
