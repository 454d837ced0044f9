"""Every program that runs these models on a CPU, side by side: one command, one table.

    python benchmarks/compare.py --out results                         # 1.0 B LLaDA shape, all that is installed
    python benchmarks/compare.py --out results --model mini-llada --repeats 2 --gen-length 32
    python benchmarks/compare.py --out results --precisions int8 int4 --only forward
    python benchmarks/compare.py --out results --fast-dllm Fast-dLLM --d2cache d2Cache --dllm-cache dLLM-cache

Measured, on the same weights and the same random prompt:

1. milliseconds per forward of 1 to 320 rows over 320 keys (the last positions; those before them are cached), with the
   logits of all these rows, or in this engine their statistics. A program without a cache computes all positions
   whatever the rows: its one time counts for each row count.
2. generations per cache policy: tokens per second (prompt never counted), model evaluations (NFE), ms per evaluation.
3. seconds to load (files in the page cache as far as memory allows) and peak memory while loading and while running.

Each program runs in its own process, and they take turns: repeat by repeat, case by case, program by program, one at a
time, while the others sleep (the table shows the CPU time that they used meanwhile). A ratio is a program's time
divided by this engine's of the same precision class in the same repeat, so that the machine's drift cancels: above 1
the engine is faster; one more table holds every precision of the engine against the best of each family of peers at
any precision. What does not fit into memory at once runs in groups of one precision class, and every group has its own
run of the engine to be compared with.

Beside each time stands the fraction of the roof that it reached: the least time that this machine needs for what was
asked (roofline.py), divided by the time. Writes compare.md, compare.csv, compare.svg, and samples.json with the single
times. Programs that are not installed, not given or that fail are listed with the reason. diffuse-cpp has no
adapter: there was none at hand to write it against.

`pip install -e '.[benchmarks]'` brings llama.cpp (compiled on the spot), transformers and matplotlib.
"""

import argparse
import os
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path

import tables
from peers import CACHES, PRECISIONS, PROGRAMS, Program
from peers.checkpoint import load_config, parameters
from peers.process import BENCHMARKS, PeerError, Process
from random_model import SHAPES, write_llada
from roofline import PRECISIONS as WIDTHS
from roofline import Shape, describe, forward_work, generation_floor, measure_peaks
from tables import Sample
from tqdm import tqdm

MINI = BENCHMARKS.parent / "dllm_ext" / "models" / "mini-llada"


