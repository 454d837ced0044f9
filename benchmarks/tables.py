"""compare.py's samples, and the tables and the plot that are made of them."""

import csv
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

from peers import CACHES, PROGRAMS, Program

CSV_COLUMNS = [
    *("kind", "program", "precision", "case", "ms", "per_second", "nfe", "ratio", "ratio_min", "ratio_max", "of_roof"),
    *("same_tokens", "load_seconds", "bytes_loading", "bytes_running", "reason"),
]


@dataclass
class Sample:
    """One turn of one program at one case: rows of a forward, or the cache of a generation."""

    kind: str  # "forward" or "generate"
    program: str
    precision: str
    case: int | str
    group: int
    repeat: int
    seconds: float  # of one forward, or of the whole generation
    nfe: int | None = None
    token_ids: list[int] | None = None
    counters: dict | None = field(default=None, repr=False)
    floor: float | None = None  # seconds that the case cannot avoid

    @classmethod
    def of(cls, kind: str, program: Program, case, group: int, repeat: int, answer: dict) -> "Sample":
        seconds = answer["seconds"]
        return cls(
            kind,
            program.name,
            program.precision,
            case,
            group,
            repeat,
            median(seconds) if isinstance(seconds, list) else seconds,
            *(answer.get(name) for name in ("nfe", "token_ids", "counters")),
        )


@dataclass
class Line:
    """One program at one case, over all repeats."""

    kind: str
    program: str
    precision: str
    case: int | str
    ms: float  # median, of one forward (a generation: of one model evaluation)
    per_second: float  # rows, or generated tokens
    nfe: int | None
    ratios: list[float]  # time ÷ the engine's, repeat by repeat
    roof: float | None  # fraction reached
    same_tokens: int | None  # as the engine, of those generated

    @property
    def ratio(self) -> str:
        return ratio_text(self.ratios)


def with_whole_forwards(samples: list[Sample], uncached: set[str], rows: list[int]) -> list[Sample]:
    """Programs without a cache compute all rows whatever is wanted: they have the same time at every row count.

    The floor of fewer rows is taken from another program of the same precision that was asked for them.
    """
    forwards = [s for s in samples if s.kind == "forward"]
    floors = {(s.precision, s.case): s.floor for s in forwards}
    out = list(samples)
    for s in forwards:
        if s.program in uncached:
            fewer = [n for n in rows if n != s.case]
            out += [replace(s, case=n, floor=floors.get((s.precision, n))) for n in fewer]
    return out


def summarise(samples: list[Sample], gen_length: int) -> list[Line]:
    engines = {p.name for p in PROGRAMS.values() if p.is_engine}
    engine = {(s.kind, s.precision, s.case, s.group, s.repeat): s for s in samples if s.program in engines}
    by_line = defaultdict(list)
    for s in samples:
        by_line[s.kind, s.program, s.case].append(s)
    lines = []
    for (kind, program, case), turns in by_line.items():
        s = turns[0]
        seconds = median(t.seconds for t in turns)
        partners = [(t, engine.get((kind, t.precision, case, t.group, t.repeat))) for t in turns]
        e = partners[0][1]
        lines.append(
            Line(
                kind,
                program,
                s.precision,
                case,
                ms=1e3 * seconds / (s.nfe or 1),
                per_second=(case if kind == "forward" else gen_length) / seconds,
                nfe=s.nfe,
                ratios=[t.seconds / e.seconds for t, e in partners if e],
                roof=s.floor / seconds if s.floor else None,
                same_tokens=sum(a == b for a, b in zip(s.token_ids, e.token_ids, strict=True))
                if kind == "generate" and e
                else None,
            )
        )
    order = list(PROGRAMS)
    place = {c: i for i, c in enumerate(CACHES)}
    return sorted(lines, key=lambda x: (x.kind, place.get(x.case, 0), order.index(x.program)))


FAMILIES = {"llama_cpp": "llama.cpp at any precision", "pytorch": "torch at any precision"}


