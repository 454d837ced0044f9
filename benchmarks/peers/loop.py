"""LLaDA's denoising loop for peers that bring a model but no loop: greedy, low confidence, Fast-dLLM's caches.

The same positions are computed as in the engine (none: all; prefix: the block and what is right of it; dual: the
block; everything at the first step of a block), and logits are asked for the masked positions of the block only.
"""

import time
from typing import Protocol

import torch


class Model(Protocol):
    mask_id: int

    def start(self, length: int) -> None:
        """Make room for a sequence of `length` positions."""

    def logits(self, tokens: torch.Tensor, begin: int, end: int, wanted: torch.Tensor) -> torch.Tensor:
        """Compute rows [begin, end) of `tokens` [length], keep their K and V, and return fp32 logits [wanted, vocab].

        wanted: indices relative to `begin`. The caller may overwrite what it gets.
        """


def next_rows(cache: str, block: int, block_end: int, length: int) -> tuple[int, int]:
    """Rows [begin, end) of a step that is not the first of its block."""
    return {"none": (0, length), "prefix": (block, length), "dual": (block, block_end)}[cache]


@torch.inference_mode()
def generate(model: Model, prompt: list[int], gen_length: int, block_length: int, per_step: int, cache: str):
    """(token ids [gen_length], [(rows, seconds)] of the steps)."""
    length = len(prompt) + gen_length
    tokens = torch.full((length,), model.mask_id)
    tokens[: len(prompt)] = torch.tensor(prompt)
    masked = torch.arange(length) >= len(prompt)
    model.start(length)
    steps = []
    for block in range(len(prompt), length, block_length):
        block_end = min(block + block_length, length)
        begin, end = 0, length  # the first step of a block computes everything
        while masked[block:block_end].any():
            t = time.perf_counter()
            positions = block + masked[block:block_end].nonzero()[:, 0]
            logits = model.logits(tokens, begin, end, positions - begin)
            log_sum = logits.logsumexp(-1)
            logits[:, model.mask_id] = -torch.inf
            best, ids = logits.max(-1)
            chosen = (best - log_sum).topk(min(per_step, len(positions))).indices
            tokens[positions[chosen]] = ids[chosen]
            masked[positions[chosen]] = False
            steps.append((end - begin, time.perf_counter() - t))
            begin, end = next_rows(cache, block, block_end, length)
    return tokens[len(prompt) :].tolist(), steps


class LoopPeer:
    """forward() and generate() of a peer that is a `Model`."""

    caches = ("none", "prefix", "dual")
    partial_rows = True

    @torch.inference_mode()
    def forward(self, rows: int, keys: int, repeats: int) -> list[float]:
        tokens = torch.arange(keys) * 2654435761 % self.vocab_size
        every = torch.arange(keys)
        self.start(keys)
        self.logits(tokens, 0, keys, every)  # fills the cache, and is the warm-up
        seconds = []
        for _ in range(repeats):
            t = time.perf_counter()
            self.logits(tokens, keys - rows, keys, every[:rows])
            seconds.append(time.perf_counter() - t)
        return seconds

    def generate(self, prompt, gen_length, block_length, per_step, cache):
        tokens, steps = generate(self, prompt, gen_length, block_length, per_step, cache)
        return {"token_ids": tokens, "nfe": len(steps)}
