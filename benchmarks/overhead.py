"""What a denoising step costs beside its arithmetic: the loop, its dispatch, waking threads, and Python.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --threads 1 4 --repeats 50

A model with next to no arithmetic (one layer, d_model 32) shows what is left: with 2 rows a step is the loop, the
choice of rows and tokens, and a dozen kernels that hardly do anything. With more threads the same steps cost more by
the parallel regions that they fork; a region with nothing in it says what one costs. "Between steps" are commits,
blocks and counters, and a 64th of what a generation takes once: its slabs. Python is the wall time of generate() less
that of the native call, for generations of one step and of 64.

Microseconds. Every generation takes the same steps: the first number is the mean over them of each one's 10th
percentile over the repeats, which other programs on the machine hardly touch; the one in parentheses is that of
medians. Prints Markdown tables.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from random_model import write_llada
from tqdm import tqdm

from dllm_ext import _C, Engine

PROMPT = list(range(4, 36))
STEPS = 64
CACHES = ("none", "prefix", "dual", "dllm", "d2")


def generate(engine, cache="dual", block_length=32, per_step=1, **kwargs):
    """(wall seconds, result) of a generation of STEPS tokens."""
    begin = time.perf_counter()
    result = engine.generate(
        PROMPT,
        gen_length=STEPS,
        block_length=block_length,
        num_transfer_tokens=per_step,
        cache=cache,
        stop_at_eos=False,
        **kwargs,
    )
    return time.perf_counter() - begin, result


def low(seconds):
    """The 10th percentile."""
    return statistics.quantiles(seconds, n=10)[0]


def summary(*series):
    """Means over the series of their 10th percentiles and, in parentheses, of their medians."""
    means = (1e6 * statistics.mean(of(seconds) for seconds in series) for of in (low, statistics.median))
    return "{:.1f} ({:.1f})".format(*means)


def steps(engine, cache, block_length, repeats):
    """(summary of the steps that are not the first of their block, of what lies between two steps, their mean rows)."""
    runs = [generate(engine, cache, block_length)[1].stats for _ in range(repeats)]
    later = [i for i in range(STEPS) if i % block_length]
    inside = summary(*([run.seconds[i] for run in runs] for i in later))
    between = summary([(run.seconds_total - sum(run.seconds)) / STEPS for run in runs])
    return inside, between, f"{statistics.mean(runs[0].rows[i] for i in later):.0f}"


def step_tables(engines, args):
    for name, engine in engines.items():
        print(f"\n{name}, microseconds per step\n")
        print("| cache | rows |" + "".join(f" threads: {n} | between steps |" for n in args.threads))
        print("| --- | ---: |" + " ---: | ---: |" * len(args.threads))
        for cache, block in [("dual", 2), *((c, 32) for c in CACHES)]:
            cells = []
            for threads in args.threads:
                torch.set_num_threads(threads)
                inside, between, rows = steps(engine, cache, block, args.repeats)
                cells += [inside, between]
            print(f"| {cache} | {rows} | " + " | ".join(cells) + " |")


def fork_table(args):
    print("| threads | a parallel region with nothing in it |\n| ---: | ---: |")
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"| {threads} | {summary(_C.ops.fork_join_seconds(10000))} |")


def python_table(engine, args):
    torch.set_num_threads(1)
    callback = {"on_step": lambda event: None}
    cases = {"one": {"per_step": STEPS, "block_length": STEPS}, "many": {}, "callback": callback}
    python, native = ({case: [] for case in cases} for _ in range(2))
    for _ in tqdm(range(10 * args.repeats), desc="Python", leave=False):
        for case, fields in cases.items():
            wall, result = generate(engine, **fields)
            python[case].append(wall - result.stats.seconds_total)
            native[case].append(result.stats.seconds_total)
    lists = (low(python["many"]) - low(python["one"])) / (STEPS - 1)
    calls = (low(native["callback"]) - low(native["many"])) / STEPS
    print("\n| Python | microseconds |\n| --- | ---: |")
    print(f"| per generate() | {summary(python['one'])} |")
    print(f"| per step, to make the lists of Stats | {1e6 * lists:.2f} |")
    print(f"| per step, for an on_step that does nothing | {1e6 * calls:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=20, help="generations of 64 steps per number")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one_layer = Engine.from_pretrained(write_llada(Path(folder), "one-layer"), dtype="float32")
    engines = {"one layer, d_model 32": one_layer, "mini-llada": Engine.from_pretrained("mini-llada", dtype="float32")}
    print(f"{_C.info()['isa']}\n")
    fork_table(args)
    step_tables(engines, args)
    python_table(one_layer, args)


if __name__ == "__main__":
    main()
