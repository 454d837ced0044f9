"""What a step of the CUDA engine should take, on paper: no GPU was at hand, and nothing here was ever run on one.

    python benchmarks/cuda_prediction.py --llada CONFIG --dream CONFIG       # writes docs/cuda_prediction.md
    python benchmarks/cuda_prediction.py --launches STEP.json --config CONFIG --weights int8 --rows 16 --keys 48

CONFIG is a checkpoint's config.json. A step is a list of launches (launches() below, after CudaModel::run_layer and
head_stats, DeviceLoop::launch). A launch takes

    fixed cost + dependent trips to memory x latency + the longest of
        bytes from DRAM ÷ achievable bandwidth
        all bytes ÷ bandwidth of L2
        its instructions on the busiest multiprocessor, or what that one can have in flight (quantised weights)

The second form holds the list against what the emulated device ran in one step: a JSON list of [name, kind]. It fails
where a kernel or GEMM was launched more or less often than listed.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "cuda_prediction.md"
KERNELS = ROOT / "docs" / "cuda_kernels.md"


# --- Machines --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Gpu:
    """Vendor's figures, but for `l2`, which is rounded from published microbenchmarks."""

    name: str
    arch: int
    dram: float  # bytes per second, nominal
    l2: float
    sms: int
    clock: float  # sustained, as far as a data sheet says
    tensor: float  # multiply-adds x 2 per second, bf16 with fp32 sums, dense
    fp64: int  # operations per clock and multiprocessor


