"""Linear layers, embedding, RMSNorm and noise: every instruction set against PyTorch and fp64."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ops_support import (
    DTYPES,
    ISAS,
    ROWS,
    TORCH,
    check_error,
    empty,
    exact,
    instruction_set,
    ops,
    padded_rows,
    stored,
    tensor,
    threads,
)
from reference import philox

SHAPES = [(1, 1), (2, 33), (7, 31), (64, 64), (129, 100), (255, 257), (768, 48), (513, 333), (2048, 160)]  # k, n


@pytest.fixture(params=ISAS)
def isa(request):
    with instruction_set(request.param) as name:
        yield name


def rng(*key):
    return np.random.default_rng([len(key), *key])


def problem(dtype, rows, k, n, bias=True):
    r = rng(rows, k, n)
    x = stored(r.standard_normal((rows, k)), dtype)
    w = stored(r.standard_normal((n, k)) / np.sqrt(k), dtype)
    b = r.standard_normal(n).astype(np.float32) if bias else None
    return x, w, b


def run(w, x, out, epilogue="store"):
    ops.linear(w, x, out, epilogue)
    return out


def test_isas():
    assert ISAS[0] == "portable"
    for name in ISAS:
        ops.set_isa(name)
        assert ops.current_isa() == name
    ops.set_isa("auto")
    assert ops.current_isa() == ISAS[-1]
    with pytest.raises(Exception, match="unknown instruction set"):
        ops.set_isa("mmx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k,n", SHAPES)
def test_linear_shapes(isa, dtype, k, n):
    for rows in (1, 3, 32, 37):
        x, w, b = problem(dtype, rows, k, n)
        packed = ops.PackedLinear([w], dtype, bias=b)
        assert (packed.n, packed.k, packed.format) == (n, k, dtype)
        reference = F.linear(exact(x), exact(w), torch.from_numpy(b).double())
        for out_dtype in DTYPES:
            out = run(packed, padded_rows(x, 5), padded_rows(empty(out_dtype, rows, n), 3))
            same = F.linear(tensor(x).float(), tensor(w).float(), torch.from_numpy(b)).to(TORCH[out_dtype])
            check_error(np.ascontiguousarray(out), same, reference, out_dtype, what=f"{rows} rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_every_row_count(isa, dtype):
    k, n = 331, 77
    x, w, _ = problem(dtype, max(ROWS), k, n)
    packed = ops.PackedLinear([w], dtype)
    reference = exact(x) @ exact(w).T
    full = run(packed, x, empty("float32", len(x), n))
    check_error(full, tensor(x).float() @ tensor(w).float().T, reference, "float32")
    for rows in ROWS:
        assert np.array_equal(run(packed, x[:rows], empty("float32", rows, n)), full[:rows]), rows
        assert np.array_equal(run(packed, x[-rows:], empty("float32", rows, n)), full[-rows:]), rows
    for count in (1, 2, 3):
        with threads(count):
            assert np.array_equal(run(packed, x, empty("float32", len(x), n)), full), count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k,n", [(64, 96), (100, 45)])
def test_linear_add(isa, dtype, k, n):
    x, w, b = problem(dtype, 19, k, n)
    residual = rng(1).standard_normal((19, n)).astype(np.float32)
    out = run(ops.PackedLinear([w], dtype, bias=b), x, residual.copy(), "add")
    start, bias = torch.from_numpy(residual), torch.from_numpy(b)
    reference = start.double() + F.linear(exact(x), exact(w), bias.double())
    check_error(out, start + F.linear(tensor(x).float(), tensor(w).float(), bias), reference, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k,n", [(64, 96), (100, 45), (31, 16), (300, 1)])
def test_linear_silu_mul(isa, dtype, k, n):
    x, gate, _ = problem(dtype, 23, k, n)
    up = stored(rng(2).standard_normal((n, k)) / np.sqrt(k), dtype)
    gate = stored(exact(gate).numpy() * 8, dtype)  # both tails of the sigmoid
    packed = ops.PackedLinear.gate_up(gate, up, dtype)
    reference = F.silu(exact(x) @ exact(gate).T) * (exact(x) @ exact(up).T)
    same = F.silu(tensor(x).float() @ tensor(gate).float().T) * (tensor(x).float() @ tensor(up).float().T)
    for out_dtype in DTYPES:
        out = run(packed, x, empty(out_dtype, 23, n), "silu_mul")
        check_error(out, same.to(TORCH[out_dtype]), reference, out_dtype)


def test_silu_extremes(isa):
    gates = np.array([-np.inf, -1e30, -200, -89, -87.5, -1e-30, 0, 88.5, 200, 1e30], dtype=np.float32)
    packed = ops.PackedLinear.gate_up(np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32), "float32")
    out = run(packed, gates[1:, None], empty("float32", 9, 1), "silu_mul")
    assert np.all(out == 0)
    both = ops.PackedLinear.gate_up(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), "float32")
    x = torch.tensor([-100.0, -80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0, 100.0])
    out = run(both, x[:, None].numpy(), empty("float32", 9, 1), "silu_mul")
    expected = F.silu(x.double()) * x.double()
    assert np.allclose(out[:, 0], expected, rtol=1e-6, atol=1e-30)
    assert np.isnan(run(both, np.full((1, 1), np.nan, np.float32), empty("float32", 1, 1), "silu_mul")).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["store", "add", "silu_mul"])
def test_linear_out_rows(isa, dtype, epilogue):
    """Scattering the rows changes where they go and nothing else; the other rows are not touched."""
    n, total = 77, 400
    for rows in (1, 19, 300):
        x, w, b = problem(dtype, rows, 64, n)
        to = rng(rows).permutation(total)[:rows].astype(np.int32)
        gated = epilogue == "silu_mul"
        packed = ops.PackedLinear.gate_up(w, w, dtype) if gated else ops.PackedLinear([w], dtype, bias=b)
        for out_dtype in DTYPES[: 1 if epilogue == "add" else 2]:
            before = stored(rng(5).standard_normal((total, n)), out_dtype)
            out = before.copy()
            ops.linear(packed, x, out, epilogue, out_rows=to)
            assert np.array_equal(out[to], run(packed, x, before[to].copy(), epilogue))
            others = np.setdiff1d(np.arange(total), to)
            assert np.array_equal(out[others], before[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["store", "add", "silu_mul"])
def test_linear_panel_range(isa, dtype, epilogue):
    n, rows = 157, 150
    width = 16 if epilogue == "silu_mul" else 32
    x, w, b = problem(dtype, rows, 64, n)
    packed = ops.PackedLinear.gate_up(w, w, dtype) if width == 16 else ops.PackedLinear([w], dtype, bias=b)
    last = -(-n // width)
    residual = rng(6).standard_normal((rows, n)).astype(np.float32)
    whole = run(packed, x, residual.copy(), epilogue)
    to = rng(7).permutation(rows).astype(np.int32)
    for begin, end in ((0, 1), (1, 3), (2, last), (last - 1, last), (0, last)):
        columns = slice(begin * width, end * width)
        out = residual[:, columns].copy()
        ops.linear(packed, x, out, epilogue, panel_begin=begin, panel_end=end)
        assert np.array_equal(out, whole[:, columns])
        if end == last and epilogue != "add":
            ops.linear(packed, x, out, epilogue, to, begin)
            assert np.array_equal(out[to], whole[:, columns])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_packing_stacks_and_converts(isa, dtype, source):
    parts = [rng(3, n).standard_normal((n, 37)) for n in (5, 40, 12)]
    x = stored(rng(4).standard_normal((3, 37)), dtype)
    packed = ops.PackedLinear([stored(p, source) for p in parts], dtype)
    both = [stored(exact(stored(p, source)).numpy(), dtype) for p in parts]
    whole = ops.PackedLinear([np.concatenate(both)], dtype)
    out = run(packed, x, empty("float32", 3, 57))
    assert np.array_equal(out, run(whole, x, empty("float32", 3, 57)))
    check_error(out, tensor(x).float() @ tensor(np.concatenate(both)).float().T,
                exact(x) @ exact(np.concatenate(both)).T, "float32")  # fmt: skip


def test_linear_nan_stays_in_its_row(isa):
    for dtype in DTYPES:
        x, w, _ = problem(dtype, 20, 65, 50)
        packed = ops.PackedLinear([w], dtype)
        clean = run(packed, x, empty("float32", 20, 50))
        x = x.copy()
        x[7, 64] = np.nan if dtype == "float32" else 0x7FC0
        out = run(packed, x, empty("float32", 20, 50))
        assert np.isnan(out[7]).all()
        assert np.array_equal(np.delete(out, 7, 0), np.delete(clean, 7, 0))
        assert (run(packed, x, empty("bfloat16", 20, 50))[7] & 0x7FFF > 0x7F80).all()


def test_linear_checks_its_arguments():
    x, w, _ = problem("float32", 4, 8, 6)
    packed = ops.PackedLinear([w], "float32")
    out = empty("float32", 4, 6)
    for args, message in [
        ((packed, x[:, :7], out), "8 columns"),
        ((packed, x, out[:3]), "4 rows"),
        ((packed, x, out[:, :5]), "6 columns"),
        ((packed, x.astype(np.float64), out), "float32"),
        ((packed, x[::-1], out), "rows"),
        ((packed, np.asfortranarray(x), out), "adjacent"),
        ((packed, stored(x, "bfloat16"), out), "float32"),
        ((packed, x, out, "silu_mul"), "gate"),
        ((packed, x, out, "gelu"), "epilogue"),
    ]:
        with pytest.raises(Exception, match=message):
            ops.linear(*args)
    for kwargs, message in [
        ({"out_rows": np.array([0, 1, 2, 2], np.int32)}, "twice"),
        ({"out_rows": np.array([0, 1, 2, 4], np.int32)}, "out_rows"),
        ({"out_rows": np.array([0, 1, 2], np.int32)}, "4 elements"),
        ({"panel_begin": 1}, "panels"),
        ({"panel_begin": -1}, "panels"),
        ({"panel_end": 2}, "panels"),
        ({"panel_end": 0}, "panels"),
    ]:
        with pytest.raises(Exception, match=message):
            ops.linear(packed, x, out, **kwargs)
    with pytest.raises(Exception, match="input columns"):
        ops.PackedLinear([w, w[:, :5]], "float32")
    with pytest.raises(Exception, match="format"):
        ops.PackedLinear([w], "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 5, 64, 333])
def test_embedding(isa, dtype, d):
    table = stored(rng(d).standard_normal((50, d)), dtype)
    tokens = rng(d, 1).integers(0, 50, 37).astype(np.int32)
    assert np.array_equal(ops.embedding(table, tokens), tensor(table).float().numpy()[tokens])
    with pytest.raises(Exception, match="tokens"):
        ops.embedding(table, np.array([50], np.int32))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 6, 16, 63, 64, 200, 1024, 4096])
def test_rms_norm(isa, out_dtype, d):
    r = rng(d)
    x = (r.standard_normal((41, d)) * 10.0 ** r.integers(-3, 3, (41, 1))).astype(np.float32)
    w = r.standard_normal(d).astype(np.float32)
    reference = F.rms_norm(torch.from_numpy(x).double(), (d,), torch.from_numpy(w).double(), 1e-5)
    same = F.rms_norm(torch.from_numpy(x), (d,), torch.from_numpy(w), 1e-5).to(TORCH[out_dtype])
    out = ops.rms_norm(padded_rows(x, 3), w, 1e-5, out_dtype)
    check_error(out, same, reference, out_dtype)
    for row in (0, 17, 40):
        assert np.array_equal(ops.rms_norm(x[row : row + 1], w, 1e-5, out_dtype)[0], out[row])
    with threads(1):
        assert np.array_equal(ops.rms_norm(x, w, 1e-5, out_dtype), out)
    rows = np.array([40, 3, 3, 0], np.int32)
    assert np.array_equal(ops.rms_norm(padded_rows(x, 3), w, 1e-5, out_dtype, rows_in=rows), out[rows])
    with pytest.raises(Exception, match="rows_in"):
        ops.rms_norm(x, w, 1e-5, out_dtype, rows_in=np.array([41], np.int32))


def test_philox():
    ids = np.arange(1000, dtype=np.uint32)
    for seed, step, position in [(0, 0, 0), (7, 3, 900), (2**64 - 1, 2**32 - 1, 2**32 - 1)]:
        for name, stream in (("token", philox.TOKEN_STREAM), ("selection", philox.SELECTION_STREAM)):
            ours = ops.philox_uniform(seed, step, position, ids, name)
            assert np.array_equal(ours, philox.uniform(seed, stream, step, position, ids))
    # The published test vector for a zero counter and key: 6627e8d5 e169c58d ...
    first = ops.philox_uniform(0, 0, 0, np.zeros(1, np.uint32))[0]
    assert first == ((0x6627E8D5 >> 6) * 2.0**26 + (0xE169C58D >> 6) + 0.5) * 2.0**-52


@pytest.mark.parametrize("dtype", DTYPES)
def test_speed(isa, dtype):
    """Prints what this machine does; asserts nothing about it."""
    k = n = 1024
    for rows in (1, 32):
        x, w, _ = problem(dtype, rows, k, n)
        packed, out = ops.PackedLinear([w], dtype), empty("float32", rows, n)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            ops.linear(packed, x, out)
            times.append(time.perf_counter() - start)
        best = min(times)
        flops, read = 2e-9 * rows * k * n / best, 1e-9 * w.nbytes / best
        print(f"\n{isa} {dtype} {rows} rows: {flops:.0f} GFLOP/s, {read:.0f} GB/s")
