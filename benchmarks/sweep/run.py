"""Running a sweep: settings take turns, group of problems by group, and every turn is one line of a file.

A round is a group of problems (20 unless asked otherwise) that all settings decode, one prompt per call, before the
next group begins; the order of the settings is drawn anew for each round. So a machine whose speed drifts is equally
unfair to all, and no setting always follows the same other one. A line is on the disk before the next turn starts: a
run that was killed goes on where it was, and its results are those of one that was not.
"""

import gzip
import json
import os
import subprocess
import time
import zlib
from pathlib import Path

import torch
from evaluation.machine import cpu_name
from tqdm import tqdm

from dllm_ext import _C, Engine, __version__
from dllm_ext.tokenizer import cut

from . import raw
from .settings import Setting


def machine(engine: Engine) -> dict:
    """Where it ran."""
    device = torch.cuda.get_device_name() if engine.device == "cuda" else cpu_name()
    here = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(here, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        commit = None
    return {
        "device": device,
        "cores": os.cpu_count(),
        "isa": _C.info()["isa"],
        "version": __version__,
        "commit": commit,
    }


def run(engine: Engine, task, settings: list[Setting], plan: raw.Plan, folder: Path, command: str) -> Path:
    """Run all turns that the folder's file does not have yet, and pack it."""
    folder.mkdir(parents=True, exist_ok=True)
    file, packed = folder / raw.FILE, folder / f"{raw.FILE}.gz"
    if packed.exists():
        raise raw.RunError(f"{packed} is a finished run: draw it with --draw-only, or choose another --out")
    done = _resume(file, plan)
    by_name = {setting.name: setting for setting in settings}
    for setting in settings:  # the first call takes memory and chooses kernels
        engine.generate(task.examples[0].prompt, **setting.fields)
    with file.open("a") as f, tqdm(total=len(plan.groups()) * len(settings), initial=len(done), unit="turn") as bar:
        if f.tell() == 0:
            _append(f, {"plan": vars(plan), "machine": machine(engine), "command": command})
        for index, group in enumerate(plan.groups()):
            for name in plan.order(index):
                if (index, name) not in done:
                    examples = [task.examples[i] for i in group]
                    _append(f, {"round": index, "setting": name, **turn(engine, task, examples, by_name[name])})
                    bar.update()
    packed.write_bytes(gzip.compress(file.read_bytes(), 9, mtime=0))
    file.unlink()
    return packed


def turn(engine: Engine, task, examples: list, setting: Setting) -> dict:
    """One setting's results on one round's problems, each a list with one entry per problem.

    seconds are wall, around the whole call; cpu_seconds are the process's, so without the times it waited for a core.
    rows are averaged over layers. crc is of all token ids, to tell whether another run gave the same ones.
    """
    columns = {n: [] for n in ("score", "tokens", "nfe", "rows", "logit_rows", "seconds", "cpu_seconds")}
    crc = 0
    for example in examples:
        cpu, wall = time.process_time(), time.perf_counter()
        result = engine.generate(example.prompt, **setting.fields)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        score = task.score(example, cut(result.text, example.until))[task.metric]
        values = (
            int(score) if score == int(score) else score,
            result.stats.tokens,
            result.nfe,
            round(sum(result.stats.layer_rows) / engine.spec.n_layers, 1),
            sum(result.stats.logit_rows),
            float(f"{wall:.4g}"),
            float(f"{cpu:.4g}"),
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
        crc = zlib.crc32(repr(result.token_ids).encode(), crc)
    return columns | {"crc": crc}


def _append(f, content: dict) -> None:
    f.write(json.dumps(content, separators=(",", ":")) + "\n")
    f.flush()
    os.fsync(f.fileno())


def _resume(file: Path, plan: raw.Plan) -> set[tuple[int, str]]:
    """The turns that are done, after cutting off half a line at the end."""
    if not file.exists():
        return set()
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as f:
            f.truncate(len(whole))
    if not whole:
        return set()
    header, turns = raw.read(file)
    theirs = header["plan"]
    different = [f"{k} {theirs[k]!r}, not {v!r}" for k, v in vars(plan).items() if theirs[k] != v]
    if different:
        raise raw.RunError(f"{file} is of another run: {'; '.join(different)}. Choose another --out")
    return {(t["round"], t["setting"]) for t in turns}