GPUS = [
    Gpu("A100-80GB SXM", 80, 2.039e12, 4.5e12, 108, 1.41e9, 312e12, 32),
    Gpu("H100 SXM", 90, 3.35e12, 5.5e12, 132, 1.7e9, 989e12, 64),
    Gpu("H200", 90, 4.8e12, 5.5e12, 132, 1.7e9, 989e12, 64),
    Gpu("RTX 4090", 89, 1.008e12, 5.0e12, 128, 2.52e9, 165e12, 2),
]
H100 = GPUS[1]


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says."""

    dram_fraction: float = 0.88  # of the nominal bandwidth: streaming kernels are reported at 85 to 92 %
    fixed: float = 2e-6  # from a kernel's end to the next one's first bytes, within a graph
    graph: float = 5e-6  # from the end of a graph, and two small copies, to the next graph
    trip: float = 0.5e-6  # a dependent access with its barrier, beyond the three or so that `fixed` holds
    latency: float = 0.8e-6  # of DRAM under load: bytes in flight ÷ latency bounds a multiprocessor's bandwidth
    tensor_fraction: float = 0.6  # of the tensor cores' peak, in a GEMM
    mma_clocks: float = 16  # per mma.sync of one warp in attention, softmax included
    quant_fills: bool = False  # as if their blocks always covered all multiprocessors evenly
    launches: float = 1.0  # of the fixed costs and trips that remain


# --- Models ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Model:
    layers: int
    d: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int

    @classmethod
    def read(cls, path: Path) -> "Model":
        c = json.loads(path.read_text())
        names = {
            "layers": ("n_layers", "num_hidden_layers"),
            "d": ("d_model", "hidden_size"),
            "heads": ("n_heads", "num_attention_heads"),
            "kv_heads": ("n_kv_heads", "num_key_value_heads"),
            "mlp": ("mlp_hidden_size", "intermediate_size"),
            "vocab": ("embedding_size", "vocab_size"),
        }
        found = {to: next(c[n] for n in either if c.get(n)) for to, either in names.items()}
        return cls(**found, head_dim=found["d"] // found["heads"])

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim


BITS = {"bf16": 16, "int8": 8, "int4": 4.25, "none": 16}  # of a weight, int4 with its scale per 64


def weight_bytes(weights: str, n: int, k: int) -> float:
    return n * k * BITS[weights] / 8 + (4 * n if weights == "int8" else 0)


def head_weights(weights: str) -> str:
    return "int8" if weights == "int4" else weights


# --- Launches --------------------------------------------------------------------------------------------------------
VOCAB_TILE = 8192  # cuda_model.cpp
QUANT_ROWS = 64  # of a block, at most: quant_linear.cu
CHUNK_KEYS, SPLIT_UNITS, FILL = 256, 8192, 96  # attention.cu


@dataclass(frozen=True)
class Launch:
    name: str  # as given to cu::launch
    count: int  # per step
    part: str  # whose weights these are, or "K, V" or "activations"
    dram: float = 0.0  # bytes of one launch
    l2: float = 0.0  # bytes that L2 serves beside those
    trips: int = 0  # dependent accesses beyond those of any kernel
    kind: str = "kernel"  # "gemm", "library": of cuBLASLt's own
    flops: float = 0.0
    limits: dict = field(default_factory=dict)  # other bounds: reason -> seconds, of one launch


@dataclass(frozen=True)
class Case:
    model: Model
    weights: str  # bf16, int8, int4; none: of `dtype`
    keys: int
    rows: int = 32
    reads: int = 32
    dtype: str = "bf16"
    gpu: Gpu = H100
    assumed: Assumptions = Assumptions()


# Issue slots (lanes x instructions) per weight in the main loop, counted in the SASS: rows, tiles -> sm_80 and sm_89,
# sm_90.
SLOTS = {
    ("int8", 8, 1): (5.8, 6.5),
    ("int8", 8, 2): (2.1, 2.3),
    ("int8", 16, 2): (2.3, 2.4),
    ("int8", 16, 4): (2.0, 2.1),
    ("int8", 32, 2): (2.8, 2.9),
    ("int8", 32, 4): (2.4, 2.5),
    ("int8", 64, 2): (3.8, 3.8),
    ("int4", 8, 1): (4.1, 4.6),
    ("int4", 8, 2): (3.4, 3.6),
    ("int4", 16, 2): (3.8, 4.2),
    ("int4", 16, 4): (3.4, 3.6),
    ("int4", 32, 2): (4.6, 4.9),
    ("int4", 32, 4): (4.0, 4.2),
    ("int4", 64, 2): (6.2, 6.4),
}


def quant_shape(rows: int, n: int) -> tuple[int, int]:
    """Rows and tiles of the instantiation (launch_16_bit of quant_linear.cu)."""
    height = next(h for h in (8, 16, 32, 64) if rows <= h or h == QUANT_ROWS)
    if height == 64:
        return 64, 2
    small, enough = (1, 264) if height == 8 else (2, 96)
    return height, 2 * small if n >= enough * 64 * small else small


def resident_blocks(kernel: str, arch: int) -> int:
    """From the table that check_sass.py writes."""
    line = next(x for x in KERNELS.read_text().splitlines() if x.startswith(f"| `{kernel}` "))
    blocks = [int(x) for x in line.strip(" |").split("|")[-1].split()]
    return blocks[(80, 86, 89, 90, 100, 120).index(arch)] if len(blocks) > 1 else blocks[0]


def quant_limits(case: Case, weights: str, n: int, k: int, rows: int) -> tuple[int, dict]:
    """Blocks; what bounds them but bytes. The busiest multiprocessor counts: blocks are few."""
    height, tiles = quant_shape(rows, n)
    gpu, features = case.gpu, 32 * tiles
    blocks = -(-n // features) * -(-rows // height)
    on_busiest = blocks / gpu.sms if case.assumed.quant_fills else -(-blocks // gpu.sms)
    slots = SLOTS[weights, height, tiles][gpu.arch >= 90]
    tile_bytes = 1024 if weights == "int8" else 544
    stage = height * 512 + 8 * tiles * tile_bytes
    in_flight = (min(4, 99 * 1024 // stage) - 1) * 8 * tiles * tile_bytes  # weights, of a block
    kernel = f"quant_linear_kernel<bf16, {'I8' if weights == 'int8' else 'I4'}, {height}, {tiles}>"
    at_once = min(resident_blocks(kernel, gpu.arch), max(1, on_busiest))
    of_block = weight_bytes(weights, min(features, n), k)
    return blocks, {
        "instructions": on_busiest * features * k * slots / (128 * gpu.clock),
        "too little in flight": on_busiest * of_block * case.assumed.latency / (at_once * in_flight),
    }


def linear(case: Case, part: str, weights: str, n: int, k: int, rows: int, count: int, adds: bool = False) -> list:
    """x W^T (CudaModel::linear and head_tile), `count` times a step."""
    outputs = (8 if adds else 4) * rows * n
    if weights in ("bf16", "none"):
        blocks = -(-n // (128 if n >= 128 * case.gpu.sms else 64))
        gemm = Launch("dense_linear", count, part, weight_bytes(weights, n, k), blocks * rows * k * 2 + outputs)
        gemm = replace(gemm, kind="gemm", flops=2 * rows * n * k)
        splits = case.gpu.sms // blocks  # along K, lest multiprocessors idle; its own kernel adds them up
        if splits < 2:
            return [gemm]
        partial = 4 * rows * n * splits
        return [
            replace(gemm, l2=gemm.l2 - outputs + partial),
            Launch("split-K sums", count, "activations", l2=partial + outputs, kind="library"),
        ]
    name = f"quant_linear_{weights.replace('nt', '')}" + ("_f32" if case.dtype == "fp32" else "")
    if case.dtype == "fp32":  # counted, not predicted
        return [Launch(name, count, part)]
    blocks, limits = quant_limits(case, weights, n, k, rows)
    dram = weight_bytes(weights, n, k) * -(-rows // QUANT_ROWS)  # anew for each 64 rows
    return [Launch(name, count, part, dram, blocks * min(rows, QUANT_ROWS) * k * 2 + outputs, limits=limits)]


def attention(case: Case) -> list[Launch]:
    """launch_attention of attention.cu, and attention_combine where keys are split."""
    m, rows, keys = case.model, case.rows, case.keys
    group = m.heads // m.kv_heads
    split = case.dtype != "fp32" and keys > CHUNK_KEYS and rows * m.heads <= SPLIT_UNITS
    chunks = -(-keys // CHUNK_KEYS) if split else 1
    units = rows * group

    def fits(height: int) -> bool:
        return units > height / 2 and -(-units // height) * m.kv_heads * chunks >= FILL

    all_chunks = not split and keys > CHUNK_KEYS
    height = 64 if all_chunks else next((h for h in (64, 32) if fits(h)), 16)
    tiles = -(-units // height)
    read = 2 * keys * m.kv * 2
    partial = 4 * (m.head_dim + 2) * rows * m.heads * chunks
    out = 2 * rows * m.q
    # A warp goes through its keys alone: 16 units x 64 keys are head_dim / 2 mma of Q K^T, and as many of P V.
    mma = -(-min(keys, CHUNK_KEYS if split else keys) // 64) * m.head_dim
    resident = (
        resident_blocks(f"attention_tile<bf16, {m.head_dim}, {height // 16}, {str(all_chunks).lower()}>", case.gpu.arch)
        if case.dtype != "fp32" and m.head_dim in (64, 128)
        else 1
    )
    waves = -(-tiles * m.kv_heads * chunks // (case.gpu.sms * resident))
    warps = {"one warp's instructions": waves * mma * case.assumed.mma_clocks / case.gpu.clock}
    first = Launch(
        "attention", m.layers, "K, V", read, read * (tiles - 1) + out + (partial if split else out), 2, limits=warps
    )
    return [first, Launch("attention_combine", m.layers, "activations", l2=partial + out)] if split else [first]


def launches(case: Case) -> list[Launch]:
    """A step in which every row is computed in every layer: no cache, prefix or dual cache."""
    m, w, rows, reads = case.model, case.weights, case.rows, case.reads
    columns = m.q + 2 * m.kv

    def rows_of(n: int) -> int:  # fp32
        return 4 * rows * n

    norm = Launch("rms_norm", m.layers, "activations", l2=rows_of(m.d) * 1.5)
    result = [
        Launch("plan", 1, "activations", trips=16),
        Launch("pack", 1, "activations", trips=8),
        Launch("embedding", 1, "activations", dram=2 * rows * m.d, l2=rows_of(m.d)),
        norm,
        *linear(case, "layers", w, columns, m.d, rows, m.layers),
        Launch("rope_kv_write", m.layers, "activations", l2=rows_of(columns) * 1.5),
        *attention(case),
        *linear(case, "layers", w, m.d, m.q, rows, m.layers, adds=True),
        norm,
        *linear(case, "layers", w, 2 * m.mlp, m.d, rows, m.layers),
        Launch("silu_mul", m.layers, "activations", l2=rows_of(2 * m.mlp) + 2 * rows * m.mlp),
        *linear(case, "layers", w, m.d, m.mlp, rows, m.layers, adds=True),
        Launch("rms_norm", 1, "activations", l2=6 * reads * m.d),
        Launch("commit", 1, "activations", trips=24),
    ]
    # LM head: a GEMM and the rows' statistics for each tile of the vocabulary. fp64: two conversions, an addition and
    # a multiply-add per logit, two sums over the block of ten rounds.
    fp64 = VOCAB_TILE * 4 + 2 * 10 * 1024
    in_fp64 = {"fp64 sums": -(-reads // case.gpu.sms) * fp64 / case.gpu.fp64 / case.gpu.clock}
    for n, count in ((VOCAB_TILE, m.vocab // VOCAB_TILE), (m.vocab % VOCAB_TILE, 1)):
        if n and count:
            result += linear(case, "LM head", head_weights(w), n, m.d, reads, count)
            result.append(Launch("row_stats_tile", count, "activations", l2=4 * reads * n, trips=4, limits=in_fp64))
    return result


def counts(step: Iterable[Launch]) -> Counter:
    """By name, of what the engine itself launches."""
    result = Counter()
    for x in step:
        if x.kind != "library":
            result[x.name] += x.count
    return result


# --- Time ------------------------------------------------------------------------------------------------------------
@dataclass
class Prediction:
    case: Case
    floor: float  # seconds: weights once, nominal bandwidth
    parts: Counter  # seconds by what they go to
    by_launch: dict  # name -> [count, seconds, reason]
    launches: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def predict(case: Case) -> Prediction:
    gpu, a = case.gpu, case.assumed
    parts, by_launch, weights, number = Counter(), {}, 0.0, 0
    for x in launches(case):
        bounds = {
            "bytes": x.dram / (gpu.dram * a.dram_fraction),
            "L2": (x.dram + x.l2) / gpu.l2,
            "tensor cores": x.flops / (gpu.tensor * a.tensor_fraction),
            **x.limits,
        }
        reason = max(bounds, key=bounds.get)
        fixed = (a.fixed + x.trips * a.trip) * a.launches
        parts[x.part] += x.count * (bounds["bytes"] if x.dram else bounds["L2"])
        if reason != "bytes" and x.dram:
            parts["waits"] += x.count * (bounds[reason] - bounds["bytes"])
        parts["launches"] += x.count * fixed
        if x.part in ("layers", "LM head"):
            weights += x.count * x.dram
        number += x.count
        key = (x.name, x.part, reason)
        old = by_launch.get(key, (0, 0.0))
        by_launch[key] = (old[0] + x.count, old[1] + x.count * (bounds[reason] + fixed))
    parts["launches"] += a.graph
    return Prediction(case, weights / gpu.dram, parts, by_launch, number)


# --- Document --------------------------------------------------------------------------------------------------------
PARTS = ["layers", "LM head", "K, V", "activations", "waits", "launches"]
TARGETS = {"bf16": 6.5, "int8": 4.0, "int4": 2.5}  # ms per forward on an H100
PUBLISHED = 18.0  # ms per forward of a dense model of this size on an H100, the best that was found
NEVER_RUN = "**On paper; never run on a GPU.**"


def table(header: list[str], lines: list[list[str]]) -> str:
    align = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *lines)) + "\n"


def ms(seconds: float, digits: int = 2) -> str:
    return f"{seconds * 1e3:.{digits}f}"


def assumptions_text() -> str:
    a = Assumptions()
    gpus = [
        [g.name, f"{g.dram / 1e12:.2f}", f"{g.l2 / 1e12:.1f}", str(g.sms), f"{g.clock / 1e9:.2f}",
         f"{g.tensor / 1e12:.0f}", str(g.fp64)]
        for g in GPUS
    ]  # fmt: skip
    assumed = [
        ["achievable share of nominal DRAM bandwidth", f"{a.dram_fraction:.0%} (below also 80 and 92 %)"],
        ["fixed cost of a launch within a graph, end of one kernel to bytes of the next", f"{a.fixed * 1e6:.0f} µs"],
        ["between graphs: two small copies and the next graph's start", f"{a.graph * 1e6:.0f} µs"],
        ["each dependent access with its barrier beyond the first few (plan, pack, commit, statistics)",
         f"{a.trip * 1e6:.1f} µs"],
        ["DRAM latency under load, which bounds what a multiprocessor can have in flight", f"{a.latency * 1e6:.1f} µs"],
        ["share of the tensor cores' peak in a GEMM", f"{a.tensor_fraction:.0%}"],
        ["clocks per mma of a warp in attention, softmax included", f"{a.mma_clocks:.0f}"],
        ["activations, partial sums and logits tiles", "served by L2"],
        ["cuBLASLt", "tiles of 128 or 64 outputs; split-K, with a kernel of its own, where half the device would idle"],
    ]  # fmt: skip
    return (
        "## Assumptions\n\n"
        + table(["GPU", "DRAM TB/s", "L2 TB/s (assumed)", "SMs", "GHz", "bf16 TFLOPS", "fp64 per clock, SM"], gpus)
        + "\n"
        + table(["assumed", "value"], assumed)
    )


def prediction_text(name: str, model: Model) -> str:
    lines, shares = [], []
    for gpu in GPUS:
        for weights in TARGETS:
            for keys in (512, 1024):
                p = predict(Case(model, weights, keys, gpu=gpu))
                low, high = (
                    predict(replace(p.case, assumed=Assumptions(dram_fraction=f))).seconds for f in (0.92, 0.80)
                )
                target = published = ""
                if gpu is H100:
                    missed = p.seconds * 1e3 > TARGETS[weights]
                    target = f"{TARGETS[weights]} {'missed' if missed else 'met'}"
                    published = f"{PUBLISHED:.0f}" if weights == "bf16" else ""
                first = [gpu.name, weights, str(keys)]
                lines.append([*first, ms(p.floor), ms(p.seconds), f"{ms(low)} to {ms(high)}",
                              f"{p.floor / p.seconds:.0%}", target, published])  # fmt: skip
                shares.append([*first, str(p.launches), *(f"{p.parts[x] / p.seconds:.0%}" for x in PARTS)])
    header = ["GPU", "weights", "canvas"]
    return (
        f"## {name}: ms per forward of 32 rows\n\n{NEVER_RUN} Dual cache, batch 1, LM head for 32 rows; with int4 the "
        "LM head is int8. Floor: all weights but the embedding once, at nominal bandwidth.\n\n"
        + table(
            [*header, "floor", "predicted", "at 92 to 80 % of DRAM", "floor ÷ predicted", "target", "published"], lines
        )
        + f"\n### {name}: where it goes\n\nWaits: beyond the bytes' time, because instructions, L2 or the bytes in "
        "flight bound a launch. Launches: fixed costs and dependent accesses.\n\n"
        + table(
            [*header, "launches", "weights of layers", "LM head", "K, V", "activations", "waits", "launches"], shares
        )
    )


def launches_text(name: str, model: Model) -> str:
    text = f"## {name} on an H100, launch by launch\n\n{NEVER_RUN} Canvas 512.\n"
    for weights in TARGETS:
        p = predict(Case(model, weights, 512))
        lines = [
            [
                launch,
                part,
                str(count),
                ms(seconds, 3),
                f"{seconds / count * 1e6:.1f}",
                reason if reason != "bytes" else "DRAM",
            ]
            for (launch, part, reason), (count, seconds) in sorted(p.by_launch.items(), key=lambda x: -x[1][1])
        ]
        text += f"\n### {weights}\n\n" + table(["launch", "reads", "number", "ms", "µs each", "bound by"], lines)
    return text


CHANGES: list[tuple[str, dict]] = [
    ("as it is", {}),
    ("1 µs instead of 2 per launch", {"fixed": 1e-6}),
    ("half as many launches", {"launches": 0.5}),
    ("92 % of DRAM bandwidth", {"dram_fraction": 0.92}),
    ("quantised products spread evenly over all SMs", {"quant_fills": True}),
    ("the latter, and 1 µs per launch", {"quant_fills": True, "fixed": 1e-6}),
    ("the latter, and 92 %", {"quant_fills": True, "fixed": 1e-6, "dram_fraction": 0.92}),
]


def changes_text(models: dict[str, Model]) -> str:
    lines = []
    for what, changed in CHANGES:
        cells = [what]
        for model in models.values():
            for weights, target in TARGETS.items():
                seconds = predict(Case(model, weights, 512, assumed=replace(Assumptions(), **changed))).seconds
                cells.append(f"**{ms(seconds)}**" if seconds * 1e3 > target else ms(seconds))
        lines.append(cells)
    header = ["H100, canvas 512, ms"] + [f"{name} {w} (≤ {t})" for name in models for w, t in TARGETS.items()]
    return f"## What would have to change\n\n{NEVER_RUN} Bold: above the target.\n\n" + table(header, lines)


def document(models: dict[str, Model]) -> str:
    title = f"# Predicted time per forward on GPUs\n\n{NEVER_RUN} Written by `benchmarks/cuda_prediction.py`.\n"
    sections = [assumptions_text(), *(prediction_text(n, m) for n, m in models.items()), changes_text(models)]
    sections += [launches_text(n, m) for n, m in models.items()]
    return "\n".join([title, *sections])


# --- The list against the emulated engine ----------------------------------------------------------------------------
def compare(expected: Counter, ran: list) -> list[str]:
    """`ran`: [name, kind] of everything that one emulated step did; copies are not compared."""
    actual = Counter(name for name, kind in ran if not re.match("copy|fill", kind))
    return [
        f"{name}: {actual[name]} launched, {expected[name]} listed"
        for name in sorted(expected | actual)
        if actual[name] != expected[name]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llada", type=Path, help="config.json of LLaDA-8B")
    parser.add_argument("--dream", type=Path, help="config.json of Dream-7B")
    parser.add_argument("--launches", type=Path, help="JSON list of [name, kind] of one step, to hold the list against")
    parser.add_argument("--config", type=Path, help="config.json of the model that made it")
    parser.add_argument("--layers", type=int, help="instead of the config's")
    parser.add_argument("--weights", choices=["none", "int8", "int4"], default="none")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rows", type=int, default=32, help="capacity of the step")
    parser.add_argument("--reads", type=int, help="capacity of the LM head's rows (default: --rows)")
    parser.add_argument("--keys", type=int, default=512, help="of the longest sequence")
    args = parser.parse_args()
    if args.launches:
        model = Model.read(args.config)
        model = replace(model, layers=args.layers or model.layers)
        case = Case(model, args.weights, args.keys, args.rows, args.reads or args.rows, args.dtype)
        problems = compare(counts(launches(case)), json.loads(args.launches.read_text()))
        print("\n".join(problems) or "the launches are those listed")
        return 1 if problems else 0
    if not (args.llada and args.dream):
        parser.error("--llada and --dream, or --launches")
    OUT.write_text(document({"LLaDA-8B": Model.read(args.llada), "Dream-7B": Model.read(args.dream)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