def against_families(samples: list[Sample]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(engine's program, family of peers) -> rows -> least time of the family / the engine's, turn by turn."""
    turns = defaultdict(dict)
    for s in samples:
        if s.kind == "forward":
            turns[s.group, s.case, s.repeat][s.program] = s.seconds
    ratios = defaultdict(lambda: defaultdict(list))
    for (_, rows, _), seconds in turns.items():
        for module, title in FAMILIES.items():
            peers = [t for name, t in seconds.items() if PROGRAMS[name].module == module]
            for name in seconds:
                if peers and PROGRAMS[name].is_engine:
                    ratios[name, title][rows].append(min(peers) / seconds[name])
    return ratios


def ratio_text(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "–"


def markdown_table(head: list[str], rows: list[list], text_columns: int = 1) -> str:
    marks = ["---" if i < text_columns else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [head, marks, *rows])


def percent(x: float | None) -> str:
    return "–" if x is None else f"{x:.0%}"


def gigabytes(x: int | None) -> str:
    return "–" if x is None else f"{x / 1e9:.2f}"


@dataclass
class Report:
    settings: str
    samples: list[Sample]
    loaded: dict[str, dict]
    reasons: dict[str, str]
    keys: int
    gen_length: int
    rows: list[int]

    def __post_init__(self):
        uncached = {name for name, note in self.loaded.items() if note["caches"] == ["none"]}
        every = with_whole_forwards(self.samples, uncached, self.rows)
        self.lines = summarise(every, self.gen_length)
        self.families = against_families(every)

    def write(self, folder: Path):
        (folder / "compare.md").write_text(self.markdown() + "\n")
        samples = [asdict(s) for s in self.samples]
        (folder / "samples.json").write_text(json.dumps({"settings": self.settings, "samples": samples}))
        self.write_csv(folder / "compare.csv")
        self.plot(folder / "compare.svg")

    def markdown(self) -> str:
        parts = [self.settings]
        if forwards := [x for x in self.lines if x.kind == "forward"]:
            parts += ["## One forward", self.forward_tables(forwards)]
        if generations := [x for x in self.lines if x.kind == "generate"]:
            parts += ["## Generations", self.generation_table(generations)]
        parts += ["## Loading and memory", self.memory_table()]
        if self.reasons:
            rows = [[name, reason] for name, reason in self.reasons.items()]
            parts += ["## Not measured, or not to the end", markdown_table(["program", "reason"], rows, 2)]
        return "\n\n".join(parts)

    def forward_tables(self, lines) -> str:
        cells = {(x.program, x.case): x for x in lines}
        programs = list(dict.fromkeys(x.program for x in lines))
        parts = []
        for title, show in (
            ("milliseconds", lambda x: f"{x.ms:.4g}"),
            ("rows per second", lambda x: f"{x.per_second:.4g}"),
            ("time ÷ the engine's, median (min–max) of the repeats", lambda x: x.ratio),
            ("fraction of the roof", lambda x: percent(x.roof)),
        ):
            rows = [[p, *(show(cells[p, n]) if (p, n) in cells else "–" for n in self.rows)] for p in programs]
            head = [title, *(f"{n} rows" for n in self.rows)]
            parts.append(markdown_table(head, rows))
        rows = [[p, family, *(ratio_text(r[n]) for n in self.rows)] for (p, family), r in self.families.items()]
        head = ["least time of a family ÷ the engine's", "family", *(f"{n} rows" for n in self.rows)]
        parts.append(markdown_table(head, rows, 2))
        return "\n\n".join(parts)

    def generation_table(self, lines) -> str:
        head = ["cache", "program", "tokens/s", "NFE", "ms per evaluation", "time ÷ the engine's (min–max)", "of roof"]
        rows = []
        for x in lines:
            same = "–" if x.same_tokens is None else f"{x.same_tokens} of {self.gen_length}"
            speed = (f"{x.per_second:.4g}", x.nfe, f"{x.ms:.4g}")
            rows.append([x.case, x.program, *speed, x.ratio, percent(x.roof), same])
        return markdown_table([*head, "same tokens"], rows, 2)

    def memory_table(self) -> str:
        rows = [
            [
                name,
                f"{note['seconds']:.1f}",
                gigabytes(note["bytes_loading"]),
                gigabytes(note.get("bytes")),
                percent(note.get("idle")),
            ]
            for name, note in self.loaded.items()
        ]
        return markdown_table(
            ["program", "seconds to load", "peak GB loading", "peak GB running", "CPU while idle"], rows
        )

    def write_csv(self, path: Path):
        with open(path, "w", newline="") as f:
            out = csv.DictWriter(f, CSV_COLUMNS, restval="")
            out.writeheader()
            for x in self.lines:
                row = {k: v for k, v in vars(x).items() if k in CSV_COLUMNS and v is not None} | {"of_roof": x.roof}
                if x.ratios:
                    row |= {"ratio": median(x.ratios), "ratio_min": min(x.ratios), "ratio_max": max(x.ratios)}
                out.writerow(row)
            for name, note in self.loaded.items():
                out.writerow(
                    {
                        "kind": "load",
                        "program": name,
                        "precision": PROGRAMS[name].precision,
                        "load_seconds": note["seconds"],
                        "bytes_loading": note["bytes_loading"],
                        "bytes_running": note.get("bytes", ""),
                    }
                )
            for name, reason in self.reasons.items():
                precision = PROGRAMS[name].precision
                out.writerow({"kind": "missing", "program": name, "precision": precision, "reason": reason})

    def plot(self, path: Path):
        try:
            import matplotlib
        except ModuleNotFoundError:
            print("no plot: matplotlib is not installed (pip install -e '.[benchmarks]')")
            return
        matplotlib.use("svg")
        import matplotlib.pyplot as plt

        forwards = [x for x in self.lines if x.kind == "forward"]
        generations = [x for x in self.lines if x.kind == "generate"]
        panels = [p for p in ((forwards, self.plot_forwards), (generations, self.plot_generations)) if p[0]]
        panels.append((list(self.loaded.items()), self.plot_memory))
        names = list(dict.fromkeys([*self.loaded, *(x.program for x in self.lines)]))
        palette = plt.get_cmap("tab20")
        colours = {name: "black" if PROGRAMS[name].is_engine else palette(i % 20) for i, name in enumerate(names)}
        size = (7 * len(panels), max(6, 0.17 * len(generations)))
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for axis, (data, draw) in zip(axes[0], panels, strict=True):
            draw(axis, data, colours)
        figure.savefig(path)
        plt.close(figure)

    def plot_forwards(self, axis, lines, colours):
        styles = {"float32": ":", "bfloat16": "-", "int8": "--", "int4": "-."}
        for name in dict.fromkeys(x.program for x in lines):
            points = sorted((x.case, x.per_second) for x in lines if x.program == name)
            style = styles[PROGRAMS[name].precision]
            axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, label=name, color=colours[name])
        axis.set(xscale="log", yscale="log", xlabel=f"rows over {self.keys} keys", ylabel="rows per second")
        axis.set_xticks(self.rows, [str(n) for n in self.rows])
        axis.minorticks_off()
        axis.legend(fontsize=7)
        axis.set_title("one forward")

    def plot_generations(self, axis, lines, colours):
        labels = [f"{x.case}: {x.program}" for x in lines]
        axis.barh(labels, [x.per_second for x in lines], color=[colours[x.program] for x in lines])
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.set(xlabel="tokens per second", title="generations, by cache")

    def plot_memory(self, axis, loaded, colours):
        names = [name for name, _ in loaded]
        running = [note.get("bytes", 0) / 1e9 for _, note in loaded]
        axis.barh(names, running, color=[colours[name] for name in names])
        axis.plot([note["bytes_loading"] / 1e9 for _, note in loaded], names, "|", color="grey", label="while loading")
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.legend(fontsize=7)
        axis.set(xlabel="GB", title="peak memory")
