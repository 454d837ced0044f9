"""The figure: accuracy against tokens/s with error bars and the frontier, all settings and the fast end by itself."""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from .numbers import Data, Line
from .style import COLOURS, INK, MARKERS, short

FAST = 0.6  # the right panel starts at this share of the highest speed
FLOOR = 0.002  # an error rate of 0 has no logarithm: drawn here
TICKS = (0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)


def draw(lines: list[Line], data: Data, file: Path) -> None:
    """Write the PNG."""
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK})
    figure, (whole, fast) = plt.subplots(1, 2, figsize=(15, 7.6), width_ratios=(1.05, 1), layout="constrained")
    _panel(whole, lines)
    whole.set_xscale("log")
    whole.set_title("all settings; labelled: defaults of papers and programs, slow frontier", loc="left", fontsize=10)
    _speeds(whole, [line.speed for line in lines])

    best = [line for line in lines if line.frontier]
    left = max(line.speed for line in lines) * FAST
    end = [line for line in lines if line.speed >= left]
    _panel(fast, end)
    fast.set_title("the fast end; labelled: frontier and defaults", loc="left", fontsize=10)

    for axes, shown in ((whole, lines), (fast, end)):
        _accuracies(axes, shown)
        axes.plot(*_staircase(best), color=INK, lw=1, ls=(0, (4, 2)), zorder=1)
    fast.set_xlim(left * 0.98, max(line.speed for line in lines) * 1.06)
    _legend(whole, lines)
    figure.suptitle(_title(data, lines), fontsize=11, x=0.01, ha="left")
    figure.canvas.draw()
    figure.set_layout_engine("none")  # labels are placed by pixels: nothing may move any more
    slow = [line for line in lines if line.published or (line.frontier and line not in end)]
    _label(whole, slow, lines, lines, lambda line: line.published or short(line))
    _label(fast, [line for line in end if line.frontier or line.published], end, lines, _fast_label)
    figure.savefig(file, dpi=130, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def _panel(axes, lines: list[Line]) -> None:
    for line in sorted(lines, key=lambda line: line.frontier or bool(line.published)):
        low, high = (_shown(line.accuracy + sign * line.accuracy_error) for sign in (-1, 1))
        y = _shown(line.accuracy)
        marked = line.frontier or line.published
        _, _, bars = axes.errorbar(
            line.speed,
            y,
            xerr=line.speed_error,
            yerr=[[y - low], [high - y]],
            color=COLOURS[line.cache],
            marker=MARKERS[line.decoder][0],
            ms=8 if marked else 6,
            mfc=COLOURS[line.cache] if line.frontier else "white",
            mew=1.6 if marked else 1.1,
            elinewidth=0.8,
            alpha=1 if marked else 0.75,
            zorder=3 if marked else 2,
        )
        for bar in bars:
            bar.set_alpha(0.6 if marked else 0.3)
    second = "CPU second" if lines[0].clock == "cpu" else "second"
    axes.set_xlabel(f"tokens per {second}, one prompt at a time")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(False)


def _shown(accuracy: float) -> float:
    """Accuracy on the axis: the logarithm of the error rate, upside down, since 99 % and 98 % are a factor of 2."""
    return -float(np.log10(min(1.0, max(FLOOR, 1 - accuracy))))


def _accuracies(axes, lines: list[Line]) -> None:
    bottom = min(_shown(line.accuracy - line.accuracy_error) for line in lines) - 0.05
    top = max(_shown(line.accuracy + line.accuracy_error) for line in lines) + 0.2
    axes.set_ylim(bottom, top)
    ticks = [t for t in TICKS if bottom <= _shown(t) <= top]
    axes.yaxis.set_major_locator(FixedLocator([_shown(t) for t in ticks]))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{100 * t:g} %" for t in ticks]))
    axes.set_ylabel("accuracy (error rate on a logarithmic scale)")


def _speeds(axes, values: list[float]) -> None:
    ticks = [m * 10**p for p in range(-3, 7) for m in (1, 2, 5) if min(values) / 2 < m * 10**p < max(values) * 2]
    axes.set_xlim(min(values) * 0.75, max(values) * 1.35)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _staircase(best: list[Line]) -> tuple[list[float], list[float]]:
    """The frontier: a point's accuracy is to be had at its speed and at every lower one."""
    ordered = sorted(best, key=lambda line: line.speed)
    x = [ordered[0].speed / 100, *(line.speed for line in ordered for _ in range(2))]
    return x[:-1], [_shown(line.accuracy) for line in ordered for _ in range(2)]


def _legend(axes, lines: list[Line]) -> None:
    blank = {"color": "none"}
    handles = [
        Line2D(
            [], [], ls="", marker="o", color=COLOURS[cache], label=f"{cache} cache" if cache != "none" else "no cache"
        )
        for cache in COLOURS
        if any(line.cache == cache for line in lines)
    ]
    handles += [Line2D([], [], **blank, label="")]
    handles += [
        Line2D([], [], ls="", marker=marker[0], color=INK, mfc="white", label=decoder)
        for decoder, marker in MARKERS.items()
        if any(line.decoder == decoder for line in lines)
    ]
    handles += [
        Line2D([], [], **blank, label=""),
        Line2D([], [], ls=(0, (4, 2)), lw=1, marker="o", color=INK, label="frontier (filled)"),
    ]
    axes.legend(handles=handles, loc="lower left", frameon=False, fontsize=8.5)


def _title(data: Data, lines: list[Line]) -> str:
    plan = data.plan
    weights = f", {plan.quantization}" if plan.quantization else ""
    threads = f"{plan.threads} thread{'s' if plan.threads > 1 else ''}"
    return (
        f"{plan.model} on {lines[0].problems:,} problems of {plan.task}: {len(lines)} settings. "
        f"{plan.dtype}{weights}, {plan.gen_length} tokens, {data.machine['device']}, {threads}; ± one standard error"
    )


def _fast_label(line: Line) -> str:
    return f"{line.published}\n{short(line)}" if line.published else short(line)


def _label(axes, wanted: list[Line], shown: list[Line], lines: list[Line], text) -> None:
    """Write labels where they cover neither a point nor each other: the nearest free place around their point."""
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    places = {line.name: axes.transData.transform((line.speed, _shown(line.accuracy))) for line in shown}
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in places.values()]
    for line in shown:  # bars across; those up and down are thin, and too many to be avoided
        ends = [(line.speed + sign * line.speed_error, _shown(line.accuracy)) for sign in (-1, 1)]
        (left, y), (right, _) = axes.transData.transform(ends)
        taken.append((left, y - 1, right, y + 1))
    corners = axes.transData.transform(np.transpose(_staircase([line for line in lines if line.frontier])))
    for start, end in itertools.pairwise(corners):
        steps = np.linspace(start, end, 2 + int(np.abs(end - start).max() / 5))
        taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in steps if frame.contains(x, y)]
    if axes.get_legend():
        taken.append(axes.get_legend().get_window_extent(renderer).extents)
    scale = axes.figure.dpi / 72
    for line in sorted(wanted, key=lambda line: -_shown(line.accuracy)):
        at = places[line.name]
        label = axes.figure.text(0, 0, text(line), fontsize=7.5, linespacing=1.05)
        box = label.get_window_extent(renderer)
        half = np.array([box.width, box.height]) / 2 + 2
        label.remove()
        spot = _free(at, half, taken, frame)
        taken.append((*(spot - half), *(spot + half)))
        axes.annotate(
            text(line),
            xy=(line.speed, _shown(line.accuracy)),
            xytext=(spot - at) / scale,
            textcoords="offset points",
            fontsize=7.5,
            ha="center",
            va="center",
            linespacing=1.05,
            color=COLOURS[line.cache],
            arrowprops={"arrowstyle": "-", "color": COLOURS[line.cache], "lw": 0.6, "shrinkA": 0, "shrinkB": 4},
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=5,
        )


def _free(at, half, taken: list, frame) -> np.ndarray:
    """The centre nearest to `at` for a box of this half size that covers nothing, or where none is, little."""
    choices = []
    for radius in range(12, 420, 6):
        for angle in np.linspace(0, 2 * np.pi, 32, endpoint=False) + np.pi / 2:
            direction = np.array([np.cos(angle), np.sin(angle)])
            spot = at + direction * radius + direction * half
            low, high = spot - half, spot + half
            if low[0] < frame.x0 + 3 or high[0] > frame.x1 or low[1] < frame.y0 + 3 or high[1] > frame.y1:
                continue
            covered = sum(
                max(0, min(high[0], x1) - max(low[0], x0)) * max(0, min(high[1], y1) - max(low[1], y0))
                for x0, y0, x1, y1 in taken
            )
            if covered == 0:
                return spot
            choices.append((covered, radius, *spot))
    return np.array(min(choices)[2:]) if choices else at
