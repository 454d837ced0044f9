"""Shared by the kernel tests: bf16 as uint16 arrays, instruction sets, and the error rule."""

import contextlib

import numpy as np
import torch

from dllm_ext import _C

ops = _C.ops
ISAS = ops.available_isas()
DTYPES = ("float32", "bfloat16")
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = (*range(1, 41), 320)
RESOLUTION = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


@contextlib.contextmanager
def instruction_set(name):
    ops.set_isa(name)
    try:
        yield name
    finally:
        ops.set_isa("auto")


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stored(x, dtype):
    """fp32 array -> the array that the kernels take: fp32, or bf16 as uint16."""
    if dtype == "float32":
        return np.ascontiguousarray(x, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()


def tensor(x):
    """An array of the kernels as a torch tensor of the same precision."""
    t = torch.from_numpy(x)
    return t.view(torch.bfloat16) if x.dtype == np.uint16 else t


def exact(x):
    """The same values in fp64."""
    return tensor(x).double()


def empty(dtype, *shape):
    return np.empty(shape, dtype=np.float32 if dtype == "float32" else np.uint16)


def padded_rows(x, extra):
    """The same matrix with a longer row stride; the gap is NaN, which no kernel may read."""
    fill = np.nan if x.dtype == np.float32 else 0x7FC0
    wide = np.full((x.shape[0], x.shape[1] + extra), fill, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def check_error(result, torch_result, reference, dtype, what=""):
    """max |result - fp64| <= 2 max |torch in the same precision - fp64|.

    PyTorch's error can be small by luck, above all for a handful of elements, or zero. So the bound is never below
    four units in the last place of the accumulation (fp32), nor one of the output's dtype, at the largest result.
    """
    reference = reference.double()
    assert torch.isfinite(tensor(result)).all()
    error = (exact(result) - reference).abs().max().item()
    other = (torch_result.double() - reference).abs().max().item()
    scale = reference.abs().max().item()
    floor = 4 * RESOLUTION["float32"] * scale
    if dtype == "bfloat16":
        floor = max(floor, RESOLUTION["bfloat16"] * scale)
    bound = max(2 * other, floor)
    assert error <= bound, f"{what}: error {error:.3g}, torch {other:.3g}, floor {floor:.3g}, scale {scale:.3g}"
    return error / max(other, floor / 2, 1e-300)
