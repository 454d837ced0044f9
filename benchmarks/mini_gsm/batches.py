"""Training batches: encoded problems in length buckets, and the masks put on them.

Three kinds of mask, because a decoder meets all three and uniform noise alone rarely shows the last two:

* uniform: LLaDA's forward process, every answer position masked with one probability t ~ U(0, 1);
* block: what semi-autoregressive decoding sees: a block of 32 half done, everything before it clear, after it masked;
* prefix: everything from one position on masked, mostly from a number or a word that the question decides: the case in
  which it must be computed or looked up, since no later copy of it is there to be read off.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from data import CONTAINERS, GAIN, GOODS, ITEMS, LOSE, MAX_CHANGE, MAX_VALUE, NAMES, stream
from tokenizers import Tokenizer
from torch import Tensor

BLOCK = 32
BUCKETS = (32, 48, 64, 80, 96, 112, 128, 176)
DRILL_LENGTH = 64
PREFIX_SCORED = 24  # of a prefix mask only so many positions count; what lies further on can hardly be known


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that batches need."""

    tokenizer: Tokenizer
    eos: int
    mask: int
    bos: int
    eot: int
    equals: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        names = ("<|endoftext|>", "<|mdm_mask|>", "<|startoftext|>", "<|eot_id|>", "Ġ=")
        return cls(tokenizer, *(tokenizer.token_to_id(name) for name in names))

    def number_tokens(self) -> list[tuple[int, int]]:
        """(token id, value) of every token that is a whole number, with and without a leading space."""
        plain = ((token.removeprefix("Ġ"), index) for token, index in self.tokenizer.get_vocab().items())
        return sorted((index, int(text)) for text, index in plain if text.isascii() and text.isdigit())

    def content_tokens(self) -> Tensor:
        """For every token id whether it is a number or a word that a question decides (a verb, a name, a thing)."""
        words = {*(name for name, _ in NAMES), *ITEMS, *GOODS, *CONTAINERS, *GAIN, *LOSE, "gives"}
        vocabulary = self.tokenizer.get_vocab()
        tokens = [vocabulary[token] for word in words for token in (word, f"Ġ{word}") if token in vocabulary]
        content = torch.zeros(len(vocabulary), dtype=torch.bool)
        content[tokens + [token for token, _ in self.number_tokens()]] = True
        return content


@dataclass(frozen=True)
class Batch:
    """Clean ids, ids with masks, and the positions (into the flattened batch) whose tokens are to be predicted."""

    ids: Tensor
    noisy: Tensor
    scored: Tensor


