"""Answers on disk: every one is written as it is there, so that a run that was stopped goes on where it was.

Each process appends to a file of its own, answers-RANK.jsonl, one line an answer: {"key": ..., ...}. A line that a
sudden end cut short is dropped.
"""

import json
import os
from pathlib import Path

from dllm_ext.errors import InputError


def read(folder: Path) -> dict[str, dict]:
    """Key -> answer, from the files of all processes. InputError for one that is damaged elsewhere than at its end."""
    answers = {}
    for file in sorted(folder.glob("answers-*.jsonl")):
        *lines, _ = file.read_bytes().split(b"\n")  # what follows the last line break was not written to its end
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line)
                answers[answer.pop("key")] = answer
            except (ValueError, KeyError, AttributeError):
                raise InputError(f"{file}, line {number} is no answer of this program: delete the line") from None
    return answers


class Journal:
    """The file of one process, open for appending."""

    def __init__(self, folder: Path, rank: int):
        """Opens the file and drops what is no whole line at its end."""
        self._file = (folder / f"answers-{rank}.jsonl").open("a+b")
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def add(self, key: str, answer: dict) -> None:
        """Append one answer; it is on disk when this returns."""
        self._file.write(json.dumps({"key": key, **answer}, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
