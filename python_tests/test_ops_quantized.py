"""Weights in 8 and 4 bits, and linear layers with them: every instruction set against the formulas in numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ops_support import DTYPES, ISAS, empty, exact, instruction_set, ops, padded_rows, stored, threads
from reference import quantized
from reference.quantized import dequantized, groups_of, int4_candidates, int8_weights, nearest_error

from dllm_ext import _C, CheckpointError

FORMATS = ("int8", "int4")
ROWS = (*range(1, 41), 130, 320)
TOLERANCE = 1e-6


def rng(*key):
    return np.random.default_rng([len(key), *key])


def as_floats(x):
    """fp32 or bf16 (uint16) array -> the same values in fp32."""
    return exact(np.ascontiguousarray(x)).float().numpy()


def dequantize(w, fmt):
    """The weights that the native quantiser makes of w, in fp64, and its (values, scales)."""
    values, scales = _C.quantize(w, fmt)
    return dequantized(values, as_floats(scales) if fmt == "int4" else scales, w.shape[1]), (values, scales)


def activations(dtype, rows, k, *key):
    """[rows, k] of every scale, one row of zeros among them if there are several."""
    r = rng(rows, k, *key)
    x = r.standard_normal((rows, k)) * 10.0 ** r.integers(-3, 4, (rows, 1))
    if rows > 2:
        x[rows // 2] = 0
    return stored(x, dtype)


def run(w, x, out=None, epilogue="store", **more):
    out = empty("float32", len(x), w.n) if out is None else out
    ops.linear(w, x, out, epilogue, **more)
    return out


def terms_of(x, weight):
    """Upper bound of the sums' size: |x| |W|^T, [rows, n]; what rounding errors are relative to."""
    return np.abs(as_floats(x).astype(np.float64)) @ np.abs(weight).T


def check_close(out, expected, size, what=""):
    assert np.isfinite(out).all(), what
    error = np.abs(out - expected)
    assert (error <= TOLERANCE * size + 1e-37).all(), f"{what}: {np.max(error / np.maximum(size, 1e-37)):.2e}"


# The formats


