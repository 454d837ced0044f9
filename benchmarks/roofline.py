"""What this machine can do, and the least time that a step can take on it.

    python benchmarks/roofline.py            # multiply-adds by precision, and reading
    python benchmarks/roofline.py --model llada-1b --folder weights     # and the engine's steps against them, by turns

Peaks are measured, not looked up: the best of many large oneDNN GEMMs per precision (what PyTorch itself would run),
and the best read of a block that no cache holds, with all threads. The floor of a step is the larger of

    bytes of its weights and of the K and V it attends to  ÷  bytes read per second
    2 × its multiply-adds (linear layers, attention, LM head)  ÷  operations per second

and the fraction of the roof that a program reached is floor ÷ time. The roof of int8 is that of int8 × int8
multiply-adds; weights of 4 bits have no faster one, so int4 shares it.

With --model, peaks are measured anew in every turn, since other tenants of a machine take bandwidth and clock away: a
step is held against what its own turn had. Its bytes are then all that the engine reads, scales included.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

SECONDS = 1.5  # per peak


@dataclass(frozen=True)
class Precision:
    weight_bytes: float  # of one weight; scales of quantised ones are not counted: the floor stays a floor
    kv_bytes: int  # of one element of K or V
    peak: str  # whose multiply-adds


PRECISIONS = {
    "float32": Precision(4, 4, "float32"),
    "bfloat16": Precision(2, 2, "bfloat16"),
    "int8": Precision(1, 2, "int8"),
    "int4": Precision(0.5, 2, "int8"),
}


def best_seconds(run, seconds: float) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        t = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - t)
    return best


def measure_peaks(threads: int, seconds: float = SECONDS) -> dict[str, float]:
    """Operations per second (2 per multiply-add) of each precision, and bytes read per second as "read".

    `seconds`: what measuring each of them may take.
    """
    torch.set_num_threads(threads)
    rows, k, n = 512, 4096, 4096
    ops = torch.ops
    peaks = {}
    with torch.inference_mode():
        for name in ("float32", "bfloat16"):
            x = torch.randn(rows, k).to(getattr(torch, name))
            w = ops.mkldnn._reorder_linear_weight(torch.randn(n, k).to(x.dtype), rows)
            best = best_seconds(lambda x=x, w=w: ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), seconds)
            peaks[name] = 2 * rows * k * n / best
        x = torch.randint(0, 255, (rows, k), dtype=torch.uint8)
        w = ops.onednn.qlinear_prepack(torch.randint(-127, 127, (n, k), dtype=torch.int8), [rows, k])
        scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)
        arguments = (x, 0.01, 0, w, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        peaks["int8"] = 2 * rows * k * n / best_seconds(lambda: ops.onednn.qlinear_pointwise(*arguments), seconds)
        block = torch.zeros(2**27)
        peaks["read"] = block.nbytes / min(best_seconds(block.sum, seconds), best_seconds(block.amax, seconds))
    return peaks


@dataclass(frozen=True)
class Shape:
    """The sizes that a LLaDA config.json gives."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: dict) -> "Shape":
        names = ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size")
        return cls(*(config[name] for name in names), config["embedding_size"])

    @property
    def kv_columns(self) -> int:
        return self.d_model // self.n_heads * self.n_kv_heads

    @property
    def qkv(self) -> int:
        """Weights of one layer's Q, K and V projections."""
        return self.d_model * (self.d_model + 2 * self.kv_columns)

    @property
    def after_attention(self) -> int:
        """Weights of one layer's output projection and MLP."""
        return self.d_model * (self.d_model + 3 * self.mlp_hidden)

    @property
    def head(self) -> int:
        return self.d_model * self.vocab_size

    @property
    def linear_weights(self) -> int:
        """Weights that a step reads: everything but the embedding table and the norms."""
        return self.n_layers * (self.qkv + self.after_attention) + self.head

    def kv_bytes_read(self, keys: int, precision: str) -> int:
        return 2 * self.n_layers * self.kv_columns * keys * PRECISIONS[precision].kv_bytes


