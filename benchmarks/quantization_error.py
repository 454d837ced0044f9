"""What bf16 and quantised weights do to logits and to the weights themselves.

    python benchmarks/quantization_error.py --models mini-llada llada-1b

Logits: one full forward in every precision, by the engine's own kernels, layer by layer (one layer's weights are in
memory at a time), compared with fp32: for mini-llada at the masked positions behind held-out problems of its task, for
the random 1.0 B shape at all positions of random tokens (its masked rows would all be alike). The error is the root
mean square of the difference divided by that of the fp32 logits, both after subtracting each row's mean, which no
softmax sees; KL is that of the distributions, in nats.

Weights: the same ratio for the weights of all linear layers, beside plain rounding as other engines have it: Q8_0 and
Q4_0, groups of 32 with an fp16 scale, evenly spaced values. At most --rows rows of a tensor are looked at.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from random_model import write_llada
from tqdm import tqdm

from dllm_ext import _C, Engine
from dllm_ext.hub import BUNDLED

sys.path.insert(0, str(Path(__file__).parent / "mini_gsm"))

ops = _C.ops
GROUP = 64
VALUES = np.array([-127, -98, -77, -61, -46, -33, -21, -10, 1, 13, 24, 36, 50, 65, 83, 107], np.float32)
PRECISIONS = {  # name: (dtype of everything else, weights, LM head); "weights": quantised and then used in fp32
    "float32": ("float32", "float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "int8 weights alone": ("float32", "int8 weights", "int8 weights"),
    "int8, float32": ("float32", "int8", "int8"),
    "int8, bfloat16": ("bfloat16", "int8", "int8"),
    "int4 weights alone": ("float32", "int4 weights", "int8 weights"),
    "Q4_0 weights alone": ("float32", "Q4_0 weights", "int8 weights"),
    "int4, float32": ("float32", "int4", "int8"),
    "int4, bfloat16": ("bfloat16", "int4", "int8"),
}


class Model:
    """A LLaDA checkpoint, read tensor by tensor."""

    def __init__(self, folder):
        self.checkpoint = _C.Checkpoint(str(folder))
        self.spec = _C.ModelSpec.from_config(self.checkpoint.config_text)
        self.shapes = dict(self.spec.tensors())
        if self.spec.family != "llada":
            raise SystemExit(f"{folder}: only LLaDA's layout is known here")

    def weight(self, name):
        """[n, k] or [n], float32 or bfloat16 as uint16, in its mapped file."""
        return self.checkpoint.tensor(f"{name}.weight", self.shapes[f"{name}.weight"])

    def layer(self, i, part):
        return self.weight(f"model.transformer.blocks.{i}.{part}")

    @property
    def linear_layers(self):
        """Names of the linear layers, the LM head (a tied one: the embedding) last."""
        parts = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
        names = [f"model.transformer.blocks.{i}.{part}" for i in range(self.spec.n_layers) for part in parts]
        return [*names, "model.transformer.wte" if self.spec.tied_head else "model.transformer.ff_out"]


def empty(dtype, *shape):
    return np.empty(shape, np.float32 if dtype == "float32" else np.uint16)


def widened(x):
    """float32, or bfloat16 as uint16, as float32."""
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)


def rope_tables(spec, length):
    half = spec.head_dim // 2
    inverse = np.float32(1) / np.float32(spec.rope_theta) ** (np.arange(half, dtype=np.float32) * 2 / spec.head_dim)
    angle = np.arange(length, dtype=np.float32)[:, None] * inverse
    return np.cos(angle), np.sin(angle)


def linear(sources, fmt, x, out=None, epilogue="store"):
    """x through one packed layer; `sources` are stacked, or the gate and up projections of "silu_mul"."""
    fmt, _, alone = fmt.partition(" ")
    if alone:
        sources, fmt = [FORMATS[fmt][1](widened(w)) for w in sources], "float32"
    w = ops.PackedLinear.gate_up(*sources, fmt) if epilogue == "silu_mul" else ops.PackedLinear(sources, fmt)
    out = empty("float32", len(x), w.n) if out is None else out
    ops.linear(w, x, out, epilogue)
    return out


class Forward:
    """One precision's residual stream of one sequence, taken through the layers one by one."""

    def __init__(self, model, precision, tokens):
        self.model, (self.dtype, self.format, self.head) = model, PRECISIONS[precision]
        self.positions = np.arange(len(tokens), dtype=np.int32)
        self.tables = rope_tables(model.spec, len(tokens))
        self.x = ops.embedding(model.weight("model.transformer.wte"), np.asarray(tokens, np.int32))

    def norm(self, name, **rows):
        weight = widened(self.model.weight(name))
        return ops.rms_norm(self.x, weight, self.model.spec.norm_eps, self.dtype, **rows)

    def layer(self, i):
        spec, rows = self.model.spec, len(self.x)
        block = f"model.transformer.blocks.{i}."
        projections = [self.model.layer(i, p) for p in ("q_proj", "k_proj", "v_proj")]
        qkv = linear(projections, self.format, self.norm(block + "attn_norm"))
        slab = ops.KvSlab(spec.n_kv_heads, spec.head_dim, rows, self.dtype)
        zeros = np.zeros(rows, np.int32)
        q = ops.rope_kv_write(qkv, *self.tables, self.positions, [slab], zeros, spec.n_heads)
        mixed = ops.attention(q, [(0, rows, rows, slab)], spec.n_heads, spec.head_dim**-0.5)
        linear([self.model.layer(i, "attn_out")], self.format, mixed, self.x, "add")
        inner = empty(self.dtype, rows, spec.mlp_hidden)
        pair = [self.model.layer(i, p) for p in ("ff_proj", "up_proj")]
        linear(pair, self.format, self.norm(block + "ff_norm"), inner, "silu_mul")
        linear([self.model.layer(i, "ff_out")], self.format, inner, self.x, "add")

    def logits(self, rows):
        hidden = self.norm("model.transformer.ln_f", rows_in=np.asarray(rows, np.int32))
        return linear([self.model.weight(self.model.linear_layers[-1])], self.head, hidden)