def weights(kind, n, k):
    """fp32 [n, k] of several characters."""
    r = rng(n, k)
    w = r.standard_normal((n, k)).astype(np.float32)
    if kind == "heavy tails":
        w = r.standard_t(2, (n, k)).astype(np.float32)
    elif kind == "one outlier":
        w[:, k // 2] = 1e4
    elif kind == "few values":
        w = r.integers(-2, 3, (n, k)).astype(np.float32)
    elif kind == "some rows zero":
        w[::2] = 0
        w[1, : k // 2] = -0.0
    elif kind == "all scales":
        w *= (10.0 ** r.integers(-44, 38, (n, 1))).astype(np.float32)
    elif kind == "subnormal":
        w *= np.float32(1e-41)
    elif kind == "huge":
        w = (np.clip(w, -3, 3) * np.float32(1.1e38)).astype(np.float32)
    elif kind == "largest":
        w = np.where(w > 0, np.finfo(np.float32).max, -np.finfo(np.float32).max).astype(np.float32)
        w[:, ::3] = 0
    return w


KINDS = (
    "normal",
    "heavy tails",
    "one outlier",
    "few values",
    "some rows zero",
    "all scales",
    "subnormal",
    "huge",
    "largest",
)
SIZES = [(3, 1), (2, 2), (5, 63), (4, 64), (7, 65), (3, 127), (40, 192), (9, 333)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n,k", SIZES)
def test_int8_is_the_formula(kind, n, k):
    w = weights(kind, n, k)
    for dtype in DTYPES:
        source = stored(np.clip(w, -3e38, 3e38), dtype)
        values, scales = _C.quantize(padded_rows(source, 3), "int8")
        expected, expected_scales = int8_weights(as_floats(source))
        assert values.dtype == np.int8 and scales.dtype == np.float32
        assert np.array_equal(values, expected) and np.array_equal(scales, expected_scales)
        assert values.min() >= -127


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n,k", SIZES)
def test_int4_is_the_best_of_its_candidates(kind, n, k):
    """The scale is a candidate with the least squared error, and every index is that of the nearest value."""
    w = weights(kind, n, k)
    for dtype in DTYPES:
        source = stored(np.clip(w, -3e38, 3e38), dtype)
        values, scales = _C.quantize(padded_rows(source, 3), "int4")
        assert values.dtype == np.uint8 and values.shape == (n, -(-k // 2))
        assert scales.dtype == np.uint16 and scales.shape == (n, -(-k // 64))
        groups = groups_of(as_floats(source))
        scales = as_floats(scales).astype(np.float64)
        candidates = int4_candidates(groups)
        assert (scales[..., None] == candidates).any(axis=-1).all()

        errors = [np.square(nearest_error(groups, candidates[..., t])).sum(-1) for t in range(candidates.shape[-1])]
        error = np.square(nearest_error(groups, scales)).sum(-1)
        assert (error <= np.min(errors, axis=0) * (1 + 1e-5)).all()

        approximation = groups_of(dequantized(values, scales, k))
        distance = np.abs(groups - approximation)
        padding = np.arange(groups[0].size).reshape(groups[0].shape) >= k
        distance[:, padding] = 0
        nearest = np.where(padding, 0, nearest_error(groups, scales))
        assert (distance <= nearest + 2e-5 * np.abs(scales)[..., None]).all()


def test_int4_error_is_as_documented():
    """Of normal numbers 8.2 % (root mean square), and 1 % or less in 8 bits."""
    w = rng(0).standard_normal((64, 4096)).astype(np.float32)
    for fmt, low, high in (("int8", 0.005, 0.01), ("int4", 0.080, 0.083)):
        error = np.sqrt(np.mean((dequantize(w, fmt)[0] - w) ** 2) / np.mean(w.astype(np.float64) ** 2))
        assert low < error < high


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_weights_that_are_not_finite_are_refused(fmt, bad):
    for dtype in DTYPES:
        for row, column in ((0, 0), (2, 64), (4, 99), (3, 50)):
            w = rng(1).standard_normal((5, 100))
            w[row, column] = bad
            with pytest.raises(CheckpointError, match=f'tensor "layer.9.weight" holds .* row {row}$'):
                _C.quantize(stored(w, dtype), fmt, "layer.9.weight")


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantising_depends_on_no_instruction_set_or_thread(fmt):
    w = weights("heavy tails", 300, 333)
    expected = _C.quantize(w, fmt)
    for isa in ISAS:
        with instruction_set(isa):
            for count in (1, 3):
                with threads(count):
                    for a, b in zip(_C.quantize(w, fmt), expected, strict=True):
                        assert np.array_equal(a, b), isa


def test_quantize_checks_its_arguments():
    w = np.ones((3, 4), np.float32)
    for arguments, message in [
        ((w, "int2"), "format"),
        ((w, "float32"), "int8 or int4"),
        ((w[0], "int8"), "2 dimensions"),
        ((w[:0], "int8"), "empty"),
        ((w[:, :0], "int4"), "empty"),
        ((w.astype(np.float64), "int8"), "float32"),
        ((w.T, "int8"), "adjacent"),
    ]:
        with pytest.raises(Exception, match=message):
            _C.quantize(*arguments)


# Linear layers


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    "k,n", [(1, 1), (2, 33), (63, 31), (64, 64), (129, 100), (768, 48), (2048, 65), (2049, 40), (4160, 33), (6144, 64)]
)
def test_linear_is_the_formula_on_every_instruction_set(fmt, k, n):
    """Within rounding of exact arithmetic; the same bits on all instruction sets (int4: on all that have FMA)."""
    w, packed = packed_weights(fmt, n, k, bias=True)
    bias = rng(n).standard_normal(n).astype(np.float32)
    for dtype in DTYPES:
        for rows in (1, 3, 37, 130) if k < 4000 else (1, 20):
            x = activations(dtype, rows, k)
            expected = quantized.linear(as_floats(x), w) + bias
            size = terms_of(x, w) + np.abs(bias)
            first = None
            for isa in ISAS[::-1]:
                with instruction_set(isa):
                    out = run(packed, padded_rows(x, 5), padded_rows(empty("float32", rows, n), 3))
                    check_close(out, expected, size, f"{isa}, {dtype}, {rows} rows")
                    first = out if first is None else first
                    if fmt == "int8" or isa != "portable":
                        assert np.array_equal(out, first), isa


def packed_weights(fmt, n, k, bias=False):
    """(fp64 weights [n, k], PackedLinear), heavy-tailed so that groups and rows differ in scale."""
    source = (rng(n, k, 1).standard_t(3, (n, k)) / np.sqrt(k)).astype(np.float32)
    w, (values, scales) = dequantize(source, fmt)
    packed = ops.PackedLinear([source], fmt, bias=rng(n).standard_normal(n).astype(np.float32) if bias else None)
    if k % 2 == 0:  # what is quantised already packs to the same
        again = ops.PackedLinear([(values, scales)], fmt)
        x = activations("float32", 3, k)
        clean = ops.PackedLinear([source], fmt)
        assert np.array_equal(run(again, x), run(clean, x))
    assert (packed.n, packed.k, packed.format) == (n, k, fmt)
    return w, packed


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_depend_on_no_other_row_and_no_thread(isa, dtype, fmt):
    n, k = 77, 331
    w, packed = packed_weights(fmt, n, k)
    x = activations(dtype, max(ROWS), k)
    with instruction_set(isa):
        full = run(packed, x)
        check_close(full, quantized.linear(as_floats(x), w), terms_of(x, w))
        for rows in ROWS:
            assert np.array_equal(run(packed, x[:rows]), full[:rows]), rows
            assert np.array_equal(run(packed, x[-rows:]), full[-rows:]), rows
        for count in (1, 2, 3):
            with threads(count):
                assert np.array_equal(run(packed, x), full), count


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_epilogues(isa, fmt):
    n, k, rows = 45, 100, 23
    packed = packed_weights(fmt, n, k, bias=True)[1]
    x = activations("float32", rows, k)
    residual = rng(1).standard_normal((rows, n)).astype(np.float32)
    with instruction_set(isa):
        y = run(packed, x)
        assert np.array_equal(run(packed, x, residual.copy(), "add"), residual + y)
        half = run(packed, x, empty("bfloat16", rows, n))
        assert np.array_equal(half, stored(y, "bfloat16"))

        to = rng(7).permutation(50)[:rows].astype(np.int32)
        before = rng(5).standard_normal((50, n)).astype(np.float32)
        out = run(packed, x, before.copy(), out_rows=to)
        others = np.setdiff1d(np.arange(50), to)
        assert np.array_equal(out[to], y) and np.array_equal(out[others], before[others])
        assert np.array_equal(run(packed, x, empty("float32", rows, 13), panel_begin=1), y[:, 32:])
        assert np.array_equal(run(packed, x, empty("float32", rows, 32), panel_end=1), y[:, :32])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("n,k", [(16, 31), (45, 100), (96, 64)])
def test_silu_mul(isa, fmt, n, k):
    gate, up = (rng(n, k, i).standard_normal((n, k)).astype(np.float32) for i in (2, 3))
    packed = ops.PackedLinear.gate_up(gate, up, fmt)
    x = stored(rng(4).standard_normal((19, k)), "float32")
    with instruction_set(isa):
        out = run(packed, x, empty("float32", 19, n), "silu_mul")
        if n > 16:
            tail = run(packed, x, empty("float32", 19, n - 16), "silu_mul", panel_begin=1)
            assert np.array_equal(tail, out[:, 16:])
    g, u = (quantized.linear(x, dequantize(m, fmt)[0]) for m in (gate, up))
    expected = F.silu(torch.from_numpy(g)).numpy() * u
    size = terms_of(x, dequantize(gate, fmt)[0]) * terms_of(x, dequantize(up, fmt)[0])
    check_close(out, expected, np.maximum(size, np.abs(expected)))


@pytest.mark.parametrize("fmt", FORMATS)
def test_packing_stacks_sources(fmt):
    """Parts in fp32, in bf16 and quantised already; as a whole or one by one."""
    parts = [as_floats(stored(rng(3, n).standard_normal((n, 90)), "bfloat16")) for n in (5, 40, 12)]
    x = activations("bfloat16", 4, 90)
    whole = run(ops.PackedLinear([np.concatenate(parts)], fmt), x)
    mixed = [parts[0], stored(parts[1], "bfloat16"), _C.quantize(parts[2], fmt)]
    assert np.array_equal(run(ops.PackedLinear(mixed, fmt), x), whole)
    pairs = [ops.PackedLinear.gate_up(*(make(p) for p in (parts[1], -parts[1])), fmt)
             for make in (lambda p: p, lambda p: _C.quantize(p, fmt))]  # fmt: skip
    outs = [run(p, x, empty("float32", 4, 40), "silu_mul") for p in pairs]
    assert np.array_equal(*outs)


def test_int8_values_may_be_any_byte():
    """-128, which quantize() never gives."""
    values = rng(9).integers(-128, 128, (33, 64)).astype(np.int8)
    values[:, 5] = -128
    scales = rng(9).random(33).astype(np.float32)
    x = activations("float32", 5, 64)
    w = dequantized(values, scales, 64)
    check_close(run(ops.PackedLinear([(values, scales)], "int8"), x), quantized.linear(x, w), terms_of(x, w))


def test_packing_refuses_other_formats():
    w = np.ones((3, 4), np.float32)
    eight, four = _C.quantize(w, "int8"), _C.quantize(w, "int4")
    for sources, fmt, message in [
        ([eight], "int4", "int8 weights cannot become int4"),
        ([four], "int8", "int4 weights cannot become int8"),
        ([eight], "float32", "cannot become float32"),
        ([w, _C.quantize(np.ones((3, 6), np.float32), "int8")], "int8", "input columns"),
        ([(eight[0], eight[1][:2])], "int8", "scales"),
        ([np.ones((1, 65537), np.float32)], "int8", "65536"),
    ]:
        with pytest.raises(Exception, match=message):
            ops.PackedLinear(sources, fmt)
    assert ops.PackedLinear([np.ones((1, 65537), np.float32)], "int4").k == 65537


@pytest.mark.parametrize("isa", ISAS)
def test_int8_sums_do_not_overflow(isa):
    """The longest rows there are, of the largest terms."""
    k = 65536
    for sign in (1, -1):
        packed = ops.PackedLinear([np.full((2, k), sign, np.float32)], "int8")
        x = np.ones((3, k), np.float32)
        x[1] *= -1
        x[2, k // 2 :] *= -1
        with instruction_set(isa):
            assert np.allclose(run(packed, x)[:, 0], [sign * k, -sign * k, 0], rtol=1e-6)


# Activations


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_activations_that_are_not_finite_spoil_their_row_only(isa, fmt, bad):
    n, k, row = 50, 131, 7
    packed = packed_weights(fmt, n, k)[1]
    with instruction_set(isa):
        for dtype in DTYPES:
            clean = activations(dtype, 20, k)
            expected = np.delete(run(packed, clean), row, 0)
            for column in (0, 1, 15, 16, 64, 127, 128, 130):
                x = clean.copy()
                x[row, column] = stored(np.array([[bad]]), dtype)[0, 0]
                out = run(packed, x)
                assert np.isnan(out[row]).all(), (dtype, column)
                assert np.array_equal(np.delete(out, row, 0), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_activations_of_any_size(isa, fmt):
    """Rows of zeros, of numbers so small that they are taken for zeros, and of large ones."""
    n, k = 40, 90
    w, packed = packed_weights(fmt, n, k)
    base = np.clip(rng(8).standard_normal((1, k)), -3, 3).astype(np.float32)
    scales = np.array([0, 1e-45, 1e-41, 1e-38, 1e-37, 3e-37, 1e-36, 1e-30, 1e-10, 1, 1e10, 1e30])
    x = (base.astype(np.float64) * scales[:, None]).astype(np.float32)
    x[:, 3] = (np.sign(base[0, 3]) * 3 * scales).astype(np.float32)  # the row's largest
    with instruction_set(isa):
        out = run(packed, x)
    check_close(out, quantized.linear(x, w), terms_of(x, w))
    tiny = scales < 2e-37
    assert np.all(out[tiny] == 0) and np.all(np.abs(out[~tiny]).max(axis=1) > 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_lm_head_statistics(isa, fmt):
    """Of a quantised head: those of the logits that linear() gives."""
    packed = packed_weights(fmt, 300, 100)[1]
    x = activations("bfloat16", 13, 100)
    with instruction_set(isa):
        expected, found = ops.row_stats(run(packed, x)), ops.lm_head_stats(packed, x)
    for name, column in expected.items():
        assert np.allclose(found[name], column, rtol=1e-6), name
