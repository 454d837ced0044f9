"""One generation as one HTML file: the canvas over its steps, the rows that each computed, its cost (docs/trace.md).

The page holds numbers and texts as JSON, and a script that draws them; it loads nothing. Prompts and tokens are hostile
input: they reach the page through JSON alone, and the script puts them there as text, never as markup.
"""

import base64
import hashlib
import json
import os
import re
from importlib import resources
from pathlib import Path

from . import _C
from .config import CACHES_WITH_SETTINGS, GenerationConfig, cache_settings, native_fields
from .engine import Engine, Result
from .errors import ConfigError
from .tokenizer import Tokenizer


def write_trace(
    path: str | os.PathLike,
    engine: Engine,
    prompt_ids: list[int],
    config: GenerationConfig,
    infill: bool = False,
    model: str | None = None,
) -> Result:
    """generate() for one prompt, and an HTML file of how it went. Returns the Result.

    path: The file to write; one that exists is replaced. config, infill: as for generate().
    model: The name that the page shows; None is that of the model's folder.

    Raises ConfigError where `path` cannot be written (before the generation, where that can be known), and what
    generate() raises.
    """
    path = output_file(path)
    events = []
    result = engine.generate(prompt_ids, config, infill=infill, on_step=events.append)
    page = render(trace_data(engine, result, events, config, model or engine.folder.name))
    try:
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as e:
        raise _not_allowed(path, f"it cannot be written: {e.strerror}") from e
    return result


def output_file(path: str | os.PathLike) -> Path:
    """`path` as a Path; ConfigError where a file cannot be written there, as far as that shows beforehand."""
    try:
        file = Path(path)
    except TypeError:
        raise ConfigError(f"path = {path!r} is not allowed: it must be a path") from None
    if file.is_dir():
        raise _not_allowed(file, "it is a folder, and must be a file")
    if not file.parent.is_dir():
        raise _not_allowed(file, f"there is no folder {str(file.parent)!r}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise _not_allowed(file, "it cannot be written: Permission denied")
    return file


def _not_allowed(path, reason):
    return ConfigError(f"path = {str(path)!r} is not allowed: {reason}")


def trace_data(engine: Engine, result: Result, events: list, config: GenerationConfig, model: str) -> dict:
    """All that the page shows, as plain values. events: every StepEvent of the generation, in order.

    Lists are per position (the prompt, then what was generated) or, in "steps", per step. Positions that were filled
    with EOS after the stop ("filled_from" and on) show what the steps had committed there, if anything.
    """
    prompt_length = len(result.prompt_ids)
    tokens = result.prompt_ids + result.token_ids
    commit_steps: list[int] = [-1] * len(tokens)
    confidences: list[float | None] = [None] * len(tokens)
    for e in events:
        for p, token, confidence in zip(e.positions, e.token_ids, e.confidences, strict=True):
            tokens[p], commit_steps[p], confidences[p] = token, e.step, _short(confidence)
    filled = next((i for i, step in enumerate(result.commit_steps) if step < 0), len(result.token_ids))
    stats, spec = result.stats, engine.spec
    return {
        "model": model,
        "family": spec.family,
        "device": engine.device,
        "dtype": engine.dtype,
        "quantization": engine.quantization,
        "config": _settings(config),
        "nfe": result.nfe,
        "tokens": stats.tokens,
        "seconds": _short(stats.seconds_total),
        "tokens_per_second": _short(stats.tokens_per_second),
        "tokens_per_forward": _short(stats.tokens_per_forward),
        "prompt_length": prompt_length,
        "filled_from": prompt_length + filled,
        "stop_ids": list(spec.stop_ids),
        "token_ids": tokens,
        "pieces": _pieces(engine, tokens),
        "commit_steps": commit_steps,
        "confidences": confidences,
        "steps": {
            "block": [e.block for e in events],
            "rows": [e.rows for e in events],
            "full": [int(e.is_full) for e in events],
            "computed": [_runs(e.computed) for e in events],
            "commits": [len(e.positions) for e in events],
            "ms": [round(1e3 * s, 4) for s in stats.seconds],
        },
    }


def render(data: dict) -> str:
    """The page."""
    files = resources.files(__package__) / "templates"
    html, style, script = ((files / f"trace.{end}").read_text(encoding="utf-8") for end in ("html", "css", "js"))
    # Nothing runs but this script, should a text ever become markup after all; nothing is loaded.
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    # ASCII, without the characters that could end the element that holds it. All of U+2028 and such is escaped.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {"policy": policy, "style": style, "script": script, "data": text}
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], html)  # in one pass: a text may hold "{{script}}"


def _hash(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _pieces(engine, tokens):
    """Text of each token; its id where the model has no tokenizer files."""
    if not Tokenizer.is_in(engine.folder):
        return [f"[{t}]" for t in tokens]
    return engine.tokenizer.pieces(tokens)


def _runs(positions):
    """Ascending positions as runs: [begin, end, begin, end, ...], ends excluded."""
    runs = []
    for p in positions:
        if runs and runs[-1] == p:
            runs[-1] = p + 1
        else:
            runs += [p, p + 1]
    return runs


def _short(x):
    """Six digits: more than anybody reads, in half of the room. Not -0."""
    return float(f"{x:.6g}") + 0.0


def _settings(config):
    """Settings with the defaults that are in force, without those that are off or of another cache."""
    settings = {name: value for name, value in _C.validate_config(native_fields(config)).items() if value is not None}
    for cls in CACHES_WITH_SETTINGS:
        for name in cache_settings(cls) if settings["cache"] != cls.name else ():
            del settings[name]
    if config.token_frequencies is not None:
        settings["token_frequencies"] = "given"  # a number for every id of the vocabulary
    return settings
