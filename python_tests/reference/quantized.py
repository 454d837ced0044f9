"""Linear layers with quantised weights, as formulas: the section "Quantised weights" of docs/semantics.md.

Weights: int8 is w ~ q s with one scale per row; int4 is w ~ VALUES[q] s with one scale per row and group of 64 terms.
Activations: x ~ a xs with one scale per row, a in -127..127.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from .model import NAMES, ReferenceModel, shape_of

GROUP = 64
VALUES = np.array([-127, -98, -77, -61, -46, -33, -21, -10, 1, 13, 24, 36, 50, 65, 83, 107], dtype=np.float64)
STRETCHES = np.arange(16, 27) / 20  # 0.8, 0.85, ..., 1.3
LEAST = 2.0**-118  # an int4 group whose weights are all smaller counts as zeros


def to_bf16(x):
    """fp32 array -> the nearest bf16 values, ties to even, as fp32."""
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().float().numpy()


def quantize_rows(x):
    """fp32 [n, k] -> (integers -127..127 as fp32 [n, k], scales fp32 [n]): round(x 127 / m) and m / 127, m = max |x|.

    Ties go to even. Rows whose 127 / m overflows become zeros and keep their scale.
    """
    x = np.asarray(x, np.float32)
    most = np.abs(x).max(axis=1, initial=0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.float32(127) / most
    inverse[np.isinf(inverse)] = 0
    return np.rint(x * inverse[:, None]), most / np.float32(127)


def int8_weights(w):
    """fp32 [n, k] -> (values int8 [n, k], scales fp32 [n]). The scale of a row that becomes zeros is 0."""
    q, scale = quantize_rows(w)
    return q.astype(np.int8), np.where(np.any(q, axis=1), scale, np.float32(0))


def groups_of(w):
    """[n, k] -> fp64 [n, groups, 64], zeros at the end."""
    n, k = w.shape
    return np.pad(w.astype(np.float64), ((0, 0), (0, -k % GROUP))).reshape(n, -1, GROUP)


def nearest_error(groups, scales):
    """|w - VALUES[q] s| of the best q for every weight: groups [..., 64], scales [...]."""
    steps = np.abs(scales)[..., None]
    middles = (VALUES[1:] + VALUES[:-1]) / 2
    units = np.divide(groups, scales[..., None], out=np.zeros_like(groups), where=steps > 0)
    return np.where(steps > 0, np.abs(units - VALUES[np.searchsorted(middles, units)]) * steps, np.abs(groups))


def int4_candidates(groups):
    """The scales that a group may get, as bf16 values in fp64 [n, groups, 11]: m / (-127 t) for each t of STRETCHES."""
    index = np.abs(groups).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(groups, index, axis=-1)
    extreme = np.where(np.abs(extreme) < LEAST, 0, extreme).astype(np.float32)
    stretched = np.float32(-127) * STRETCHES.astype(np.float32)
    return to_bf16(extreme / stretched).astype(np.float64)


def unpack_int4(values, k):
    """Indices uint8 [n, k] of packed ones uint8 [n, ceil(k / 2)]: even terms are the low halves."""
    return np.stack((values & 15, values >> 4), axis=-1).reshape(len(values), -1)[:, :k]


def dequantized(values, scales, k):
    """fp64 weights [n, k] of int8 (values int8, scales fp32 [n]) or int4 (values uint8, scales fp32 [n, groups])."""
    if values.dtype == np.int8:
        return values.astype(np.float64) * scales.astype(np.float64)[:, None]
    return VALUES[unpack_int4(values, k)] * np.repeat(scales.astype(np.float64), GROUP, axis=1)[:, :k]


def linear(x, weight):
    """fp32 activations [rows, k], fp64 weights [n, k] -> fp64 [rows, n]: the activations quantised row by row."""
    a, scale = quantize_rows(x)
    with np.errstate(invalid="ignore"):
        return a.astype(np.float64) @ weight.T * scale.astype(np.float64)[:, None]


class QuantizedModel(ReferenceModel):
    """A checkpoint that `dllm quantize` wrote, in fp64: exact weights, activations quantised before linear layers."""

    def __init__(self, config, tensors):
        names, shape = NAMES[config["model_type"].lower()], shape_of(config)
        downs = {names["layer"].format(i) + names["down"] + ".weight" for i in range(shape.n_layers)}
        inner = config.get("mlp_hidden_size") or config.get("intermediate_size")
        arrays = {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in tensors.items()}
        for name in [name for name in arrays if name.endswith("_scale")]:
            weight = name.removesuffix("_scale")
            k = inner if weight in downs else shape.d_model
            arrays[weight] = dequantized(arrays[weight], arrays.pop(name), k)
        super().__init__(config, {name: torch.from_numpy(a) for name, a in arrays.items()}, torch.float64)
        if shape.tied:  # the table keeps its precision, the head has a quantised copy of it
            table = arrays[names["embed"] + ".weight"]
            self.head = torch.from_numpy(dequantized(*int8_weights(table), shape.d_model))

    @classmethod
    def from_folder(cls, folder):
        """Read config.json and every *.safetensors file of a folder."""
        tensors = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors.update(load_file(file))
        return cls(json.loads((Path(folder) / "config.json").read_text()), tensors)

    def linear(self, x, weight, bias=None):
        most = x.abs().amax(dim=-1, keepdim=True)
        a = torch.where(most > 0, x * 127 / most, 0).round()
        return F.linear(a * (most / 127), weight, bias)
