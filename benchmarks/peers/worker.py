"""One program in a process of its own: reads a JSON request per line, answers with one JSON line.

    {"do": "load", "module": "engine", "arguments": {...}}   -> {"seconds", "caches", "partial_rows", "bytes_loading"}
    {"do": "prepare", "module": ..., "arguments": {...}}     -> {}
    {"do": "forward", "rows": 32, "keys": 320, "repeats": 3} -> {"seconds": [...]}
    {"do": "generate", "prompt": [...], ...}                 -> {"seconds", "token_ids", "nfe", ...}
    {"do": "memory"}                                         -> {"bytes"}
    anything that fails                                      -> {"error": "why"}

Every answer also has "idle_cpu", the CPU seconds that the process used since its last answer: a program whose threads
spin while others are measured would show here.

Memory is VmHWM, the kernel's own peak of the resident set: exact where a sampler could miss the peak, and free while
time is taken. It counts a page that is mapped, from a checkpoint or a library, once and in full. (PSS would divide such
a page among the programs that happen to run at the same time.) The peak is reset after loading, so that "bytes" is what
running needs.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path


def peak_bytes() -> int:
    """Most bytes resident since the last reset_peak()."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def reset_peak() -> None:
    """Where the kernel does not allow it, later peaks include those of loading."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as e:
        print(f"the peak of loading stays in that of running: {e}", file=sys.stderr)


class Worker:
    def __init__(self):
        self.peer = None

    def load(self, module, arguments):
        begin = time.perf_counter()
        self.peer = importlib.import_module(f"peers.{module}").Peer(**arguments)
        seconds = time.perf_counter() - begin
        loading = peak_bytes()
        reset_peak()
        return {
            "seconds": seconds,
            "caches": self.peer.caches,
            "partial_rows": self.peer.partial_rows,
            "bytes_loading": loading,
        }

    def prepare(self, module, arguments):
        importlib.import_module(f"peers.{module}").prepare(**arguments)
        return {}

    def forward(self, rows, keys, repeats):
        return {"seconds": self.peer.forward(rows, keys, repeats)}

    def generate(self, **request):
        begin = time.perf_counter()
        result = self.peer.generate(**request)
        return {"seconds": time.perf_counter() - begin, **result}

    def memory(self):
        return {"bytes": peak_bytes()}

    def answer(self, request: dict) -> dict:
        try:
            return getattr(self, request.pop("do"))(**request)
        except ModuleNotFoundError as e:
            return {"error": f"{e.name} is not installed"}
        except Exception as e:  # whatever a peer raises is its line in the table
            return {"error": f"{type(e).__name__}: {e}"}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints goes to stderr
    worker = Worker()
    answered = time.process_time()
    for line in sys.stdin:
        idle_cpu = time.process_time() - answered
        print(json.dumps({**worker.answer(json.loads(line)), "idle_cpu": idle_cpu}), file=answers, flush=True)
        answered = time.process_time()


if __name__ == "__main__":
    main()