def canvases(name, folder, model, count, masked):
    """Token ids of `count` problems with `masked` mask tokens behind them; of a random model, one of random tokens."""
    if name not in BUNDLED:
        return [np.random.default_rng(0).integers(4, model.spec.vocab_size - 4, 2 * masked).tolist()]
    from data import held_out

    engine = Engine.from_pretrained(folder)
    return [engine.encode(p.question) + [model.spec.mask_id] * masked for p in held_out(count, 4242)]


def log_softmax(logits):
    return torch.from_numpy(logits).double().log_softmax(-1).numpy()


def logit_errors(model, sequences, last):
    """Precision -> [root mean square error, share of rows with the same best id, KL], over all rows.

    Of each sequence the `last` positions count; 0: all of them.
    """
    logits = {precision: [] for precision in PRECISIONS}
    for tokens in tqdm(sequences, desc="logits", leave=False):
        streams = {precision: Forward(model, precision, tokens) for precision in PRECISIONS}
        for i in range(model.spec.n_layers):
            for stream in streams.values():
                stream.layer(i)
        for precision, stream in streams.items():
            logits[precision].append(stream.logits(range(len(tokens))[-last:]))
    exact = np.concatenate(logits["float32"]).astype(np.float64)
    center = exact - exact.mean(-1, keepdims=True)
    p = log_softmax(exact)
    found = {}
    for precision, parts in logits.items():
        other = np.concatenate(parts).astype(np.float64)
        difference = other - other.mean(-1, keepdims=True) - center
        error = np.sqrt(np.mean(difference**2) / np.mean(center**2))
        same = np.mean(other.argmax(-1) == exact.argmax(-1))
        found[precision] = [error, same, np.mean(np.sum(np.exp(p) * (p - log_softmax(other)), -1))]
    return found


def int8(w):
    values, scales = _C.quantize(w, "int8")
    return values * scales[:, None]


def int4(w):
    values, scales = _C.quantize(w, "int4")
    index = np.stack((values & 15, values >> 4), -1).reshape(len(w), -1)[:, : w.shape[1]]
    return VALUES[index] * np.repeat(widened(scales), GROUP, axis=1)[:, : w.shape[1]]


