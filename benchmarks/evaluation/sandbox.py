"""Runs model-written Python programs, which are hostile until shown otherwise, each in a sandbox of its own.

    for outcome in run_all(programs, workers=2): ...
    protections()                                       # for the results file: what was in force

A program runs in a fresh interpreter (standard library only) with an empty environment, in an empty folder, without
network, other processes, or files of anybody else; with limits on time, memory and disk. confine.py says how, and what
each layer is for; runner.py says why "passed" cannot be had by leaving early. Before the first program runs, a
self-test tries the forbidden things on this machine. Where the protection is not to be had, nothing runs: ConfigError.
"""

import contextlib
import functools
import json
import marshal
import math
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dllm_ext.errors import ConfigError

__all__ = ["Outcome", "Program", "protections", "run", "run_all"]

CONFINE = Path(__file__).with_name("confine.py")
LAYERS = ("landlock", "namespaces")  # those that a machine may lack; the tests take them away

# One source, or parts that are compiled each on its own and executed one after another in one namespace.
Program = str | Sequence[str]

START_SECONDS = 60.0  # to set the sandbox up, on a machine that is busy
KEPT_BYTES = 16 << 10  # of what a program writes to stderr, from its end
REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Outcome:
    """passed: the program ran to its end. seconds: from the end of the sandbox's setup to the end of the process."""

    passed: bool
    reason: str
    seconds: float


def run(
    program: Program, *, timeout: float = 10.0, memory_mb: int = 1024, path: Sequence[str | os.PathLike] = ()
) -> Outcome:
    """Execute a program; it passes if it reaches its end.

    `timeout` is in seconds on the wall clock; `memory_mb` bounds the address space. `path` names folders to be added to
    the program's sys.path, e.g. site-packages for programs that use numpy; the program may read all in them.
    """
    protections()
    return _run(program, _Limits(timeout, memory_mb, path), threading.Event())


def run_all(
    programs: Sequence[Program],
    workers: int,
    *,
    timeout: float = 10.0,
    memory_mb: int = 1024,
    path: Sequence[str | os.PathLike] = (),
) -> Iterator[Outcome]:
    """The outcomes of `programs`, in their order, as they become known; `workers` programs run at a time.

    An exception, Ctrl-C among them, or a caller that stops iterating ends the programs that are running.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    limits = _Limits(timeout, memory_mb, path)
    protections()
    return _outcomes(programs, workers, limits)


def _outcomes(programs, workers, limits):
    cancelled = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(lambda program: _run(program, limits, cancelled), programs)
        finally:
            cancelled.set()


@functools.cache
def protections() -> dict[str, bool | str]:
    """What guards programs on this machine, after a test of it. ConfigError if that is not enough to run any."""
    if sys.platform != "linux":
        raise ConfigError(f"the sandbox for model-written programs needs Linux (seccomp), this is {sys.platform}")
    with tempfile.TemporaryDirectory(prefix="dllm-sandbox-") as outside:
        outcome, report = _execute([SELF_TEST.format(outside=outside)], _Limits(), threading.Event())
    if not outcome.passed:
        raise ConfigError(f"the sandbox for model-written programs does not hold on this machine: {outcome.reason}")
    libraries = "the interpreter and its libraries"
    return {
        "network": "none: seccomp" + (", own network namespace" if report["namespaces"] else ""),
        "processes": "one, with one thread: seccomp",
        "signals": "none, no timers: seccomp",
        "reading": f"{libraries}: Landlock" if report["landlock"] else "what the user may read, without /proc",
        "writing": "16 MiB in a tmpfs of its own: Landlock" if report["writable"] else "nothing: seccomp",
        "capabilities": "none" if report["capabilities"] else "those of the container's root",
        "limits": "time, CPU time, memory, file size, open files",
        "seccomp": True,
        "landlock": f"version {report['landlock']}" if report["landlock"] else False,
        "namespaces": ("user, network, mount, IPC" if report["mounts"] else "user, network, IPC")
        if report["namespaces"]
        else False,
    }


# Each line is a promise that the kernel, or what poses as one, could break without an error during setup.
SELF_TEST = """
import os, socket

def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return True
    return False

