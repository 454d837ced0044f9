"""Accuracy against speed over caches, decoders, thresholds and blocks: run the sweep, and draw it.

    python benchmarks/pareto.py -n 2000 --out docs/pareto       # the grid of sweep/grid.py; goes on where it was killed
    python benchmarks/pareto.py --draw-only --out docs/pareto   # figure, page and table again, from the raw data
    python benchmarks/pareto.py --draw-only --clock cpu --out docs/pareto   # without the times it waited for a core
    python benchmarks/pareto.py --settings published 'dual/*' dual/24/t=0.85 -n 200 --out some
    python benchmarks/pareto.py --model GSAI-ML/LLaDA-8B-Instruct --dtype bfloat16 --task gsm8k --out llada
    python benchmarks/pareto.py --list                          # the settings of the grid

One prompt per call: tokens/s and latency are those of a single user. How settings are written is in sweep/grid.py, what
a run is in sweep/run.py, and what the numbers and their errors are in sweep/numbers.py.
"""

import argparse
import shlex
import sys
from pathlib import Path


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-llada", help="bundled name, folder or Hugging Face id")
    parser.add_argument("--task", default="mini-gsm", help="or one of configs/tasks.yaml")
    parser.add_argument("--data", help="file or folder of the task's data, where they are not in the hub's cache")
    parser.add_argument("--settings", nargs="+", help="names, patterns, or 'published'; all of the grid by default")
    parser.add_argument("-n", "--problems", type=positive, default=200)
    parser.add_argument("--per-round", type=positive, default=20, help="problems of a round")
    parser.add_argument("--gen-length", type=positive, help="the task's if not given")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", choices=["int8", "int4"])
    parser.add_argument("--threads", type=positive, help="of the CPU; torch's default if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the turns")
    parser.add_argument("--out", type=Path, required="--list" not in (arguments or sys.argv), help="folder")
    parser.add_argument("--draw-only", action="store_true", help="draw what the folder holds, finished or not")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="draw tokens per second or CPU second")
    parser.add_argument("--list", action="store_true", help="print the settings of the grid")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, command: str) -> None:
    """Run what is not in the folder yet."""
    import torch
    from sweep import raw, run, settings, tasks

    from dllm_ext import Engine

    gen_length = options.gen_length or tasks.gen_length(options.task)
    chosen = settings.chosen(options.settings, gen_length)
    if options.threads:
        torch.set_num_threads(options.threads)
    engine = Engine.from_pretrained(options.model, dtype=options.dtype, quantization=options.quantization)
    task = tasks.load(options.task, options.problems, options.data, engine.tokenizer)
    plan = raw.Plan(
        model=engine.folder.name,
        task=options.task,
        metric=task.metric,
        problems=len(task.examples),
        per_round=options.per_round,
        gen_length=gen_length,
        dtype=engine.dtype,
        quantization=engine.quantization,
        threads=torch.get_num_threads(),
        seed=options.seed,
        settings=[setting.name for setting in chosen],
    )
    run.run(engine, task, chosen, plan, options.out, command)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    try:
        from sweep import draw, grid, raw
    except ModuleNotFoundError as e:  # now, and not after the measurements
        raise SystemExit(f"error: {e} (pip install -e '.[eval]')") from None

    if options.list:
        for name in grid.GRID:
            print(f"{name:36} {grid.PUBLISHED.get(name, '')}".rstrip())
        return
    try:
        if not options.draw_only:
            given = sys.argv[1:] if arguments is None else arguments
            measure(options, shlex.join(["python", "benchmarks/pareto.py", *given]))
        draw.all_of(options.out, options.clock)
    except (raw.RunError, ValueError) as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
