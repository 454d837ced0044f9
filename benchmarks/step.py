"""ms per forward and tokens per second of dual-cache generation, against PyTorch in the same run.

    python benchmarks/step.py                        # mini-llada and the 1.0 B LLaDA shape, fp32 and bf16
    python benchmarks/step.py --models llada-1b --dtypes bfloat16 --repeats 5

Every repeat runs the engine and the torch programs one after the other (so that a drift of the machine's speed hits
all of them); ratios are taken repeat by repeat. Reported: median ms of the full steps (all rows) and of the cached
steps (the block's rows), tokens per second (generated tokens / wall seconds of the whole generation), and each torch
program's time divided by the engine's: above 1 the engine is faster. Prints a Markdown table; --json writes the raw
numbers.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from random_model import SHAPES, write_llada
from torch_baseline import TorchLLaDA
from tqdm import tqdm

from dllm_ext import Engine

MINI = Path(__file__).resolve().parent.parent / "dllm_ext" / "models" / "mini-llada"


def run_engine(engine, prompt, args):
    begin = time.perf_counter()
    r = engine.generate(
        prompt,
        gen_length=args.gen_length,
        block_length=args.block_length,
        num_transfer_tokens=args.per_step,
        cache="dual",
        stop_at_eos=False,
    )
    seconds = time.perf_counter() - begin
    return r.token_ids, list(zip(r.stats.rows, r.stats.seconds, strict=True)), seconds


def run_torch(model, prompt, args):
    begin = time.perf_counter()
    tokens, steps = model.generate(prompt, args.gen_length, args.block_length, args.per_step)
    return tokens, steps, time.perf_counter() - begin


def median_ms(runs, rows):
    times = [1e3 * s for _, steps, _ in runs for r, s in steps if r == rows]
    return statistics.median(times)


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def measure(name, dtype, args):
    folder = MINI if name == "mini-llada" else write_llada(args.folder, name)
    programs = {
        "engine": (run_engine, Engine.from_pretrained(folder, dtype=dtype)),
        "torch": (run_torch, TorchLLaDA(folder, getattr(torch, dtype))),
        "torch prepacked": (run_torch, TorchLLaDA(folder, getattr(torch, dtype), prepack=True)),
    }
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(4, vocab - 4, (args.prompt_length,), generator=generator).tolist()
    runs = {p: [] for p in programs}
    for repeat in tqdm(range(args.repeats + 1), desc=f"{name} {dtype}", leave=False):
        for program, (run, model) in programs.items():
            result = run(model, prompt, args)
            if repeat:  # the first is the warm-up
                runs[program].append(result)
    total = args.prompt_length + args.gen_length
    rows = []
    for program in programs:
        seconds = [r[2] for r in runs[program]]
        ratios = [s / e[2] for s, e in zip(seconds, runs["engine"], strict=True)]
        rows.append(
            {
                "model": name,
                "dtype": dtype,
                "program": program,
                "full_ms": median_ms(runs[program], total),
                "block_ms": median_ms(runs[program], args.block_length),
                "tokens_per_second": args.gen_length / statistics.median(seconds),
                "slower_than_engine": ratios,
                "same_tokens": sum(a == b for a, b in zip(runs[program][0][0], runs["engine"][0][0], strict=True)),
            }
        )
    return rows


def table(rows, args):
    total = args.prompt_length + args.gen_length
    lines = [
        f"| model | dtype | program | ms, {total} rows | ms, {args.block_length} rows | tokens/s | time ÷ engine's "
        "(min–max) | equal tokens |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['dtype']} | {r['program']} | {r['full_ms']:.2f} | {r['block_ms']:.2f} | "
            f"{r['tokens_per_second']:.1f} | {spread(r['slower_than_engine'])} | "
            f"{r['same_tokens']} of {args.gen_length} |"
        )
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["mini-llada", *SHAPES], choices=["mini-llada", *SHAPES])
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    p.add_argument("--prompt-length", type=int, default=256)
    p.add_argument("--gen-length", type=int, default=64)
    p.add_argument("--block-length", type=int, default=32)
    p.add_argument("--per-step", type=int, default=2, help="tokens committed at each step")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, help="default: torch's")
    p.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where random weights are kept")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [row for m in args.models for t in args.dtypes for row in measure(m, t, args)]
    print(
        f"{torch.get_num_threads()} threads, prompt {args.prompt_length}, {args.per_step} tokens per step, dual cache"
    )
    print(table(rows, args))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
