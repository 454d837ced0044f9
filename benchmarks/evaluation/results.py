"""What an evaluation found: samples.jsonl, with every problem, and results.json, with the numbers."""

import importlib.metadata
import json
import os
import platform
import resource
from pathlib import Path

import torch

from dllm_ext import _C
from dllm_ext.harness import HarnessModel

from .machine import cpu_name
from .statistics import mean_and_error, percentile

PACKAGES = ("dllm_ext", "torch", "lm_eval", "transformers", "datasets", "accelerate", "hydra-core", "numpy")


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def samples(model: HarnessModel, found: dict | None) -> list[dict]:
    """One dict per problem: what was asked, what came and what it cost, and its scores.

    found: what simple_evaluate returned; None: without scores.
    """
    rows = {}
    for request, answer in model.answered:
        row = rows.setdefault((request.task_name, request.doc_id), {"prompt": request.args[0], "answers": []})
        row["answers"].append(answer)
    for task, scored in (found or {"samples": {}})["samples"].items():
        for sample in scored:  # one for each filter that looks for the answer in the text
            row = rows[task, sample["doc_id"]]
            row["target"] = sample["target"]
            taken = [r[0] if isinstance(r, list) and len(r) == 1 else r for r in sample["filtered_resps"]]
            row.setdefault("taken", {})[sample["filter"]] = taken[0] if len(taken) == 1 else taken
            scores = row.setdefault("scores", {})
            scores |= {f"{metric},{sample['filter']}": sample[metric] for metric in sample["metrics"]}
    return [{"task": task, "index": index, **row} for (task, index), row in sorted(rows.items())]


def costs(answers: list[dict], gen_length: int) -> dict:
    """What generations cost; {} where nothing was generated.

    Throughput has two meanings in the literature, and two ways to average: tokens before the first stop token, or all
    that were generated; in all, or the mean of every sequence's own. All four are here.
    """
    generated = [a for a in answers if "tokens" in a]
    if not generated:
        return {}
    seconds = [a["seconds"] for a in generated]
    total = sum(seconds)
    tokens = [a["tokens"] for a in generated]
    length = [len(a["token_ids"]) for a in generated]
    nfe = sum(a["nfe"] for a in generated)
    latency = {f"p{p}": percentile(seconds, p) for p in (50, 90, 95, 99)}
    return {
        "sequences": len(generated),
        "gen_length": gen_length,
        "nfe": nfe / len(generated),
        "tokens": sum(tokens) / len(generated),
        "tokens_per_forward": sum(tokens) / nfe,
        "rows_per_token": sum(a["layer_rows"] for a in generated) / max(1, sum(tokens)),
        "tokens_per_second": {
            "before_stop": {"in_all": sum(tokens) / total, "mean": _mean_rate(tokens, seconds)},
            "generated": {"in_all": sum(length) / total, "mean": _mean_rate(length, seconds)},
        },
        "latency_seconds": {"mean": total / len(seconds), **latency},
        "seconds_first_block": percentile([a["seconds_first_block"] for a in generated], 50),
        "prompt_tokens": sum(a["prompt_tokens"] for a in generated) / len(generated),
        "seconds": total,
    }


def _mean_rate(tokens, seconds):
    return mean_and_error([t / s for t, s in zip(tokens, seconds, strict=True)])[0]


def peak_memory(device: str) -> dict[str, int]:
    """Bytes that this process held at most: resident memory, mapped weights included, and on CUDA the device's."""
    out = {"resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device == "cuda":
        out["device_bytes"] = torch.cuda.max_memory_allocated()
    return out


def versions() -> dict[str, str]:
    """Of Python and of every package that has a say in the results."""
    return {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}}


def machine(model: HarnessModel) -> dict:
    """Where it ran."""
    engine = model.engine
    facts = {"device": engine.device, "dtype": engine.dtype, "quantization": engine.quantization}
    facts |= {"threads": torch.get_num_threads(), "isa": _C.info()["isa"], "cpu": cpu_name(), "cores": os.cpu_count()}
    if engine.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def scores(found: dict | None) -> dict[str, dict]:
    """The harness's numbers: task -> metric -> {value, stderr}."""
    out = {}
    for task, numbers in ({**(found or {}).get("results", {}), **(found or {}).get("groups", {})}).items():
        metrics = out.setdefault(task, {})
        for name, value in numbers.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            metrics[name] = {"value": value, "stderr": error if isinstance(error, float) else None}
    return out


def summary(report: dict) -> str:
    """A few lines for a person."""
    lines = []
    if report["accuracy"] is not None:
        a = report["accuracy"]
        error = f" ± {100 * a['stderr']:.1f}" if a["stderr"] is not None else ""
        lines.append(f"{report['metric']}: {100 * a['value']:.1f} %{error} of {report['problems']} problems")
    else:
        lines.append(f"{report['problems']} problems, not scored: {report['not_scored']}")
    if c := report["costs"]:
        t = c["tokens_per_second"]["before_stop"]
        lines.append(
            f"NFE {c['nfe']:.1f}, {c['tokens_per_forward']:.2f} tokens per forward, {t['in_all']:.1f} tokens/s "
            f"({c['tokens_per_second']['generated']['in_all']:.1f} with all positions), latency "
            f"{c['latency_seconds']['p50']:.3f} s (p95 {c['latency_seconds']['p95']:.3f})"
        )
    return "\n".join(lines)


def line(row: dict) -> str:
    """A line of samples.jsonl."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def dump(report: dict) -> str:
    """results.json's text."""
    return json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n"