def available_bytes() -> int:
    """Memory that a new process could get without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def bytes_together(programs: list[Program], parameters: int) -> float:
    """Memory that they need: the weights of all, and the spare copies of the one that needs most while it loads."""
    sizes = [parameters * WIDTHS[p.precision].weight_bytes for p in programs]
    return sum(sizes) + max((p.copies - 1) * size for p, size in zip(programs, sizes, strict=True))


def groups_of(programs: list[Program], parameters: int, limit: float) -> tuple[list[list[Program]], dict[str, str]]:
    """Programs that are in memory together: all if they fit, else groups of one precision class with its engine.

    Returns the groups, engines first, and a reason for each program that does not fit beside the engine.
    """
    if bytes_together(programs, parameters) <= limit:
        return [sorted(programs, key=lambda p: not p.is_engine)], {}
    groups, reasons = [], {}
    for precision in PRECISIONS:
        engine = [p for p in programs if p.precision == precision and p.is_engine]
        group = list(engine)
        for p in programs:
            if p.precision != precision or p.is_engine:
                continue
            alone = bytes_together([*engine, p], parameters)
            if alone > limit:
                reasons[p.name] = f"needs {alone / 1e9:.0f} GB beside the engine, {limit / 1e9:.0f} GB are free"
            elif bytes_together([*group, p], parameters) <= limit:
                group.append(p)
            else:
                groups.append(group)
                group = [*engine, p]
        if group:
            groups.append(group)
    return groups, reasons


class Run:
    """One comparison: its settings, and what has been measured so far."""

    def __init__(self, args, folder: Path, config: dict):
        self.args, self.folder = args, folder
        self.shape = Shape.from_config(config)
        chooser = random.Random(1)
        self.prompt = [chooser.randrange(4, config["vocab_size"] - 4) for _ in range(args.prompt_length)]
        self.samples: list[Sample] = []
        self.loaded: dict[str, dict] = {}  # program -> seconds and bytes
        self.reasons: dict[str, str] = {}  # program -> why it is not, or not wholly, in the tables
        self.peaks: dict[str, float] = {}

    def measure_peaks(self):
        """The best of this and of earlier calls."""
        found = measure_peaks(self.args.threads)
        self.peaks = {name: max(value, self.peaks.get(name, 0)) for name, value in found.items()}

    def load(self, program: Program, stack: ExitStack) -> Process | None:
        process = stack.enter_context(Process(self.args.threads))
        arguments = {"folder": str(self.folder), "precision": program.precision, **program.options}
        if program.path_option:
            arguments["source"] = str(getattr(self.args, program.path_option).resolve())
        if program.converts:
            arguments["scratch"] = str(self.args.scratch.resolve())
        try:
            if program.converts:  # in yet another process, so that neither time nor memory of it counts
                with Process(self.args.threads) as converter:
                    converter.ask("prepare", module=program.module, arguments=arguments)
            arguments["threads"] = self.args.threads
            self.loaded[program.name] = process.ask("load", module=program.module, arguments=arguments)
        except PeerError as e:
            self.reasons[program.name] = str(e)
            return None
        return process

    def group(self, number: int, programs: list[Program]):
        """Measure these programs by turns."""
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=self.turns(programs), desc=programs[0].precision, disable=None))
            running = {}
            for program in programs:
                bar.set_postfix_str(f"loading {program.name}")
                if process := self.load(program, stack):
                    running[program] = process

            def turns(kind, cases, request):
                """Ask every program for every case in turn; `request` gives the question, or None for none."""
                for repeat in range(self.args.repeats):
                    for case in cases:
                        for program in list(running):
                            bar.update()
                            if (question := request(program, case)) is None:
                                continue
                            bar.set_postfix_str(f"{program.name}: {kind} {case}")
                            try:
                                answer = running[program].ask(kind, **question)
                            except PeerError as e:
                                self.reasons[program.name] = f"{kind} {case}: {e}"
                                running.pop(program).close()
                                continue
                            self.samples.append(Sample.of(kind, program, case, number, repeat, answer))

            if self.args.only in (None, "forward"):
                turns("forward", self.args.rows, self.forward_request)
            if self.args.only in (None, "generate"):
                turns("generate", self.args.caches, self.generate_request)
            for program, process in running.items():
                note = self.loaded[program.name]
                note["bytes"] = process.ask("memory")["bytes"]
                note["idle"] = process.idle_cpu / process.idle_seconds if process.idle_seconds else 0.0

    def turns(self, programs):
        cases = {None: (*self.args.rows, *self.args.caches), "forward": self.args.rows, "generate": self.args.caches}
        return self.args.repeats * len(programs) * len(cases[self.args.only])

    def forward_request(self, program, rows):
        if not self.loaded[program.name]["partial_rows"] and rows != self.args.keys:
            return None
        return {"rows": rows, "keys": self.args.keys, "repeats": self.args.calls}

    def generate_request(self, program, cache):
        if cache not in self.loaded[program.name]["caches"]:
            return None
        a = self.args
        per_step = a.none_per_step if cache == "none" else a.per_step
        return {
            "prompt": self.prompt,
            "gen_length": a.gen_length,
            "block_length": a.block_length,
            "per_step": per_step,
            "cache": cache,
        }

    def add_floors(self):
        """The least seconds of every case: what the positions asked for cost, whatever a program computed."""
        policy = {}  # the engine's counters of each policy say what it computes
        for s in self.samples:
            if s.kind == "generate" and s.counters:
                keys = self.args.prompt_length + self.args.gen_length
                floor = generation_floor(self.shape, s.counters, keys, self.peaks, s.precision)
                policy[s.precision, s.case] = floor
        for s in self.samples:
            if s.kind == "forward":
                s.floor = forward_work(self.shape, s.case, self.args.keys, s.precision).floor(self.peaks, s.precision)
            else:
                s.floor = policy.get((s.precision, s.case))


def selected(args) -> tuple[list[Program], dict[str, str]]:
    """The programs to run, and why the others of those asked for do not."""
    reasons, chosen = {}, []
    for name in args.programs or PROGRAMS:
        program = PROGRAMS[name]
        if program.precision not in args.precisions:
            continue
        if program.path_option and not getattr(args, program.path_option):
            reasons[name] = f"not given: --{program.path_option.replace('_', '-')} PATH"
        else:
            chosen.append(program)
    return chosen, reasons


def model_folder(args) -> Path:
    if args.model == "mini-llada":
        return MINI
    return write_llada(args.folder, args.model) if args.model in SHAPES else Path(args.model)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder for the tables and the plot")
    p.add_argument("--model", default="llada-1b", help=f"mini-llada, {', '.join(SHAPES)}, or a folder")
    temporary = Path(tempfile.gettempdir())
    p.add_argument("--folder", type=Path, default=temporary, help="where random weights are kept")
    p.add_argument("--scratch", type=Path, help="where converted weights are kept; default: --folder")
    p.add_argument("--programs", nargs="+", choices=list(PROGRAMS), metavar="NAME", help=", ".join(PROGRAMS))
    p.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    p.add_argument("--only", choices=["forward", "generate"])
    p.add_argument("--repeats", type=int, default=5, help="turns of each program at each case")
    p.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128, 320])
    p.add_argument("--keys", type=int, default=320)
    p.add_argument("--calls", type=int, default=3, help="forwards per turn; the turn's time is their median")
    p.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    p.add_argument("--prompt-length", type=int, default=256)
    p.add_argument("--gen-length", type=int, default=128)
    p.add_argument("--block-length", type=int, default=32)
    p.add_argument("--per-step", type=int, default=1, help="tokens committed at each step")
    p.add_argument("--none-per-step", type=int, help="the same for cache none, whose steps cost alike: a shorter run")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--memory", type=float, help="GB that all programs together may use; default: 90 %% of what is free")
    p.add_argument("--fast-dllm", type=Path, metavar="PATH", help="a checkout of NVlabs/Fast-dLLM")
    p.add_argument("--d2cache", type=Path, metavar="PATH", help="a checkout of Kamichanw/d2Cache")
    p.add_argument("--dllm-cache", type=Path, metavar="PATH", help="a checkout of maomaocun/dLLM-cache")
    args = p.parse_args()
    if min(args.rows) < 1 or max(args.rows) > args.keys:
        p.error(f"--rows {args.rows}: each must be between 1 and --keys, which is {args.keys}")
    if args.model not in ("mini-llada", *SHAPES) and not (Path(args.model) / "config.json").exists():
        p.error(f"--model {args.model}: neither mini-llada, {', '.join(SHAPES)}, nor a folder with a config.json")
    if args.gen_length % args.block_length:
        p.error(f"--gen-length {args.gen_length} is not a multiple of --block-length {args.block_length}")
    args.rows = sorted({*args.rows, args.keys})  # all rows are the only ones that some programs can compute
    args.none_per_step = args.none_per_step or args.per_step
    args.scratch = args.scratch or args.folder
    return args


def main():
    args = arguments()
    for folder in (args.out, args.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    folder = model_folder(args)
    run = Run(args, folder, load_config(folder))
    programs, run.reasons = selected(args)
    limit = args.memory * 1e9 if args.memory else 0.9 * available_bytes()
    groups, too_large = groups_of(programs, parameters(folder), limit)
    run.reasons |= too_large
    run.measure_peaks()
    for number, group in enumerate(groups):
        run.group(number, group)
    run.measure_peaks()
    run.add_floors()

    settings = (
        f"{folder.name}, {args.threads} threads, {args.repeats} repeats. Forwards over {args.keys} keys. "
        f"Generations: prompt {args.prompt_length}, {args.gen_length} tokens in blocks of {args.block_length}, "
        f"{args.per_step} per step (cache none: {args.none_per_step}). Peaks: {describe(run.peaks)}."
    )
    report = tables.Report(settings, run.samples, run.loaded, run.reasons, args.keys, args.gen_length, args.rows)
    report.write(args.out)
    print(report.markdown())


if __name__ == "__main__":
    main()
