"""Answers on disk: every one is written as it is there, so that a run that was stopped goes on where it was.

Each process appends to a file of its own, answers-RANK.jsonl, one line an answer: {"key": ..., "settings": ..., ...}. A
line that a sudden end cut short is dropped.
"""

import json
import os
from pathlib import Path

from dllm_ext.errors import InputError


def read(folder: Path, settings: str) -> dict[str, dict]:
    """Key -> answer, from the files of all processes.

    settings: a name of those that the answers must have been computed with: a key says what was asked, not how it is
        answered.

    InputError for a file that is damaged elsewhere than at its end, or has answers of other settings.
    """
    answers = {}
    for file in sorted(folder.glob("answers-*.jsonl")):
        *lines, _ = file.read_bytes().split(b"\n")  # what follows the last line break was not written to its end
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line)
                key, of = answer.pop("key"), answer.pop("settings")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{file}, line {number} is no answer of this program: delete the line") from None
            if of != settings:
                raise InputError(f"{file} has answers of a command with other settings: give another folder as out=")
            answers[key] = answer
    return answers


class Journal:
    """The file of one process, open for appending."""

    def __init__(self, folder: Path, rank: int, settings: str):
        """Opens the file and drops what is no whole line at its end. settings: see read."""
        self._settings = settings
        self._file = (folder / f"answers-{rank}.jsonl").open("a+b")
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def add(self, key: str, answer: dict) -> None:
        """Append one answer; it is on disk when this returns."""
        line = {"key": key, "settings": self._settings, **answer}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
