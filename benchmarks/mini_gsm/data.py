"""Deterministic generator of small grade-school word problems with written, step-by-step answers.

A problem is a question, an answer whose every step is one equation ("He buys 5: 12 + 5 = 17."), and a key. The key
names the family and every number of the problem but not its names, objects or wording; a hash of the key puts it in the
training or the held-out split. So no held-out combination of numbers is ever trained on, in any wording.

Two properties of the answers matter for measuring decoders:

* steps depend on each other: the result of one is an operand of a later one, so an answer committed out of order, or
  several dependent tokens at once, goes wrong in a way that exact match sees;
* every number in an answer is preceded by a space, so the tokenizer gives each value one token in one form.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

MAX_VALUE = 50  # every number that occurs, given or computed, is between 1 and this
MAX_START = 20  # what somebody has at first
MAX_CHANGE = 10  # what one event adds or takes away
HELD_OUT_ONE_IN = 20

NAMES = [
    ("Tom", "he"), ("Ben", "he"), ("Sam", "he"), ("Max", "he"), ("Leo", "he"), ("Jack", "he"), ("Paul", "he"),
    ("Adam", "he"), ("Noah", "he"), ("Omar", "he"), ("Ana", "she"), ("Mia", "she"), ("Zoe", "she"), ("Eva", "she"),
    ("Lily", "she"), ("Emma", "she"), ("Sara", "she"), ("Nina", "she"), ("Julia", "she"), ("Rosa", "she"),
]  # fmt: skip
ITEMS = [
    "apples", "coins", "cards", "shells", "toys", "eggs", "balls", "stones", "books", "pens", "oranges", "cookies",
    "stickers", "marbles", "pencils", "flowers", "stamps", "candies", "beads", "buttons",
]  # fmt: skip
GOODS = ["pens", "books", "toys", "cakes", "hats", "cards", "mugs", "balls", "kites", "bags", "lamps", "shirts"]
CONTAINERS = ["boxes", "bags", "baskets", "jars", "trays"]
GAIN = ["buys", "finds", "gets", "wins", "makes"]
LOSE = ["loses", "sells", "uses"]


@dataclass(frozen=True)
class Problem:
    """One word problem; `key` identifies its numbers and operations, whatever its wording."""

    question: str
    answer: str
    key: str
    family: str


class Chain:
    """Builds an answer step by step and keeps the numbers in range; `ok` turns false when a step leaves it."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.key: list[str] = []
        self.ok = True

    def step(self, lead: str, left: int, op: str, right: int) -> int:
        """Appends "lead left op right = result." and returns the result."""
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // max(right, 1)}[op]
        exact = op != "/" or (right > 0 and left % right == 0)
        self.ok = self.ok and exact and 1 <= result <= MAX_VALUE
        self.steps.append(f"{lead} {left} {op} {right} = {result}.")
        self.key.append(f"{left}{op}{right}")
        return result

    def answer(self, value: int) -> str:
        return " ".join([*self.steps, f"#### {value}"])