def rows_for(tokens: int, length: int) -> int:
    """Rows of a batch of about `tokens` tokens; a multiple of 8."""
    return max(8, tokens // length // 8 * 8)


def _total_length(rng: random.Random, prompt: int, answer: int) -> int:
    """The padded length: mostly as short as fits; sometimes the full 64 or 128 of a real generation."""
    kind = rng.random()
    region = answer if kind < 0.8 else max(answer, 64) if kind < 0.96 else 128
    return next(bucket for bucket in BUCKETS if bucket >= min(prompt + region, BUCKETS[-1]))


def encoded(vocab: Vocabulary, seed: int, split: str, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, prompt lengths), about `tokens` tokens each, one bucket length per batch, padded with EOS."""
    problems, rng = stream(seed, split), random.Random(seed + 1)
    waiting: dict[int, list[tuple[list[int], int]]] = {bucket: [] for bucket in BUCKETS}
    while True:
        drawn = list(itertools.islice(problems, 256))
        questions = vocab.tokenizer.encode_batch([" " + problem.question for problem in drawn])
        answers = vocab.tokenizer.encode_batch([problem.answer for problem in drawn])
        for question, answer in zip(questions, answers, strict=True):
            ids = [vocab.bos, *question.ids, vocab.eot]
            prompt = len(ids)
            ids += [*answer.ids, vocab.eos]
            total = _total_length(rng, prompt, len(ids) - prompt)
            waiting[total].append((ids + [vocab.eos] * (total - len(ids)), prompt))
            if len(waiting[total]) == rows_for(tokens, total):
                rows, waiting[total] = waiting[total], []
                yield torch.tensor([row for row, _ in rows]), torch.tensor([prompt for _, prompt in rows])


def mask_answers(vocab: Vocabulary, content: Tensor, ids: Tensor, prompt: Tensor, generator: torch.Generator) -> Batch:
    """Masks every row in one of the three ways; `content` is `vocab.content_tokens()`."""
    rows, length = ids.shape
    place = torch.arange(length)[None] - prompt[:, None]  # position within the answer, negative in the prompt
    answer = place >= 0
    region = length - prompt

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    level = ((torch.arange(rows) + uniform(1)) / rows)[torch.randperm(rows, generator=generator)][:, None]
    noise = uniform(rows, length) < level
    # Blocks are drawn by a position of the written answer, so that blocks of nothing but padding stay rare.
    written = (ids != vocab.eos).sum(1) - prompt + 1
    first = (uniform(rows) * written).long() // BLOCK * BLOCK
    in_block = (place >= first[:, None]) & (place < first[:, None] + BLOCK)
    weights = (content[ids] & answer).float() + 0.1 * (answer & (place < written[:, None]))
    start = torch.multinomial(weights, 1, generator=generator)
    from_start = torch.arange(length)[None] >= start

    kind = uniform(rows)[:, None]
    masked = torch.where(kind < 0.35, answer & noise, torch.where(kind < 0.7, in_block & noise, from_start))
    later = (kind >= 0.35) & (kind < 0.7) & (place >= first[:, None] + BLOCK)
    near = torch.arange(length)[None] < start + PREFIX_SCORED
    scored = masked & ((kind < 0.7) | near)
    empty = ~scored.any(1) & (region > 0)
    last = torch.zeros_like(scored).scatter_(1, start, True) & empty[:, None]  # never a row without a target
    noisy = torch.where(masked | later | last, vocab.mask, ids)
    return Batch(ids, noisy, (scored | last).view(-1).nonzero()[:, 0])


def next_tokens(vocab: Vocabulary, chosen: Tensor, ids: Tensor, prompt: Tensor, which: int) -> Batch:
    """Masks each answer from its `which`-th `chosen` token (modulo their number) on; only that token is scored."""
    place = torch.arange(ids.shape[1])[None]
    chosen = chosen & (place >= prompt[:, None])
    wanted = which % chosen.sum(1).clamp(min=1) + 1
    start = torch.maximum((chosen.cumsum(1) >= wanted[:, None]).float().argmax(1), prompt)
    noisy = torch.where(place >= start[:, None], vocab.mask, ids)
    return Batch(ids, noisy, start + torch.arange(len(ids)) * ids.shape[1])


def drills(vocab: Vocabulary, seed: int, tokens: int) -> Iterator[Batch]:
    """Endless batches of unrelated equations written as in the answers; most results, some operands are masked."""
    rng = random.Random(seed)
    rows = rows_for(tokens, DRILL_LENGTH)

    def equation() -> str:
        kind = rng.random()
        if kind < 0.4:
            left = rng.randint(1, MAX_VALUE - 1)
            right = rng.randint(1, min(MAX_VALUE - left, MAX_VALUE if rng.random() < 0.2 else MAX_CHANGE))
            return f" {left} + {right} = {left + right}."
        if kind < 0.8:
            left = rng.randint(2, MAX_VALUE)
            right = rng.randint(1, min(left - 1, MAX_VALUE if rng.random() < 0.2 else MAX_CHANGE))
            return f" {left} - {right} = {left - right}."
        right = rng.randint(2, 9)
        left = rng.randint(2, min(9, MAX_VALUE // right))
        if rng.random() < 0.3:
            right = rng.choice([2, 2, 3])
            left = rng.randint(2, MAX_VALUE // right)
        product = left * right
        return f" {left} * {right} = {product}." if rng.random() < 0.7 else f" {product} / {right} = {left}."

    def one_row() -> tuple[list[int], list[bool]]:
        ids, masked = [vocab.bos, vocab.eot], [False, False]
        while len(ids) < DRILL_LENGTH:
            piece = vocab.tokenizer.encode(equation()).ids  # left, sign, right, "=", result, "."
            kind = rng.random()
            hidden = 4 if kind < 0.75 else 0 if kind < 0.83 else 2 if kind < 0.91 else -1
            ids += piece
            masked += [index == hidden for index in range(len(piece))]
        return ids[:DRILL_LENGTH], masked[:DRILL_LENGTH]

    while True:
        drawn = [one_row() for _ in range(rows)]
        ids = torch.tensor([row for row, _ in drawn])
        masked = torch.tensor([row for _, row in drawn])
        yield Batch(ids, torch.where(masked, vocab.mask, ids), masked.view(-1).nonzero()[:, 0])