@dataclass(frozen=True)
class Work:
    """What a step cannot avoid."""

    bytes: float
    operations: float

    def floor(self, peaks: dict[str, float], precision: str) -> float:
        """Seconds on a machine with these peaks."""
        return max(self.bytes / peaks["read"], self.operations / peaks[PRECISIONS[precision].peak])


def forward_work(shape: Shape, rows: int, keys: int, precision: str) -> Work:
    """Of a step that computes `rows` rows over `keys` keys, with the logits of all these rows."""
    weights = shape.linear_weights * PRECISIONS[precision].weight_bytes
    attention = 2 * shape.d_model * rows * keys * shape.n_layers  # multiply-adds of Q K^T and of P V
    return Work(
        bytes=weights + shape.kv_bytes_read(keys, precision),
        operations=2 * (rows * shape.linear_weights + attention),
    )


def generation_floor(shape: Shape, counters: dict, keys: int, peaks: dict[str, float], precision: str) -> float:
    """Seconds that the steps of a generation cannot avoid, by the engine's counters (lists with one entry per step).

    In the last layer only rows whose logits are wanted go past their K and V.
    """
    total = 0.0
    names = ("rows", "layer_rows", "logit_rows", "attention_pairs", "weight_bytes")
    for rows, layer_rows, logit_rows, pairs, weight_bytes in zip(*(counters[n] for n in names), strict=True):
        past_attention = max(0, layer_rows - rows) + logit_rows
        linear = layer_rows * shape.qkv + past_attention * shape.after_attention + logit_rows * shape.head
        work = Work(
            bytes=weight_bytes + shape.kv_bytes_read(keys, precision),
            operations=2 * (linear + 2 * shape.d_model * pairs),
        )
        total += work.floor(peaks, precision)
    return total


def describe(peaks: dict[str, float]) -> str:
    gemms = ", ".join(f"{name} {peaks[name] * 1e-9:.0f}" for name in ("float32", "bfloat16", "int8"))
    return f"oneDNN GEMM {gemms} × 10⁹ operations/s; reading {peaks['read'] * 1e-9:.1f} GB/s"


def steps_by_turns(folder, args):
    """A table of the engine's steps: medians over the turns of times, rates and fractions of the turn's own peaks."""
    from peers.checkpoint import load_config
    from peers.engine import LOAD

    from dllm_ext import _C, Engine

    shape = Shape.from_config(load_config(folder))
    print("| precision | rows | ms | GB/s read | of the turn's peak | 10⁹ operations/s | of the turn's peak |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for precision in args.precisions:
        engine = Engine.from_pretrained(folder, **LOAD[precision])
        read = engine.weight_bytes + shape.kv_bytes_read(args.keys, precision)
        turns = {rows: [] for rows in args.rows}
        for _ in range(args.repeats):
            peaks = measure_peaks(args.threads, seconds=0.4)
            for rows in args.rows:
                seconds = statistics.median(_C.ops.time_steps(engine._native, rows, args.keys, args.calls))
                rates = read / seconds, forward_work(shape, rows, args.keys, precision).operations / seconds
                of_peaks = rates[0] / peaks["read"], rates[1] / peaks[PRECISIONS[precision].peak]
                turns[rows].append((1e3 * seconds, rates[0] * 1e-9, of_peaks[0], rates[1] * 1e-9, of_peaks[1]))
        for rows, values in turns.items():
            ms, gb, of_read, ops, of_ops = map(statistics.median, zip(*values, strict=True))
            print(
                f"| {precision} | {rows} | {ms:.1f} | {gb:.1f} | {of_read:.0%} | {ops:.0f} | {of_ops:.0%} |", flush=True
            )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    p.add_argument("--model", help="a shape of random_model.py: also time the engine's steps")
    p.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where random weights are kept")
    p.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["bfloat16", "int8", "int4"])
    p.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 320])
    p.add_argument("--keys", type=int, default=320)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--calls", type=int, default=5, help="steps per turn; the turn's time is their median")
    args = p.parse_args()
    print(describe(measure_peaks(args.threads)))
    if args.model:
        from random_model import write_llada

        steps_by_turns(write_llada(args.folder, args.model), args)


if __name__ == "__main__":
    main()
