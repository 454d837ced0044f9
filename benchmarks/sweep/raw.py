"""A sweep's raw data: one line for the plan, then one for every turn of a setting at a round's problems."""

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

FILE = "raw.jsonl"


class RunError(RuntimeError):
    """A folder whose data belong to another run, or are no data."""


@dataclass(frozen=True)
class Plan:
    """What fixes a run's results: two runs with the same plan differ in seconds only."""

    model: str
    task: str
    metric: str
    problems: int
    per_round: int
    gen_length: int
    dtype: str
    quantization: str | None
    threads: int
    seed: int
    settings: list[str]

    def groups(self) -> list[range]:
        """The rounds: which problems each has."""
        starts = range(0, self.problems, self.per_round)
        return [range(start, min(start + self.per_round, self.problems)) for start in starts]

    def order(self, round_index: int) -> list[str]:
        """The settings in the order of their turns."""
        shuffled = list(self.settings)
        random.Random(f"{self.seed} {round_index}").shuffle(shuffled)
        return shuffled


def file_in(folder: Path) -> Path | None:
    """The folder's data, packed or not."""
    return next((f for f in (folder / FILE, folder / f"{FILE}.gz") if f.exists()), None)


def read(file: Path) -> tuple[dict, list[dict]]:
    """Header and turns. RunError where they are none; half a line at the end, of a run that was killed, is left out."""
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        header, *turns = [json.loads(line) for line in lines]
        Plan(**header["plan"])
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{file} does not hold the data of a sweep") from None
    return header, turns