def in_groups(round_groups):
    """Q8_0 and Q4_0: groups of 32 (the last one filled with zeros) through a function of [n, groups, 32]."""

    def rounded(w):
        groups = np.pad(w, ((0, 0), (0, -w.shape[1] % 32))).reshape(len(w), -1, 32)
        return round_groups(groups).reshape(len(w), -1)[:, : w.shape[1]]

    return rounded


def q8_0(groups):
    scale = np.float16(np.abs(groups).max(-1, keepdims=True) / 127).astype(np.float32)
    return np.rint(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)) * scale


def q4_0(groups):
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    scale = np.float16(extreme / -8).astype(np.float32)
    steps = np.divide(groups, scale, out=np.zeros_like(groups), where=scale != 0)
    return np.clip(np.rint(steps), -8, 7) * scale


FORMATS = {  # name: (bits per weight, rounding)
    "int8": ("8 + 32 / k", int8),
    "Q8_0": ("8.5", in_groups(q8_0)),
    "int4": ("4.25", int4),
    "Q4_0": ("4.5", in_groups(q4_0)),
}


def weight_errors(model, rows):
    """Format -> root mean square error over the linear layers, relative to the weights."""
    squares, total = dict.fromkeys(FORMATS, 0.0), 0.0
    for name in tqdm(model.linear_layers, desc="weights", leave=False):
        w = widened(np.ascontiguousarray(model.weight(name)[:rows]))
        total += np.sum(w.astype(np.float64) ** 2)
        for fmt, (_, rounded) in FORMATS.items():
            squares[fmt] += np.sum((rounded(w) - w).astype(np.float64) ** 2)
    return {fmt: np.sqrt(square / total) for fmt, square in squares.items()}


def check(folder, model, tokens, masked):
    """The logits here are the engine's: the best ids are what it commits in a single step."""
    for precision, (dtype, fmt, _) in PRECISIONS.items():
        if fmt.endswith("weights"):
            continue
        quantization = fmt if fmt in ("int8", "int4") else None
        engine = Engine.from_pretrained(folder, dtype=dtype, quantization=quantization)
        fields = {"gen_length": masked, "block_length": masked, "threshold": 0.0, "stop_at_eos": False}
        ids = engine.generate(tokens[:-masked], cache="none", **fields).token_ids
        stream = Forward(model, precision, tokens)
        for i in range(model.spec.n_layers):
            stream.layer(i)
        logits = stream.logits(range(len(tokens) - masked, len(tokens)))
        logits[:, model.spec.mask_id] = -np.inf  # never proposed
        assert logits.argmax(-1).tolist() == ids, precision


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of logits and weights in every precision.")
    parser.add_argument("--models", nargs="+", default=["mini-llada", "llada-1b"], help="mini-llada, llada-1b")
    parser.add_argument("--sequences", type=int, default=32, help="canvases of mini-llada; a random model gets one")
    parser.add_argument("--masked", type=int, default=32, help="masked positions of each; half of the random canvas")
    parser.add_argument("--rows", type=int, default=256, help="of a tensor, for the weights' own error")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where random weights go")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()

    numbers = {}
    for name in args.models:
        folder = BUNDLED.get(name) or write_llada(args.folder, name)
        model = Model(folder)
        sequences = canvases(name, folder, model, args.sequences, args.masked)
        if name in BUNDLED:
            check(folder, model, sequences[0], args.masked)
        logits = logit_errors(model, sequences, args.masked if name in BUNDLED else 0)
        numbers[name] = {"logits": logits, "weights": weight_errors(model, args.rows)}

    print("\n| model | precision | error of logits | same best id | KL |\n| --- | --- | ---: | ---: | ---: |")
    for name, found in numbers.items():
        for precision, (error, same, divergence) in list(found["logits"].items())[1:]:
            print(f"| {name} | {precision} | {error:.2%} | {same:.1%} | {divergence:.2g} |")
    print("\n| weights | bits per weight |", " | ".join(numbers), "|\n| --- | ---: |", " ---: |" * len(numbers))
    for fmt, (bits, _) in FORMATS.items():
        print(f"| {fmt} | {bits} |", " | ".join(f"{found['weights'][fmt]:.2%}" for found in numbers.values()), "|")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main()
