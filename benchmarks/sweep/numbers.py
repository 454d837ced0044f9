"""The numbers of a sweep, made of its raw data.

accuracy            mean score over problems; ± is one standard error of that mean
difference          from the baseline, paired problem by problem, with the standard error of the paired mean
tokens_per_second   tokens before the first end of text, of all problems, over the wall seconds of all calls
tokens_per_second_error
                    What the settings' order in speed may owe to chance. Rounds are drawn with replacement, the same for
                    all settings; in each draw a setting's tokens/s is divided by the geometric mean over all settings;
                    the error is the standard deviation of that ratio's logarithm, times tokens_per_second. So what all
                    settings share, a slow hour or a hard group of problems, is not in it, and tokens/s themselves are
                    those of this machine on that day.
sample_tokens_per_second
                    the mean of every problem's own tokens/s, as d2Cache's harness has it
cpu_tokens_per_second
                    tokens over the seconds that the process really computed: without the times it waited for a core.
                    With one thread on a machine that does nothing else it is tokens_per_second; on a shared machine
                    waiting is no property of a setting, yet hits some more than others. Of several threads the
                    seconds add up, and on a GPU it means nothing
nfe, tokens_per_forward, rows_per_token, logit_rows_per_token
                    what it costs without a clock, the same on every machine: model evaluations per problem, tokens
                    per evaluation, rows through a layer (mean over layers) and through the LM head per token
p50, p95            latency: wall seconds of one call
frontier            no other setting has at least its accuracy and its tokens/s, and more of one; tokens/s by the clock
                    that is asked for, wall or cpu
frontier_share, cpu_frontier_share
                    share of the draws in which it is on the frontier, by wall and by CPU seconds. A round is a group
                    of problems with the times they took, so one draw resamples both
beaten_by, beaten_share
                    the setting that dominates it in most draws, by the clock that is asked for, and in what share
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evaluation.statistics import dominators, frontier, mean_and_error, paired_difference, percentile, resamples

from . import grid, raw

COLUMNS = ("score", "tokens", "nfe", "rows", "logit_rows", "seconds", "cpu_seconds")
CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
DRAWS = 2000


@dataclass(frozen=True)
class Data:
    """Raw data as arrays, [settings, problems], of the rounds that all settings have finished."""

    plan: raw.Plan
    machine: dict
    command: str
    columns: dict[str, np.ndarray]
    rounds: np.ndarray  # of each problem


@dataclass(frozen=True)
class Line:
    """One setting; the fields are explained above."""

    name: str
    clock: str
    cache: str
    decoder: str
    published: str | None
    problems: int
    accuracy: float
    accuracy_error: float
    difference: float
    difference_error: float
    tokens_per_second: float
    tokens_per_second_error: float
    sample_tokens_per_second: float
    cpu_tokens_per_second: float
    cpu_tokens_per_second_error: float
    nfe: float
    tokens_per_forward: float
    rows_per_token: float
    logit_rows_per_token: float
    p50: float
    p95: float
    frontier: bool
    frontier_share: float
    cpu_frontier_share: float
    beaten_by: str | None
    beaten_share: float

    @property
    def speed(self) -> float:
        """Tokens/s by the clock that is asked for."""
        return self.cpu_tokens_per_second if self.clock == "cpu" else self.tokens_per_second

    @property
    def speed_error(self) -> float:
        return self.cpu_tokens_per_second_error if self.clock == "cpu" else self.tokens_per_second_error


def load(folder: Path) -> Data:
    """The data in a folder. RunError if there are none, or no round is complete."""
    file = raw.file_in(folder)
    if file is None:
        raise raw.RunError(f"{folder} holds no data ({raw.FILE} or {raw.FILE}.gz): run the sweep first")
    header, turns = raw.read(file)
    plan = raw.Plan(**header["plan"])
    by_turn = {(turn["round"], turn["setting"]): turn for turn in turns}
    whole = [i for i in range(len(plan.groups())) if all((i, name) in by_turn for name in plan.settings)]
    if not whole:
        raise raw.RunError(f"{file} has no round that all {len(plan.settings)} settings have finished")
    columns = {
        column: np.array([[x for i in whole for x in by_turn[i, name][column]] for name in plan.settings], dtype=float)
        for column in COLUMNS
    }
    rounds = np.repeat(np.arange(len(whole)), [len(plan.groups()[i]) for i in whole])
    return Data(plan, header["machine"], header["command"], columns, rounds)


def lines(data: Data, clock: str = "wall", draws: int = DRAWS, seed: int = 0) -> list[Line]:
    """All settings, fastest first."""
    names = data.plan.settings
    score, tokens = data.columns["score"], data.columns["tokens"]
    speed, error, share = {}, {}, {}
    for name, seconds in CLOCKS.items():
        speed[name] = tokens.sum(axis=1) / data.columns[seconds].sum(axis=1)
        accuracies, speeds = _resampled(data, seconds, draws, seed)
        error[name] = _noise(speeds) * speed[name]
        share[name] = frontier(-speeds, accuracies).mean(axis=0)
        if name == clock:
            on = frontier(-speed[name], score.mean(axis=1))
            beats = np.stack([dominators(-speeds, accuracies, i).mean(axis=0) for i in range(len(names))])
    baseline = names.index(grid.BASELINE) if grid.BASELINE in names else 0
    found = []
    for i, name in enumerate(names):
        of = {key: column[i] for key, column in data.columns.items()}
        accuracy, accuracy_error = mean_and_error(of["score"].tolist())
        difference, difference_error = paired_difference(of["score"].tolist(), score[baseline].tolist())
        total = max(1.0, of["tokens"].sum())
        found.append(
            Line(
                name=name,
                clock=clock,
                cache=grid.split(name)[0],
                decoder=grid.kind(grid.split(name)[3]),
                published=grid.PUBLISHED.get(name),
                problems=score.shape[1],
                accuracy=accuracy,
                accuracy_error=accuracy_error,
                difference=difference,
                difference_error=difference_error,
                tokens_per_second=float(speed["wall"][i]),
                tokens_per_second_error=float(error["wall"][i]),
                sample_tokens_per_second=float((of["tokens"] / of["seconds"]).mean()),
                cpu_tokens_per_second=float(speed["cpu"][i]),
                cpu_tokens_per_second_error=float(error["cpu"][i]),
                nfe=float(of["nfe"].mean()),
                tokens_per_forward=float(of["tokens"].sum() / of["nfe"].sum()),
                rows_per_token=float(of["rows"].sum() / total),
                logit_rows_per_token=float(of["logit_rows"].sum() / total),
                p50=percentile(of["seconds"], 50),
                p95=percentile(of["seconds"], 95),
                frontier=bool(on[i]),
                frontier_share=float(share["wall"][i]),
                cpu_frontier_share=float(share["cpu"][i]),
                beaten_by=names[beats[i].argmax()] if beats[i].any() else None,
                beaten_share=float(beats[i].max()),
            )
        )
    return sorted(found, key=lambda line: -line.speed)


def _resampled(data: Data, clock: str, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and tokens/s of every draw, [draws, settings]."""
    n = data.rounds.max() + 1
    sums = {name: _by_round(data.columns[name], data.rounds, n) for name in ("score", "tokens", clock)}
    drawn = resamples(n, draws, seed)
    problems = drawn @ np.bincount(data.rounds)
    # Rounded: equal scores summed in another order must stay equal, for a tie is no domination.
    accuracy = np.round(drawn @ sums["score"] / problems[:, None], 12)
    return accuracy, (drawn @ sums["tokens"]) / (drawn @ sums[clock])


def _noise(speeds: np.ndarray) -> np.ndarray:
    """Of each setting: standard deviation of log(tokens/s ÷ the draw's geometric mean)."""
    logs = np.log(np.maximum(speeds, 1e-300))
    return (logs - logs.mean(axis=1, keepdims=True)).std(axis=0)


def _by_round(column: np.ndarray, rounds: np.ndarray, n: int) -> np.ndarray:
    """[settings, problems] -> sums, [rounds, settings]."""
    sums = np.zeros((n, column.shape[0]))
    np.add.at(sums, rounds, column.T)
    return sums
