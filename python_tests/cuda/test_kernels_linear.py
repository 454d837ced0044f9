"""y = x W^T with weights in 8 and 4 bits, and in floating point: against the formulas in fp64."""

import numpy as np
import pytest
import torch
from cuda_support import (
    BYTES,
    DTYPES,
    blank,
    check_error,
    exact,
    is_blank,
    normal,
    report,
    rng,
    same_bits,
    stored,
    tensor,
)
from reference.quantized import dequantized

from dllm_ext import _C, ConfigError, UsageError

FORMATS = ("int8", "int4")
# Of one group of 64, of fewer groups than warps that share K, of a ragged number, of more steps than stages.
SHAPES = [(16, 64), (48, 192), (64, 448), (16, 1280), (208, 320)]
ROWS = [(1, 1), (3, 8), (8, 9), (16, 16), (27, 40), (33, 33), (64, 64)]


def quantized(fmt, n, k, key=0):
    """(values, scales), and what they mean in fp64."""
    values, scales = _C.quantize(normal(n, k, key=key), fmt)
    wide = scales if fmt == "int8" else exact(scales, "bfloat16").numpy()
    return (values, scales), torch.from_numpy(dequantized(values, wide, k))


def activations(dtype, rows, k, key=0):
    """Rows of different sizes, one of them zero."""
    x = normal(rows, k, key=key) * np.float32(10.0) ** rng(rows, k).integers(-2, 3, (rows, 1)).astype(np.float32)
    if rows > 2:
        x[rows // 2] = 0
    return stored(x, dtype)


def run(cuda, dtype, weight, x, n, capacity=None, spare_columns=0, **more):
    out = blank("float32", capacity or len(x), n + spare_columns)
    cuda.quant_linear(dtype, weight, x, out, **more)
    assert is_blank(out[:, n:])
    return out[:, :n]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,k", SHAPES)
def test_quant_linear(cuda, fmt, dtype, n, k):
    """Row by row, because rows differ in size: against torch's product in fp32, of which sums are made here too."""
    weight, w = quantized(fmt, n, k)
    worst = 0.0
    for rows, capacity in ROWS:
        x = activations(dtype, rows, k)
        out = run(cuda, dtype, weight, x, n, capacity, spare_columns=8)
        assert is_blank(out[rows:])
        precise, single = exact(x, dtype), tensor(x, dtype).float()
        reference, same, terms = precise @ w.T, single @ w.float().T, precise.abs() @ w.T.abs()
        for r in range(rows):
            if not precise[r].any():
                assert not out[r].any()
                continue
            worst = max(worst, check_error(out[r : r + 1].copy(), same[r], reference[r], "float32",
                                           f"row {r} of {rows}", terms=terms[r]))  # fmt: skip
    scale_bytes = weight[1].nbytes
    moved = weight[0].nbytes + scale_bytes + rows * (k * BYTES[dtype] + 4 * n)
    report(cuda, f"quant_linear {fmt} {dtype} {rows} x {k} x {n}", moved, worst)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quant_linear_is_as_good_as_torch_on_16_bit_weights(cuda, fmt, dtype):
    """The 2x rule against torch with the weights in the activations' own type, where they fit it less well."""
    weight, w = quantized(fmt, 112, 384)
    x = stored(normal(24, 384), dtype)
    out = run(cuda, dtype, weight, x, 112)
    same = tensor(x, dtype) @ w.to(tensor(x, dtype).dtype).T
    ratio = check_error(out, same, exact(x, dtype) @ w.T, "float32")
    report(cuda, f"quant_linear {fmt} {dtype} against torch's {dtype}", weight[0].nbytes, ratio)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(cuda, fmt, dtype):
    """Nor on the instantiation that its launch picks, its place, or the columns that are asked for."""
    n, k = 96, 576
    weight, _ = quantized(fmt, n, k, key=1)
    x = activations(dtype, 80, k, key=1)
    whole = run(cuda, dtype, weight, x, n)
    for rows in (1, 8, 9, 16, 17, 32, 33, 64):
        assert same_bits(run(cuda, dtype, weight, x[:rows].copy(), n), whole[:rows]), rows
        assert same_bits(run(cuda, dtype, weight, x[80 - rows :].copy(), n), whole[80 - rows :]), rows
    for begin, end in ((0, 16), (16, 96), (32, 64), (80, -1)):
        width = (n if end < 0 else end) - begin
        out = run(cuda, dtype, weight, x[:20].copy(), width, spare_columns=3, column_begin=begin, column_end=end)
        assert same_bits(out.copy(), whole[:20, begin : begin + width].copy()), (begin, end)
    base = normal(20, n, key=2)
    out = base.copy()
    cuda.quant_linear(dtype, weight, x[:20].copy(), out, accumulate=True)
    assert same_bits(out, base + whole[:20])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_exact(cuda, fmt, dtype):
    """Rows of the unit matrix: each result is a weight, q s or v[q] s, to the bit."""
    n, k = 32, 64
    weight, w = quantized(fmt, n, k, key=3)
    out = run(cuda, dtype, weight, stored(np.eye(k), dtype), n)
    assert torch.equal(torch.from_numpy(out.T.copy()), w.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,n,k", [(1, 1, 1), (5, 33, 70), (16, 64, 128), (0, 8, 8), (40, 7, 300)])
def test_dense_linear(cuda, dtype, rows, n, k):
    """cuBLASLt on a GPU, plain loops in the emulator."""
    w, x = stored(normal(n, k), dtype), stored(normal(rows, k, key=1), dtype)
    out = blank("float32", rows, n + 5)
    cuda.dense_linear(dtype, w, x, out)
    assert is_blank(out[:, n:])
    reference, terms = exact(x, dtype) @ exact(w, dtype).T, exact(x, dtype).abs() @ exact(w, dtype).abs().T
    ratio = 0.0
    if rows:
        same = tensor(x, dtype).float() @ tensor(w, dtype).float().T
        ratio = check_error(out[:, :n].copy(), same, reference, "float32", terms=terms)
    report(cuda, f"dense_linear {dtype} {rows} x {k} x {n}", BYTES[dtype] * (n * k + rows * k) + 4 * rows * n, ratio)
    base = normal(rows, n, key=2)
    more = base.copy()
    cuda.dense_linear(dtype, w, x, more, accumulate=True)
    assert same_bits(more, base + out[:, :n])


def test_misuse(cuda):
    def call(fmt="int8", n=32, k=128, dtype="bfloat16", **more):
        weight = more.pop("weight", None) or _C.quantize(normal(n, k), fmt)
        cuda.quant_linear(
            dtype, weight, stored(normal(2, more.pop("x_k", k)), dtype), blank("float32", 2, n + 16), **more
        )

    call()
    values, scales = _C.quantize(normal(32, 128), "int4")
    for error, message, arguments in [
        (ConfigError, "32 x 96 is not a multiple of 16 x 64", {"k": 96}),
        (ConfigError, "24 x 128 is not a multiple of 16 x 64", {"n": 24, "fmt": "int4"}),
        (ConfigError, "columns", {"column_begin": 8}),
        (ConfigError, "columns", {"column_end": 40}),
        (ConfigError, "columns", {"column_begin": 48}),
        (UsageError, r"x: expected \[2, 128\], got \[2, 64\]", {"x_k": 64}),
        (UsageError, "scales do not belong to the values", {"weight": (values, scales[:, :1].copy())}),
    ]:
        with pytest.raises(error, match=message):
            call(**arguments)
    with pytest.raises(UsageError, match="out: 3 columns for 4"):
        cuda.dense_linear("float32", normal(4, 8), normal(2, 8), blank("float32", 2, 3))
