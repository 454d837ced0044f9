"""Exact match of mini-llada (or any model of the same task) on held-out problems, decoded by the project's engine.

    python evaluate.py                                    # the standard table: 1 2 4 8 tokens a step, thresholds
    python evaluate.py --settings k=1 t=0.9/dual -n 1000  # chosen settings
    python evaluate.py --settings k=1 k=1/dllm:kr=7 k=1/d2:current_k=16,block_length=64
    python evaluate.py --settings k=1 k=1@int8 k=1@int4   # quantised weights
    python evaluate.py --json result.json

A setting is `k=TOKENS_PER_STEP` or `t=THRESHOLD`, with `/CACHE` behind it for a cache (none, prefix, dual, dllm, d2)
and `:NAME=NUMBER,...` behind that for the cache's parameters or a block length of its own; `@int8` or `@int4` at the
end quantises the weights. The first one is the baseline: every other is compared with it problem by problem. The
standard error of such a paired difference is smaller than that of the difference of two independent accuracies, because
most problems come out the same both times.

The settings take turns, group of problems by group, so that a machine whose speed drifts is equally unfair to all.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data import Problem, final_answer, held_out
from tqdm import tqdm

from dllm_ext import D2Cache, DLLMCache, Engine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation.statistics import mean_and_error, paired_difference

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
    rows_per_token: float  # rows through a layer, mean over layers, per token of the text
    tokens_per_second: float
    seconds: float


def quantization_of(setting: str) -> str | None:
    """What stands behind the @ of a setting."""
    _, _, quantization = setting.partition("@")
    if quantization not in ("", "int8", "int4"):
        raise SystemExit(f"setting {setting!r}: expected @int8 or @int4")
    return quantization or None


def decoding_fields(setting: str) -> dict:
    """The `generate()` fields that a setting such as "k=4", "t=0.9/dual" or "k=1/dllm:kr=7@int8" stands for."""
    decoder, _, cache = setting.partition("@")[0].partition("/")
    kind, _, value = decoder.partition("=")
    name, _, listed = cache.partition(":")
    try:
        fields = {"k": lambda: {"num_transfer_tokens": int(value)}, "t": lambda: {"threshold": float(value)}}[kind]()
        pairs = (pair.partition("=") for pair in listed.split(",") if pair)
        parameters = {key: float(number) if "." in number else int(number) for key, _, number in pairs}
    except (KeyError, ValueError):
        raise SystemExit(
            f"setting {setting!r}: expected k=INTEGER or t=NUMBER, then /CACHE and :NAME=NUMBER,... if wanted"
        ) from None
    if "block_length" in parameters:
        fields["block_length"] = parameters.pop("block_length")
    kinds = {"dllm": DLLMCache, "d2": D2Cache}
    return {**fields, "cache": kinds[name](**parameters) if name in kinds else name or "none"}


def decode(engines: dict, problems: list[Problem], options: argparse.Namespace) -> dict[str, tuple[list, float]]:
    """Every problem with every setting, taking turns in small groups: results and seconds by setting.

    engines: by quantization.
    """
    fields = {
        setting: {"gen_length": options.gen_length, "block_length": options.block_length, **decoding_fields(setting)}
        for setting in options.settings
    }
    results, seconds = {s: [] for s in fields}, dict.fromkeys(fields, 0.0)
    with tqdm(total=len(problems), unit="problem") as bar:
        for start in range(0, len(problems), options.batch_size):
            group = [problem.question for problem in problems[start : start + options.batch_size]]
            for setting, chosen in fields.items():
                began = time.perf_counter()
                engine = engines[quantization_of(setting)]
                results[setting] += engine.generate(group, batch_size=options.batch_size, **chosen)
                seconds[setting] += time.perf_counter() - began
            bar.update(len(group))
    return {setting: (results[setting], seconds[setting]) for setting in fields}


def compare(engines: dict, problems: list[Problem], options: argparse.Namespace) -> tuple[list[Row], dict]:
    """The rows of the table, and for each setting the accuracy within each family of problems."""
    rows, by_family, baseline = [], {}, None
    n_layers = next(iter(engines.values())).spec.n_layers
    for setting, (results, seconds) in decode(engines, problems, options).items():
        right = [
            float(final_answer(result.text) == final_answer(problem.answer))
            for result, problem in zip(results, problems, strict=True)
        ]
        nfe = sum(result.nfe for result in results) / len(results)
        tokens = sum(result.stats.tokens for result in results)
        layer_rows = sum(sum(result.stats.layer_rows) for result in results)
        baseline = baseline or (right, nfe)
        accuracy, accuracy_error = mean_and_error(right)
        difference, difference_error = paired_difference(right, baseline[0])
        rows.append(
            Row(
                setting=setting,
                problems=len(right),
                accuracy=accuracy,
                accuracy_error=accuracy_error,
                difference=difference,
                difference_error=difference_error,
                nfe=nfe,
                nfe_saved=1 - nfe / baseline[1],
                rows_per_token=layer_rows / n_layers / max(1, tokens),
                tokens_per_second=tokens / seconds,
                seconds=seconds,
            )
        )
        families = sorted({problem.family for problem in problems})
        hits = {name: [ok for ok, p in zip(right, problems, strict=True) if p.family == name] for name in families}
        by_family[setting] = {name: round(sum(found) / len(found), 4) for name, found in hits.items()}
    return rows, by_family


def markdown(rows: list[Row]) -> str:
    """The table, differences in percentage points against the first row."""
    lines = [
        "| decoding | exact match | against the first, paired | NFE | NFE saved | rows / token | tokens/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for index, row in enumerate(rows):
        paired = f"{100 * row.difference:+.1f} ± {100 * row.difference_error:.1f}" if index else "–"
        saved = f"{row.nfe_saved:.0%}" if index else "–"
        accuracy = f"{100 * row.accuracy:.1f} ± {100 * row.accuracy_error:.1f} %"
        work = f"{row.rows_per_token:.1f} | {row.tokens_per_second:.0f}"
        lines.append(f"| {row.setting} | {accuracy} | {paired} | {row.nfe:.1f} | {saved} | {work} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match on held-out word problems, by the project's engine.")
    parser.add_argument("--model", default="mini-llada", help="bundled name or folder")
    parser.add_argument("-n", "--problems", type=int, default=500, help="how many held-out problems")
    parser.add_argument("--seed", type=int, default=4242, help="which held-out problems")
    parser.add_argument("--settings", nargs="+", default=STANDARD, help="k=INTEGER or t=NUMBER[/CACHE][@int8]")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--json", type=Path, help="write rows and accuracies by family to this file")
    options = parser.parse_args()
    for setting in options.settings:
        decoding_fields(setting)

    engines = {
        quantization: Engine.from_pretrained(options.model, dtype=options.dtype, quantization=quantization)
        for quantization in dict.fromkeys(map(quantization_of, options.settings))
    }
    problems = held_out(options.problems, options.seed)
    rows, by_family = compare(engines, problems, options)
    print(
        f"\n{len(problems)} held-out problems, gen_length {options.gen_length}, block_length {options.block_length}\n"
    )
    print(markdown(rows))
    if options.json:
        content = {
            "model": options.model,
            "dtype": next(iter(engines.values())).dtype,
            "gen_length": options.gen_length,
            "block_length": options.block_length,
            "seed": options.seed,
            "rows": [asdict(row) for row in rows],
            "by_family": by_family,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