def _people(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """`count` different people as (name, pronoun, capitalised pronoun)."""
    return [(name, pronoun, pronoun.capitalize()) for name, pronoun in rng.sample(NAMES, count)]


def _then(rng: random.Random, pronoun: str) -> str:
    """A subject for the next event, sometimes with a time word."""
    return rng.choice([pronoun.capitalize(), pronoun.capitalize(), f"Then {pronoun}", f"Later {pronoun}"])


def _lead(chain: Chain) -> str:
    """The word that opens a step which needs no more than that."""
    return "Then" if chain.steps else "So"


def inventory(rng: random.Random) -> tuple[str, Chain, int]:
    """One person's things, gained and lost in the order told."""
    (name, pronoun, _), (other, _, _) = _people(rng, 2)
    item = rng.choice(ITEMS)
    value = rng.randint(2, MAX_START)
    chain = Chain()
    told = [rng.choice([f"{name} has {value} {item}.", f"{name} starts with {value} {item}."])]
    for index in range(rng.choice([1, 2, 2, 3, 3, 4, 4, 5])):
        subject, lead = _then(rng, pronoun), f"So {pronoun}" if index == 0 else pronoun.capitalize()
        kind = rng.random()
        if (kind < 0.5 and value < MAX_VALUE - MAX_CHANGE) or value < 5:
            amount, verb = rng.randint(2, MAX_CHANGE), rng.choice(GAIN)
            told.append(f"{subject} {verb} {amount} {rng.choice(['more', 'more', item, f'more {item}'])}.")
            value = chain.step(f"{lead} {verb} {amount}:", value, "+", amount)
        else:
            amount = rng.randint(2, min(MAX_CHANGE, value - 1))
            if rng.random() < 0.3:
                verb = "gives"
                told.append(f"{subject} gives {amount}{rng.choice(['', ' ' + item])} to {other}.")
            else:
                verb = rng.choice(LOSE)
                told.append(f"{subject} {verb} {amount}{rng.choice(['', ' of them', ' ' + item])}.")
            value = chain.step(f"{lead} {verb} {amount}:", value, "-", amount)
    ask = [
        f"How many {item} does {name} have now?",
        f"How many {item} does {pronoun} have left?",
        f"How many {item} does {name} have in the end?",
    ]
    return " ".join([*told, rng.choice(ask)]), chain, value


def compare(rng: random.Random) -> tuple[str, Chain, int]:
    """Three people, each described relative to the one before; the last one's things or all together are asked."""
    people = _people(rng, 3)
    item = rng.choice(ITEMS)
    held = [rng.randint(3, MAX_START)]
    chain = Chain()
    told = [f"{people[0][0]} has {held[0]} {item}."]
    for (name, _, _), (before, _, _) in zip(people[1:], people, strict=False):
        value, kind, short = held[-1], rng.random(), rng.random() < 0.5
        noun = "" if short else f" {item}"
        if kind < 0.35:
            amount = rng.randint(2, MAX_CHANGE)
            told.append(f"{name} has {amount} more{noun} than {before}.")
            held.append(chain.step(_lead(chain), value, "+", amount))
        elif kind < 0.7:
            amount = rng.randint(1, min(MAX_CHANGE, max(1, value - 1)))
            told.append(f"{name} has {amount} fewer{noun} than {before}.")
            held.append(chain.step(_lead(chain), value, "-", amount))
        else:
            told.append(f"{name} has twice as many{noun} as {before}.")
            held.append(chain.step(_lead(chain), value, "*", 2))
    last = people[-1][0]
    if rng.random() < 0.6:
        told.append(rng.choice([f"How many {item} do they have in total?", f"How many {item} do they have together?"]))
        total = held[0]
        for value in held[1:]:
            total = chain.step("Together" if total == held[0] else "Then", total, "+", value)
        chain.key.append("total")
        return " ".join(told), chain, total
    told.append(f"How many {item} does {last} have?")
    return " ".join(told), chain, held[-1]


def shopping(rng: random.Random) -> tuple[str, Chain, int]:
    """Prices times counts, added up, and taken from a purse."""
    [(name, pronoun, subject)] = _people(rng, 1)
    chain, told, costs = Chain(), [], []
    goods = rng.sample(GOODS, rng.choice([1, 2, 2]))
    purse = rng.randint(MAX_START, MAX_VALUE)
    asks_left = rng.random() < 0.7
    if asks_left:
        told.append(f"{name} has {purse} dollars.")
    for good in goods:
        count, price = rng.randint(2, 9), rng.randint(2, 9)
        who = name if not told else subject
        told.append(
            rng.choice(
                [
                    f"{who} buys {count} {good} for {price} dollars each.",
                    f"{who} buys {count} {good} that cost {price} dollars each.",
                ]
            )
        )
        costs.append(chain.step(_lead(chain), count, "*", price))
    total = costs[0]
    if len(costs) > 1:
        total = chain.step("Together", costs[0], "+", costs[1])
    if not asks_left:
        told.append(rng.choice([f"How many dollars does {pronoun} spend?", f"How much does {name} pay in total?"]))
        return " ".join(told), chain, total
    told.append(
        rng.choice([f"How many dollars does {pronoun} have left?", f"How much money does {name} have in the end?"])
    )
    return " ".join(told), chain, chain.step(f"{subject} has", purse, "-", total)


def boxes(rng: random.Random) -> tuple[str, Chain, int]:
    """Equal groups filled, changed, and shared out equally."""
    [(name, pronoun, subject)] = _people(rng, 1)
    item, container = rng.choice(ITEMS), rng.choice(CONTAINERS)
    count, each = rng.randint(2, 9), rng.randint(2, 9)
    chain = Chain()
    told = [
        rng.choice(
            [
                f"{name} has {count} {container} with {each} {item} in each.",
                f"{name} fills {count} {container} with {each} {item} each.",
            ]
        )
    ]
    value = chain.step("So they hold", count, "*", each)
    for _ in range(rng.choice([1, 1, 2])):
        amount = rng.randint(2, MAX_CHANGE)
        if rng.random() < 0.5:
            verb = rng.choice(GAIN)
            told.append(f"{_then(rng, pronoun)} {verb} {amount} more {item}.")
            value = chain.step(f"{subject} {verb} {amount}:", value, "+", amount)
        else:
            verb = rng.choice(LOSE)
            told.append(f"{_then(rng, pronoun)} {verb} {amount} {item}.")
            value = chain.step(f"{subject} {verb} {amount}:", value, "-", amount)
    parts = [part for part in range(2, 10) if value % part == 0 and value // part <= 20]
    if parts and rng.random() < 0.6:
        part = rng.choice(parts)
        told.append(f"{subject} shares them equally among {part} friends. How many {item} does each friend get?")
        return " ".join(told), chain, chain.step("Each gets", value, "/", part)
    told.append(f"How many {item} does {name} have now?")
    return " ".join(told), chain, value


FAMILIES = {
    "inventory": (inventory, 0.55),
    "compare": (compare, 0.15),
    "shopping": (shopping, 0.12),
    "boxes": (boxes, 0.18),
}


def sample(rng: random.Random) -> Problem:
    """Draws one problem; draws again while a number is out of range or a division has a remainder."""
    while True:
        family = rng.choices(list(FAMILIES), [weight for _, weight in FAMILIES.values()])[0]
        question, chain, value = FAMILIES[family][0](rng)
        if chain.ok:
            return Problem(question, chain.answer(value), f"{family}:{','.join(chain.key)}", family)


def split_of(key: str) -> str:
    """The split of a problem key: "test" for one in `HELD_OUT_ONE_IN`, by hash, "train" for the others."""
    return "test" if int(hashlib.md5(key.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0 else "train"


def stream(seed: int, split: str) -> Iterator[Problem]:
    """Endless problems of one split; the same seed gives the same problems."""
    rng = random.Random(seed)
    while True:
        problem = sample(rng)
        if split_of(problem.key) == split:
            yield problem


def held_out(count: int, seed: int = 4242) -> list[Problem]:
    """`count` test problems with different keys."""
    found: dict[str, Problem] = {}
    for problem in stream(seed, "test"):
        found.setdefault(problem.key, problem)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("unreachable: the stream is endless")


def final_answer(text: str) -> str | None:
    """What follows the last "####", or None when the text has none."""
    _, mark, tail = text.rpartition("####")
    words = tail.split()
    return words[0] if mark and words else None
