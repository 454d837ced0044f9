"""The task a sweep runs on: examples with a prompt, and a score.

mini-gsm needs nothing; every other task is evaluation/tasks.py's, so lm-evaluation-harness's prompts and scores.
"""

from dataclasses import dataclass, field

from mini_gsm.data import final_answer, held_out

GEN_LENGTH = {"mini-gsm": 64}  # other tasks: configs/tasks.yaml


@dataclass(frozen=True)
class Example:
    """One problem. Its prompt is what Engine.generate takes."""

    index: int
    prompt: str | list[int]
    answer: object  # whatever the task scores by
    until: list[str] = field(default_factory=list)


class MiniGSM:
    """Held-out problems of benchmarks/mini_gsm, scored by the number behind "####"."""

    metric = "exact_match"

    def __init__(self, n: int, seed: int = 4242):
        self.examples = [Example(i, p.question, p.answer) for i, p in enumerate(held_out(n, seed))]

    def score(self, example: Example, text: str) -> dict[str, float]:
        return {self.metric: float(final_answer(text) == final_answer(example.answer))}


class Harness:
    """A task of evaluation/tasks.py. Prompts are chats where the model has a chat template, as eval.py asks them."""

    def __init__(self, name: str, n: int, path: str | None, tokenizer):
        from evaluation.tasks import Examples

        chat = tokenizer.render_chat if tokenizer.has_chat_template else None
        self._task = Examples(name, n, path, chat_template=chat)
        self.metric = self._task.metric
        self.examples = [
            Example(e.index, tokenizer.encode(e.prompt, add_special_tokens=chat is None), e, e.until)
            for e in self._task.examples
        ]

    def score(self, example: Example, text: str) -> dict[str, float]:
        return self._task.score(example.answer, text)


def gen_length(name: str) -> int:
    """How many tokens an answer may have. ValueError where there is no such task, so before a model is loaded."""
    if name in GEN_LENGTH:
        return GEN_LENGTH[name]
    try:
        from evaluation.settings import table
    except ImportError as e:
        raise ValueError(f"task {name!r} is not {', '.join(GEN_LENGTH)}, and others need {e.name}") from None
    known = {task: entry for task, entry in table()["tasks"].items() if not entry.get("code")}
    if name not in known:  # programs are run and scored in eval.py's sandbox
        raise ValueError(f"task {name!r} does not exist, or its answers are programs; there are {', '.join(known)}")
    return known[name]["gen_length"]


def load(name: str, n: int, path: str | None = None, tokenizer=None) -> MiniGSM | Harness:
    """The task of that name with its first n examples. path: of its data, where they are not in the hub's cache."""
    gen_length(name)
    return MiniGSM(n) if name == "mini-gsm" else Harness(name, n, path, tokenizer)
