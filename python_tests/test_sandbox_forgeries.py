"""benchmarks/evaluation: a program passes only if it ran to its end, whatever it does to look as if it had."""

import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux"),
]
sys.path.insert(0, str(BENCHMARKS))

from evaluation import sandbox  # noqa: E402

FORGERIES = {
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit",
    "exec of another program": "import os, sys; os.execv(sys.executable, ['python', '-I', '-S', '-c', ''])",
    "printing": "print('passed'); print('ok', file=__import__('sys').stderr)\nraise SystemExit(0)",
    "atexit": "import atexit, os; atexit.register(os._exit, 0)",
    "excepthook": "import os, sys; sys.excepthook = lambda *_: os._exit(0)",
    "unraisablehook": "import os, sys; sys.unraisablehook = sys.excepthook = lambda *_: os._exit(0)",
    "replaced AssertionError": "import builtins; builtins.AssertionError = Warning",
    "replaced builtins": """
        import builtins, os
        for name in ("exec", "compile", "print", "map", "open", "SystemExit", "BaseException", "PermissionError"):
            setattr(builtins, name, lambda *_, **__: os._exit(0))
    """,
    "replaced os": "import os; os.write = lambda *_: 0; leave = os._exit; os._exit = lambda _: leave(0)",
    "replaced modules": """
        import sys, functools, collections
        collections.deque = functools.partial = lambda *_, **__: sys.exit(0)
        sys.modules.clear()
    """,
    "a signal's handler": """
        import os, signal
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        signal.raise_signal(signal.SIGTERM)
    """,
    "closed pipes": "import os; os.closerange(1, 64)",
    "noise in all pipes": """
        import os
        for fd in range(64):
            for text in (b"", b"passed\\n", b"{}\\n", b"0" * 32):
                try:
                    os.write(fd, text)
                except OSError:
                    pass
    """,
    "its pipe read back": """
        import os, sys
        for fd in range(64):
            try:
                os.set_blocking(fd, False)
                data = os.read(fd, 1000)
            except OSError:
                continue
            for to in range(64) if data else ():
                try:
                    os.write(to, data)
                except OSError:
                    pass
        sys.exit(0)
    """,
    "its own end called again": """
        import __main__, os, sys
        for fd in range(3, 64):
            try:
                os.write(fd, __main__.token())
            except Exception:
                pass
        sys.exit(0)
    """,
    "a frame that jumps": """
        import sys
        def jump(frame, event, _):
            if event == "line" and "FAILS" in frame.f_code.co_names:
                frame.f_lineno = 2
            return jump
        sys._getframe().f_trace = jump
        sys.settrace(jump)
    """,
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_do_not_pass(name):
    code = textwrap.dedent(FORGERIES[name])
    for program in (f"{code}\nFAILS = 0\nassert FAILS\n", (code + "\n", "FAILS = 0\nassert FAILS\n")):
        outcome = sandbox.run(program)
        assert not outcome.passed and outcome.reason != "timed out"


SEARCH = """
import functools, os, re, sys
token = re.compile("[0-9a-f]{32}")
attributes = '''
    __dict__ __closure__ __defaults__ __self__ __func__ __wrapped__ __code__ __slots__ __bases__ cell_contents f_back
    f_locals f_globals f_builtins f_code co_consts tb_frame tb_next gi_frame func args keywords
'''.split()
todo, seen, found = [sys.modules, sys._current_frames()], {}, []
try:
    1 / 0
except ZeroDivisionError as e:
    todo.append(e.__traceback__.tb_frame)
while todo:
    x = todo.pop()
    if id(x) in seen or any(x is mine for mine in (seen, todo, found)):
        continue
    seen[id(x)] = x
    if isinstance(x, (str, bytes)) and token.fullmatch(x if isinstance(x, str) else x.decode("latin1")):
        found.append(x)
    if isinstance(x, functools.partial) and x.func in (os.write, os._exit, exec):
        found.append(x)
    if isinstance(x, dict):
        todo += [*x.keys(), *x.values()]
    elif isinstance(x, (list, tuple, set, frozenset)):
        todo += x
    for name in attributes:
        try:
            todo.append(object.__getattribute__(x, name))
        except (AttributeError, ValueError, TypeError):
            pass
    if isinstance(x, type):
        todo += type.__subclasses__(x)
"""


def test_the_token_is_nowhere_to_be_found(tmp_path, monkeypatch):
    """All that a program reaches without the gc module: modules, frames, tracebacks, and the attributes of these."""
    outcome = sandbox.run(SEARCH + "assert len(seen) > 5000 and not found, (len(seen), found)", timeout=30)
    assert outcome.passed, outcome.reason
    # Nor does the gc module find it, would the hook let it.
    for name in ("confine.py", "runner.py"):
        text = (BENCHMARKS / "evaluation" / name).read_text()
        assert name == "confine.py" or "\nsys.addaudithook(refuse)\n" in text
        (tmp_path / name).write_text(text.replace("\nsys.addaudithook(refuse)\n", "\n"))
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "CONFINE", tmp_path / "confine.py")
        listed = SEARCH.replace("while todo", "import gc\ngc.collect()\ntodo += gc.get_objects()\nwhile todo")
        listed = listed.replace(
            "    if isinstance(x, type)", "    todo += gc.get_referents(x)\n    if isinstance(x, type)"
        )
        outcome = sandbox.run(listed + "assert len(seen) > 10000 and not found, (len(seen), found)", timeout=60)
        assert outcome.passed, outcome.reason
    # The search does find a token that lies about.
    planted = "import functools, os\ndef f(p=[functools.partial(os.write, 9, b'0123456789abcdef' * 2)]): pass\n"
    outcome = sandbox.run(planted + SEARCH + "assert len(found) == 2, found", timeout=30)
    assert outcome.passed, outcome.reason


@pytest.mark.parametrize(
    "search",
    [
        "import gc; gc.get_objects()",
        "import gc, os; gc.get_referrers(os.write)",
        "import gc, sys; gc.unfreeze(); gc.get_referents(sys._getframe())",
        "import ctypes; ctypes.string_at(id(ctypes), 100)",
        "import _testcapi; _testcapi.get_args",
        "import _xxsubinterpreters as i; i.run_string(i.create(), '')",
        "import _interpreters as i; i.run_string(i.create(), '')",
        "from importlib.util import find_spec\nimport _imp\n_imp.create_dynamic(find_spec('_ctypes'))",
        "import _ctypes; _ctypes.PyObj_FromPtr(id(_ctypes)); _ctypes.dlopen(None, 0)",
        "open('/proc/self/mem', 'rb')",
        "import sys; sys.settrace(print)",
    ],
)
def test_the_ways_to_search_memory_are_closed(search):
    outcome = sandbox.run(search)
    refusals = ("not allowed", "Error: [Errno", "ModuleNotFoundError")
    assert not outcome.passed and any(refusal in outcome.reason for refusal in refusals), outcome.reason
    # Nor after an attempt to get the hook out of the way.
    tricks = "import builtins\nbuiltins.PermissionError = builtins.ImportError = lambda *_: None\n"
    assert not sandbox.run(tricks + search).passed
