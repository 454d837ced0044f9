"""Executes one program inside the sandbox that confine.py has set up: `python -c <this file> RESULT_FD FOLDER...`.

A program counts as passed when the evaluator receives a token, so everything here serves one question: what can the
program do to send the token without having run to its end? It shares this interpreter, hence:

* It never meets the token as it comes in: standard input is read, closed and replaced by /dev/null before it runs.
* While it runs no Python frame, no module and no argument holds the token. The calls that are left (execute the next
  part, send the token, exit) are `functools.partial` objects that a `map` works off in C; the list of them lies on the
  stack of the C calls, where `sys._getframe()`, tracebacks and signal handlers see nothing.
* What could find them there all the same (the gc module's lists, ctypes) raises audit events, and the hook below, which
  cannot be taken out again, refuses them; /proc/self/mem cannot be opened in the sandbox. So does a trace function,
  which could make the program jump over its tests.
* The last calls follow the last statement of the program directly, so atexit handlers, excepthooks, `__del__` and a
  replaced `os._exit` have no say; the originals were bound before the program ran.
* Parts are compiled one by one: an open string or a decorator at the end of a completion cannot swallow the tests.

What this cannot prevent: the program is in one process with its tests, so it can return an object that equals
everything, and private interpreter interfaces may give it memory access. It is made for the output of models that were
asked to solve a problem; the other walls (confine.py) do not depend on the interpreter.
"""

import collections
import functools
import marshal
import os
import sys


def refuse(event, arguments):
    if event.startswith("ctypes."):
        raise ImportError("ctypes is not allowed in the sandbox")  # libraries such as numpy can do without
    if event in {"gc.get_objects", "gc.get_referents", "gc.get_referrers", "sys.settrace"}:
        raise PermissionError(f"{event} is not allowed in the sandbox")


def calls(result):
    """All that remains to be done, in order. A function of its own, so that its locals are gone when the first runs."""
    with open(0, "rb", buffering=0) as stdin:
        token, parts = marshal.loads(stdin.readall())
    os.open("/dev/null", os.O_RDONLY)  # the lowest free number: standard input again
    # As in the published harnesses the namespace has no __name__, so `if __name__ == "__main__":` does not run.
    namespace = {}
    codes = [compile(part, f"<part {i}>", "exec", dont_inherit=True) for i, part in enumerate(parts)]
    return [
        *(functools.partial(exec, code, namespace) for code in codes),
        functools.partial(os.write, result, token),
        functools.partial(os._exit, 0),
    ]


sys.path[:] = [*(p for p in sys.path if p), *sys.argv[2:]]  # without the current folder
sys.addaudithook(refuse)
del refuse
collections.deque(map(functools.partial.__call__, calls(int(sys.argv[1]))), maxlen=0)
