"""The driver's end of a worker: starts it, asks, and tells a failed program from a failed driver."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]


class PeerError(Exception):
    """The program cannot be measured; the message is the reason for its line in the table."""


class Process:
    """A worker. The idle time of all its waits, and the CPU time that it used in them, are added up."""

    def __init__(self, threads: int):
        path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in close)
        self.idle_seconds = self.idle_cpu = 0.0
        self.answered = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
        )

    def ask(self, do: str, **arguments) -> dict:
        """The answer to one request. PeerError if the program failed or died."""
        if self.answered is not None:
            self.idle_seconds += time.perf_counter() - self.answered
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"exited with {self.process.wait()}: {self.last_words()}")
        answer = json.loads(line)
        if self.answered is not None:
            self.idle_cpu += answer["idle_cpu"]
        self.answered = time.perf_counter()
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def last_words(self) -> str:
        self.stderr.seek(0)
        lines = [line.strip() for line in self.stderr if line.strip()]
        return lines[-1] if lines else "without a word"

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stderr.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