assert refused(socket.socket), "a socket could be opened"
assert refused(os.fork), "a process could be started"
assert refused(os.kill, os.getppid(), 0), "the evaluator could be signalled"
assert refused(os.listdir, "/proc/self") or not os.listdir("/proc"), "/proc could be read"
assert refused(os.open, "{outside}/file", os.O_CREAT | os.O_WRONLY), "a file outside could be written"
allowed = {{"PYTHONHASHSEED", "OPENBLAS_NUM_THREADS", "TMPDIR", "LC_CTYPE"}}
assert set(os.environ) <= allowed, "the environment came along"
"""


@dataclass(frozen=True)
class _Limits:
    timeout: float = 10.0
    memory_mb: int = 1024
    path: Sequence[str | os.PathLike] = ()

    def __post_init__(self):
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"timeout must be a positive number of seconds, got {self.timeout}")
        if self.memory_mb < 64:
            raise ConfigError(f"memory_mb must be at least 64 (the interpreter itself), got {self.memory_mb}")


def _run(program, limits, cancelled):
    return _execute([program] if isinstance(program, str) else list(program), limits, cancelled)[0]


def _execute(parts: list[str], limits: _Limits, cancelled: threading.Event) -> tuple[Outcome, dict]:
    """The outcome, and confine.py's report of the layers in force."""
    token = secrets.token_hex(16).encode()  # TOKEN_BYTES of runner.py
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dllm-sandbox-"))
        result, result_end = os.pipe()
        stack.callback(os.close, result)
        errors, errors_end = os.pipe()
        stack.callback(os.close, errors)
        with contextlib.ExitStack() as child_side:
            child_side.callback(os.close, result_end)
            child_side.callback(os.close, errors_end)
            # Not a pipe: nothing to be written while the program reads, and nobody to wait for if it does not.
            source = child_side.enter_context(open(os.memfd_create("program"), "w+b"))
            source.write(token + marshal.dumps(parts))
            source.seek(0)
            order = {
                "result": result_end,
                "folder": folder,
                "memory": limits.memory_mb << 20,
                "seconds": math.ceil(limits.timeout) + 2,
                "path": [os.path.abspath(p) for p in limits.path],
                "parent": os.getpid(),
                "layers": LAYERS,
            }
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", CONFINE, json.dumps(order)],
                stdin=source,
                stdout=subprocess.DEVNULL,
                stderr=errors_end,
                pass_fds=(result_end,),
                env={},
                cwd=folder,
                start_new_session=True,  # Ctrl-C is for the evaluator, which then ends the program
            )
            stack.callback(_end, process)
        return _watch(process, result, errors, token, parts, limits.timeout, cancelled)


def _end(process):
    process.kill()  # SIGKILL cannot be ignored, and there is no second process: seccomp
    process.wait()


def _watch(process, result, errors, token, parts, timeout, cancelled):
    """Read both pipes until the process has ended or its time is over."""
    received = {result: b"", errors: b""}
    started = time.monotonic()
    deadline, report, expired = started + START_SECONDS, None, False
    with selectors.DefaultSelector() as selector:
        for pipe in received:
            selector.register(pipe, selectors.EVENT_READ)
        while process.returncode is None and not (expired or cancelled.is_set()):
            slice_ = max(0.0, min(0.1, deadline - time.monotonic()))  # short, to see a cancellation
            if selector.get_map():
                for key, _ in selector.select(slice_):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fd)
                    # A program may write for as long as it runs; the start of one and the end of the other count.
                    kept = received[key.fd] + data
                    received[key.fd] = kept[:KEPT_BYTES] if key.fd == result else kept[-KEPT_BYTES:]
            else:  # it has ended, or it has closed its pipes
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(slice_)
            if report is None and b"\n" in received[result]:
                line, _, received[result] = received[result].partition(b"\n")
                report = json.loads(line)
                started = time.monotonic()
                deadline = started + timeout
            expired = time.monotonic() >= deadline
    seconds = time.monotonic() - started
    stderr = received[errors].decode("utf-8", "replace")
    if cancelled.is_set():
        return Outcome(False, "cancelled", seconds), {}
    if report is None or "error" in report:
        why = report["error"] if report else "; ".join(stderr.splitlines()[-1:]) or f"status {process.returncode}"
        raise ConfigError(f"the sandbox for model-written programs cannot be set up: {why}")
    if process.returncode == 0 and received[result] == token:
        return Outcome(True, "passed", seconds), report
    return Outcome(False, _reason(process.returncode, stderr, parts), seconds), report


def _reason(status, stderr, parts):
    """Why a program did not pass. What it wrote itself counts here, and only here."""
    if status is None:
        return "timed out"
    if status < 0:
        return f"killed by signal {-status} ({signal.Signals(-status).name})"
    lines = stderr.splitlines()
    ends = [i for i in range(1, len(lines)) if lines[i - 1].startswith("  ") and not lines[i].startswith(" ")]
    if status == 0 or not ends:
        return f"left before its end with status {status}"
    error = lines[ends[-1]]  # the line below the traceback; a message may have more
    if error.startswith("MemoryError"):
        return "out of memory"
    if error.startswith("AssertionError"):
        error = "assertion failed" + (error.removeprefix("AssertionError") or f": {_last_line(stderr, parts)}")
    return "".join(c if c.isprintable() else " " for c in error)[:REASON_CHARACTERS]


def _last_line(stderr, parts):
    """The source line of the innermost frame: most tests assert without a message."""
    where = re.findall(r'^  File "<part (\d+)>", line (\d+)', stderr, re.MULTILINE)
    try:
        part, line = map(int, where[-1])
        return parts[part].splitlines()[line - 1].strip()
    except (IndexError, ValueError):  # not a traceback of Python's
        return "?"
