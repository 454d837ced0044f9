"""What a step costs with each cache: rows, milliseconds, and the time spent choosing rows.

    python benchmarks/caches.py                       # the 1.0 B LLaDA shape, prompt 744, 256 tokens, blocks of 32
    python benchmarks/caches.py --model mini-llada --prompt-length 200 --gen-length 128
    python benchmarks/caches.py --dtypes bfloat16 --repeats 2

One token per step, so that every cache takes the same steps (only none, whose steps are all alike, takes four). The
caches take turns. "rows" are those that a layer computed, averaged over layers and steps; "model" is what the published
cost model predicts for them: T = P + G positions, S the block, s its start, N layers:

    none    T
    prefix  mean over steps of T - s, and T at the first step of a block
    dual    S, and T at the first step of a block
    dllm    G / N (layer 0) + (1 - 1/kr) rou G + G / kr + P / kp        the V-only rows are listed by themselves
    d2      current_k masked + 1 just decoded + nucleus and inflation (measured), T at step 0

The second table compares d2 with dual at the same number of rows and (nearly) of logits rows: what attention rollout
and selection add to a step.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from random_model import SHAPES, write_llada
from tqdm import tqdm

from dllm_ext import D2Cache, DLLMCache, DualCache, Engine, NoCache, PrefixCache

MINI = Path(__file__).resolve().parent.parent / "dllm_ext" / "models" / "mini-llada"


def policies(args):
    """Name -> generate() fields; `whole` is the one-block form that the d2Cache paper measures."""
    one = {"num_transfer_tokens": 1, "block_length": args.block_length}
    return {
        "none": {"num_transfer_tokens": -(-args.gen_length // 4), "block_length": args.gen_length, "cache": NoCache()},
        "prefix": {**one, "cache": PrefixCache()},
        "dual": {**one, "cache": DualCache()},
        "dllm 50, 2": {**one, "cache": DLLMCache(kp=50, kr=2, rou=0.25)},
        "dllm 50, 7": {**one, "cache": DLLMCache(kp=50, kr=7, rou=0.25)},
        "d2": {**one, "cache": D2Cache()},
        "d2, one block": {**one, "block_length": args.gen_length, "cache": D2Cache(inflate_w=0)},
    }


def predicted_rows(name, args, layers):
    """The cost model above; None where it needs a measurement."""
    prompt, gen, block = args.prompt_length, args.gen_length, args.block_length
    total = prompt + gen
    if name == "none":
        return total
    if name in ("prefix", "dual"):
        rows = 0
        for start in range(0, gen, block):
            size = min(block, gen - start)
            rows += total + (size - 1) * (gen - start if name == "prefix" else block)
        return rows / gen
    if name.startswith("dllm"):
        kr = int(name.rpartition(" ")[2])
        return gen / layers + (1 - 1 / layers) * (gen / kr + (1 - 1 / kr) * 0.25 * gen) + prompt / 50
    return None


def generate(engine, prompt, args, fields):
    return engine.generate(prompt, gen_length=args.gen_length, stop_at_eos=False, **fields).stats


def table(engine, prompt, args):
    """Rows of the first table."""
    chosen = policies(args)
    runs = {name: [] for name in chosen}
    for _ in tqdm(range(args.repeats), desc=f"{engine.dtype} caches", leave=False):
        for name, fields in chosen.items():
            runs[name].append(generate(engine, prompt, args, fields))
    layers, out = engine.spec.n_layers, []
    for name, stats in runs.items():
        cheap = [r < args.prompt_length + args.gen_length for r in stats[0].rows]
        later = [x for s in stats for x, c in zip(s.seconds, cheap, strict=True) if c]
        selection = [sum(s.selection_seconds) / sum(s.seconds) for s in stats]
        steps = len(stats[0].rows)
        out.append(
            {
                "dtype": engine.dtype,
                "cache": name,
                "rows": sum(stats[0].layer_rows) / layers / steps,
                "model": predicted_rows(name, args, layers),
                "verify_rows": sum(stats[0].verify_rows) / layers / steps,
                "logit_rows": sum(stats[0].logit_rows) / steps,
                "ms": 1e3 * statistics.median(sum(s.seconds) / steps for s in stats),
                "ms_cached": 1e3 * statistics.median(later) if later else None,
                "selection": statistics.median(selection),
                "tokens_per_second": statistics.median(steps / sum(s.seconds) for s in stats),  # one per step
            }
        )
    return out


def equal_rows(engine, prompt, args):
    """d2 against dual: 32 rows each, about 30 of them with logits; milliseconds by turns."""
    rows = args.block_length
    dual = {"num_transfer_tokens": 1, "block_length": rows, "cache": DualCache()}
    # current_k masked rows, the one just decoded, and the nucleus of one
    d2 = {**dual, "cache": D2Cache(current_k=rows - 2, rollout_p=0.0, inflate_w=0)}
    times = {"dual": [], "d2": []}
    for _ in tqdm(range(args.repeats), desc=f"{engine.dtype} equal rows", leave=False):
        for name, fields in (("dual", dual), ("d2", d2)):
            s = generate(engine, prompt, args, fields)
            steps = zip(s.rows, s.logit_rows, s.seconds, strict=True)
            times[name].append([1e3 * x for r, n, x in steps if r == rows and n >= rows - 4])
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(times["dual"], times["d2"], strict=True)]
    ms = {name: statistics.median(x for run in t for x in run) for name, t in times.items()}
    return {
        "dtype": engine.dtype,
        "rows": rows,
        "dual_ms": ms["dual"],
        "d2_ms": ms["d2"],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "steps": {name: sum(map(len, t)) for name, t in times.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llada-1b", choices=["mini-llada", *SHAPES])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--prompt-length", type=int, default=744)
    parser.add_argument("--gen-length", type=int, default=256)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=["table", "equal"], help="one of the two tables")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where random weights are kept"
    )
    args = parser.parse_args()
    folder = MINI if args.model == "mini-llada" else write_llada(args.folder, args.model)
    tables, equals = [], []
    for dtype in args.dtypes:
        engine = Engine.from_pretrained(folder, dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(4, engine.spec.vocab_size - 4, (args.prompt_length,), generator=generator).tolist()
        generate(engine, prompt, args, policies(args)["none"])  # warm up
        if args.only != "equal":
            tables += table(engine, prompt, args)
        if args.only != "table":
            equals.append(equal_rows(engine, prompt, args))
    print(f"{args.model}, prompt {args.prompt_length}, {args.gen_length} tokens, {torch.get_num_threads()} threads\n")
    if tables:
        print("| dtype | cache | rows | model | V only | logits | ms/step | ms cached step | selection | tokens/s |")
        print("| --- " * 10 + "|")
    for r in tables:
        cells = (
            r["dtype"],
            r["cache"],
            f"{r['rows']:.1f}",
            "–" if r["model"] is None else f"{r['model']:.1f}",
            f"{r['verify_rows']:.0f}",
            f"{r['logit_rows']:.1f}",
            f"{r['ms']:.1f}",
            "–" if r["ms_cached"] is None else f"{r['ms_cached']:.1f}",
            f"{r['selection']:.2%}",
            f"{r['tokens_per_second']:.2f}",
        )
        print("| " + " | ".join(cells) + " |")
    for e in equals:
        spread = f"{min(e['ratios']):.3f}–{max(e['ratios']):.3f}"
        print(
            f"\n{e['dtype']}, {e['rows']} rows: dual {e['dual_ms']:.1f} ms, d2 {e['d2_ms']:.1f} ms: "
            f"{e['ratio']:.3f} ({spread}, {e['steps']['dual']} and {e['steps']['d2']} steps)"
        )
    if args.json:
        args.json.write_text(json.dumps({"caches": tables, "equal_rows": equals}, indent=2) + "\n")


if __name__ == "__main__":
    main()
