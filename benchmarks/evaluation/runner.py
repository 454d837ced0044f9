"""Executes one program inside the sandbox that confine.py has set up: `python -c <this file> RESULT_FD FOLDER...`.

A program counts as passed when the evaluator receives a token, so everything here serves one question: what can the
program do to send the token without having run to its end? It shares this interpreter, hence:

* The program cannot read the token where it came from: standard input is closed and replaced before it runs.
* While it runs no variable, argument, container or module holds the token. It is an operand of the last line below that
  waits for the other one, on the value stack of a frame that executes, which neither `sys._getframe()`, tracebacks and
  signal handlers show nor the gc module's lists; /proc/self/mem cannot be opened in the sandbox.
* What could read memory all the same (ctypes, the interpreter's test modules, subinterpreters, which would not have the
  hook), and a trace function, which could make the program jump over its tests, raise audit events, and the hook below,
  which cannot be taken out, refuses them.
* The rest of the line follows the program's last statement directly, with functions that were looked up before, so
  atexit handlers, excepthooks, `__del__` and a replaced `os._exit` have no say.
* Parts are compiled one by one: an open string or a decorator at the end of a completion cannot swallow the tests.

What this cannot prevent: the program is in one process with its tests, so it can return an object that equals
everything, and who knows the interpreter well gets around the hook (from Python 3.13, for one, a finalizer that happens
to run while the hook does can write its variables). It is made for the answers of models that were asked to solve a
problem. The walls around the process (confine.py) do not depend on any of this.
"""

import marshal
import os
import sys
from collections import deque
from itertools import repeat

TOKEN_BYTES = 32


def refuse(event, arguments):
    if event.startswith("ctypes.") or (
        event == "import" and arguments[0].rpartition(".")[2].startswith(("_ctypes", "_interp", "_test", "_xx"))
    ):
        raise ImportError("access to memory is not allowed in the sandbox")  # numpy can do without ctypes
    if event in {"gc.get_objects", "gc.get_referents", "gc.get_referrers", "sys.settrace"}:
        raise PermissionError(f"{event} is not allowed in the sandbox")


def programs():
    parts = marshal.loads(os.pread(0, os.fstat(0).st_size, TOKEN_BYTES))
    return [compile(part, f"<part {i}>", "exec", dont_inherit=True) for i, part in enumerate(parts)]


def token():
    read = os.pread(0, TOKEN_BYTES, 0)
    os.close(0)
    os.open("/dev/null", os.O_RDONLY)  # becomes number 0
    return read


result = int(sys.argv[1])
sys.path[:] = [*(p for p in sys.path if p), *sys.argv[2:]]  # without the current folder
codes = programs()
sys.addaudithook(refuse)
del refuse
# As in the published harnesses the namespace has no __name__, so `if __name__ == "__main__":` does not run.
os._exit(os.write(result, token() + bytes(deque(map(exec, codes, repeat({})), maxlen=0))) - TOKEN_BYTES)
