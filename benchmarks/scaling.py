"""How much faster a step is with more threads.

    python benchmarks/scaling.py --folder weights                      # 1.0 B LLaDA shape, 1 and 2 threads
    python benchmarks/scaling.py --threads 1 2 4 8 --rows 32 320

Thread counts take turns within each repeat; the ratio is taken repeat by repeat against the first count.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from peers.engine import LOAD
from random_model import SHAPES, write_llada

from dllm_ext import _C, Engine


def measure(engine, rows, args):
    """threads -> median seconds of a step, one per repeat."""
    seconds = {n: [] for n in args.threads}
    for _ in range(args.repeats):
        for threads in args.threads:
            torch.set_num_threads(threads)
            steps = _C.ops.time_steps(engine._native, rows, args.keys, args.calls)
            seconds[threads].append(statistics.median(steps))
    return seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="llada-1b", choices=list(SHAPES))
    p.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where random weights are kept")
    p.add_argument("--precisions", nargs="+", choices=list(LOAD), default=["bfloat16", "int8", "int4"])
    p.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    p.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 320])
    p.add_argument("--keys", type=int, default=320)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--calls", type=int, default=3, help="steps per turn; the turn's time is their median")
    args = p.parse_args()
    folder = write_llada(args.folder, args.model)
    first = args.threads[0]
    print("| precision | rows | " + " | ".join(f"{n} threads" for n in args.threads) + " | speed-up (min–max) |")
    print("| --- | ---: |" + " ---: |" * (len(args.threads) + 1))
    for precision in args.precisions:
        engine = Engine.from_pretrained(folder, **LOAD[precision])
        for rows in args.rows:
            seconds = measure(engine, rows, args)
            times = [f"{1e3 * statistics.median(seconds[n]):.1f} ms" for n in args.threads]
            ratios = [a / b for a, b in zip(seconds[first], seconds[args.threads[-1]], strict=True)]
            gain = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            print(f"| {precision} | {rows} | " + " | ".join(times) + f" | {gain} |", flush=True)


if __name__ == "__main__":
    main()
