"""The task a sweep runs on: examples with a prompt, and a score."""

from dataclasses import dataclass, field

from mini_gsm.data import final_answer, held_out


@dataclass(frozen=True)
class Example:
    """One problem."""

    index: int
    prompt: str
    answer: str
    until: list[str] = field(default_factory=list)


class MiniGSM:
    """Held-out problems of benchmarks/mini_gsm, scored by the number behind "####"."""

    metric = "exact_match"

    def __init__(self, n: int, seed: int = 4242):
        self.examples = [Example(i, p.question, p.answer) for i, p in enumerate(held_out(n, seed))]

    def score(self, example: Example, text: str) -> dict[str, float]:
        return {self.metric: float(final_answer(text) == final_answer(example.answer))}


def load(name: str, n: int) -> MiniGSM:
    """The task of that name with its first n examples."""
    if name != "mini-gsm":
        raise ValueError(f"task {name!r} does not exist: there is mini-gsm")
    return MiniGSM(n)
