"""Shared by the tests of CUDA kernels: the module under test, 16-bit arrays, and the error rule.

On the emulated device a kernel's arithmetic is checked, not its speed: there, tests say how many bytes a call moves,
and only on a GPU how fast.
"""

import numpy as np
import pytest
import torch
from emulated_engine import load_module

from dllm_ext import _C

DTYPES = ("float32", "bfloat16", "float16")
HALVES = ("bfloat16", "float16")
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RESOLUTION = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
REPEATS = 20  # of a launch, for its time on a GPU


def device(backend):
    """Its kernels: an object of cuda_ops.cpp's class Ops."""
    if backend == "emulated":
        ops = load_module().cuda.Ops()
        assert ops.name == "cuda (emulated on the CPU)"
        return ops
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is false: there is no GPU, or torch cannot use it")
    if not hasattr(_C, "cuda"):
        pytest.skip("dllm_ext was built without CUDA")
    ops = _C.cuda.Ops()
    ops.repeats = REPEATS
    return ops


def rng(*key):
    return np.random.default_rng([len(key), *key])


def normal(*shape, key=0, scale=1.0):
    return (scale * rng(*shape, key).standard_normal(shape)).astype(np.float32)


def stored(x, dtype):
    """fp32 array -> the array that the kernels take: fp32, or the 16-bit type's bits as uint16."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    return x if dtype == "float32" else torch.from_numpy(x).to(TORCH[dtype]).view(torch.uint16).numpy()


def tensor(x, dtype):
    """The kernels' array as a torch tensor of that type."""
    return torch.from_numpy(x) if dtype == "float32" else torch.from_numpy(x).view(TORCH[dtype])


def exact(x, dtype):
    """The same values in fp64."""
    return tensor(x, dtype).double()


def ints(*values):
    return np.array(values, np.int32)


def blank(dtype, *shape):
    """An array for results, filled with a value that no result is, so that what was not written can be told."""
    return np.full(shape, -1234.5, np.float32) if dtype == "float32" else np.full(shape, 0xD5A5, np.uint16)


def is_blank(x):
    return bool((x == blank("float32" if x.dtype == np.float32 else "bfloat16", 1)).all())


def same_bits(a, b):
    """Also of NaN, and of -0 and 0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def check_error(result, torch_result, reference, dtype, what="", ulps=4, terms=None):
    """max |result - exact| <= 2 max |torch in the same precision - exact|; returns the ratio of the two.

    torch's error can be small by luck, above all over few elements. So the bound is never below `ulps` units in the
    last place of fp32 at the largest sum of |terms| (the accumulation; without `terms`, at the largest result), nor
    below one of the result's type at the largest result.
    """
    result, other = tensor(result, dtype).double(), torch_result.double()
    assert torch.isfinite(result).all(), what
    if not result.numel():
        return 0.0
    error, torch_error = ((x - reference).abs().max().item() for x in (result, other))
    scale = reference.abs().max().item()
    floor = ulps * RESOLUTION["float32"] * (scale if terms is None else terms.max().item())
    if dtype in HALVES:
        floor = max(floor, RESOLUTION[dtype] * scale)
    bound = max(2 * torch_error, floor)
    assert error <= bound, f"{what}: error {error:.3g}, torch {torch_error:.3g}, floor {floor:.3g}, scale {scale:.3g}"
    return error / max(torch_error, floor / 2, 1e-300)


def report(cuda, what, nbytes, ratio=None, seconds=None):
    """Prints what the last call moves, and on a GPU how fast; the data of repeated launches may lie in L2."""
    line, seconds = f"{what}: {nbytes:,} bytes", cuda.seconds if seconds is None else seconds
    if seconds:
        line += f", {nbytes / seconds / 1e9:.1f} GB/s"
    if ratio is not None:
        line += f", error / torch's (or half the floor) {ratio:.2f}"
    print("\n" + line, end="")
