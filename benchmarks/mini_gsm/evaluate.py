"""Exact match of mini-llada (or any model of the same task) on held-out problems, decoded by the project's engine.

    python evaluate.py                                    # the standard table: 1 2 4 8 tokens a step, thresholds
    python evaluate.py --settings k=1 t=0.9/dual -n 1000  # chosen settings
    python evaluate.py --json result.json

A setting is `k=TOKENS_PER_STEP` or `t=THRESHOLD`, with `/CACHE` behind it for a cache (none, prefix, dual, ...). The
first one is the baseline: every other is compared with it problem by problem. The standard error of such a paired
difference is smaller than that of the difference of two independent accuracies, because most problems come out the
same both times.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data import Problem, final_answer, held_out
from tqdm import tqdm

STANDARD = ["k=1", "k=2", "k=4", "k=8", "t=0.95", "t=0.9", "t=0.7", "t=0.5", "t=0.9/prefix", "t=0.9/dual"]


@dataclass(frozen=True)
class Row:
    """One line of the table. Standard errors are of the mean over problems."""

    setting: str
    problems: int
    accuracy: float
    accuracy_error: float
    difference: float
    difference_error: float
    nfe: float
    nfe_saved: float
    seconds: float


def decoding_fields(setting: str) -> dict:
    """The `generate()` fields that a setting such as "k=4" or "t=0.9/dual" stands for."""
    decoder, _, cache = setting.partition("/")
    kind, _, value = decoder.partition("=")
    try:
        fields = {"k": lambda: {"num_transfer_tokens": int(value)}, "t": lambda: {"threshold": float(value)}}[kind]()
    except (KeyError, ValueError):
        raise SystemExit(f"setting {setting!r}: expected k=INTEGER or t=NUMBER, then /CACHE if wanted") from None
    return {**fields, "cache": cache or "none"}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def decode(engine, problems: list[Problem], setting: str, options: argparse.Namespace) -> tuple[list, float]:
    """Every problem through `generate()`, in small groups so that progress can be shown; results and seconds."""
    fields = {"gen_length": options.gen_length, "block_length": options.block_length, **decoding_fields(setting)}
    results, began = [], time.perf_counter()
    with tqdm(total=len(problems), desc=setting, unit="problem", leave=False) as bar:
        for start in range(0, len(problems), options.batch_size):
            group = [problem.question for problem in problems[start : start + options.batch_size]]
            results += engine.generate(group, batch_size=options.batch_size, **fields)
            bar.update(len(group))
    return results, time.perf_counter() - began


def compare(
    settings: list[str], engine, problems: list[Problem], options: argparse.Namespace
) -> tuple[list[Row], dict]:
    """The rows of the table, and for each setting the accuracy within each family of problems."""
    rows, by_family, baseline = [], {}, None
    for setting in settings:
        results, seconds = decode(engine, problems, setting, options)
        right = [
            float(final_answer(result.text) == final_answer(problem.answer))
            for result, problem in zip(results, problems, strict=True)
        ]
        nfe = sum(result.nfe for result in results) / len(results)
        baseline = baseline or (right, nfe)
        accuracy, accuracy_error = mean_and_error(right)
        paired = [mine - its for mine, its in zip(right, baseline[0], strict=True)]
        difference, difference_error = mean_and_error(paired)
        saved = 1 - nfe / baseline[1]
        rows.append(
            Row(setting, len(right), accuracy, accuracy_error, difference, difference_error, nfe, saved, seconds)
        )
        families = sorted({problem.family for problem in problems})
        hits = {name: [ok for ok, p in zip(right, problems, strict=True) if p.family == name] for name in families}
        by_family[setting] = {name: round(sum(found) / len(found), 4) for name, found in hits.items()}
        tqdm.write(f"{setting}: {accuracy:.1%} ± {accuracy_error:.1%}, {nfe:.1f} evaluations, {seconds:.0f} s")
    return rows, by_family


def markdown(rows: list[Row]) -> str:
    """The table, differences in percentage points against the first row."""
    lines = [
        "| decoding | exact match | against the first, paired | NFE | NFE saved |",
        "| --- | --- | --- | --- | --- |",
    ]
    for index, row in enumerate(rows):
        paired = f"{100 * row.difference:+.1f} ± {100 * row.difference_error:.1f}" if index else "–"
        saved = f"{row.nfe_saved:.0%}" if index else "–"
        accuracy = f"{100 * row.accuracy:.1f} ± {100 * row.accuracy_error:.1f} %"
        lines.append(f"| {row.setting} | {accuracy} | {paired} | {row.nfe:.1f} | {saved} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match on held-out word problems, by the project's engine.")
    parser.add_argument("--model", default="mini-llada", help="bundled name or folder")
    parser.add_argument("-n", "--problems", type=int, default=500, help="how many held-out problems")
    parser.add_argument("--seed", type=int, default=4242, help="which held-out problems")
    parser.add_argument("--settings", nargs="+", default=STANDARD, help="k=INTEGER or t=NUMBER, each with /CACHE")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--json", type=Path, help="write rows and accuracies by family to this file")
    options = parser.parse_args()
    for setting in options.settings:
        decoding_fields(setting)

    from dllm_ext import Engine  # only now: wrong arguments are told without loading anything

    engine = Engine.from_pretrained(options.model, dtype=options.dtype)
    problems = held_out(options.problems, options.seed)
    rows, by_family = compare(options.settings, engine, problems, options)
    print(
        f"\n{len(problems)} held-out problems, gen_length {options.gen_length}, block_length {options.block_length}\n"
    )
    print(markdown(rows))
    if options.json:
        content = {
            "model": options.model,
            "dtype": engine.dtype,
            "gen_length": options.gen_length,
            "block_length": options.block_length,
            "seed": options.seed,
            "rows": [asdict(row) for row in rows],
            "by_family": by_family,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
