"""The denoising loop of masked-diffusion models, one sequence at a time, written as formulas.

Covers the caches none, prefix and dual (Fast-dLLM, arXiv 2505.22618), dllm (dLLM-Cache, arXiv 2506.06295) and d2
(d2Cache, arXiv 2509.23094), the schedules of LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487), and the rules of
decoders.py.

Notation: P prompt length, G generated length, S block length, T = P + G, V vocabulary. All positions are absolute.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import dllm
from .d2 import D2Planner, top_up
from .decoders import Decisions, Stability, choose, dream_share, llada_schedule, number_for_factor
from .density import density, scores
from .proposals import Proposal, keep_tokens, propose

__all__ = [
    "Decisions",
    "Options",
    "Proposal",
    "Run",
    "Step",
    "choose",
    "dream_share",
    "generate",
    "generate_batch",
    "keep_tokens",
    "llada_schedule",
    "number_for_factor",
    "propose",
]

CACHES = ("none", "prefix", "dual", "dllm", "d2")


@dataclass(frozen=True)
class Options:
    """The fields of a generation, under the names of the package's own configuration; those of its caches follow."""

    gen_length: int = 128
    block_length: int = 32
    steps: int | None = None
    threshold: float | None = None
    factor: float | None = None
    num_transfer_tokens: int | None = None
    gamma: float | None = None  # EB-sampler
    kl_threshold: float | None = None  # KLASS
    kl_history_length: int = 2
    sigma: float | None = None  # certainty prior; 0 is off, None leaves it to the cache
    token_frequencies: Sequence[float] | None = None  # PC-Sampler: of every id in a corpus
    clip_alpha: float = 10.0
    position_decay: float = 0.0
    autoregressive: bool = False
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    remasking: str = "low_confidence"  # | "topk_margin" | "entropy" | "random" | "origin"
    schedule: str = "llada"  # | "dream"
    eps: float = 1e-3
    alg_temp: float | None = None  # with steps or num_transfer_tokens: the given number is drawn, not the best taken
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    stop_at_eos: bool = True
    seed: int = 0
    cache: str = "prefix"  # | "none" | "dual" | "dllm" | "d2"
    infill: bool = False
    reference_quirks: bool = False  # the released d2Cache harness, commit 72feb60

    kp: int = 50  # dllm: the prompt is refreshed every kp steps,
    kr: int = 2  # the response every kr steps,
    rou: float = 0.25  # and this share of it in between
    always_refresh_layers: Sequence[int] = (0,)
    cfg_interval_steps: int = 1

    rollout_p: float = 0.1  # d2: share of the attention rollout that is recomputed
    current_k: int = 32  # number of masked positions that are
    d2_sigma: float = 10.0  # of the density that chooses them
    inflate_w: int = 4

    @property
    def tau(self):
        """The threshold in force: 0.9 unless something else decides how many tokens are committed."""
        if self.threshold is not None:
            return self.threshold
        others = (self.steps, self.factor, self.num_transfer_tokens, self.gamma)
        return 0.9 if all(x is None for x in others) else None

    @property
    def prior_sigma(self):
        """The sigma of the decoding order in force, 0 for none."""
        if self.sigma is not None:
            return self.sigma
        counted = self.tau is None and self.factor is None and self.gamma is None
        return self.d2_sigma if self.cache == "d2" and counted and not self.autoregressive else 0.0


@dataclass
class Step:
    """One denoising step of one sequence."""

    rows: list[int]  # positions that the model computed; dllm: that at least one layer refreshed
    logit_rows: list[int]  # rows whose logits were read
    committed: list[tuple[int, int]]  # (position, token id), by position


@dataclass
class Run:
    """The outcome of a generation."""

    token_ids: list[int]  # G ids
    prompt_ids: list[int]  # the prompt, infills filled
    nfe: int
    steps: list[Step]
    margins: dict[str, float]  # kind of decision -> smallest gap to the nearest alternative

    @property
    def margin(self):
        return min(self.margins.values(), default=math.inf)


def block_positions(prompt_length, gen_length, block_length, infills):
    """Positions of each block: [P + b S, min(P + (b + 1) S, T)), block 0 after the masked prompt positions."""
    end = prompt_length + gen_length
    starts = list(range(prompt_length, end, block_length)) or [prompt_length]  # nothing to generate, only infills
    blocks = [list(range(s, min(s + block_length, end))) for s in starts]
    blocks[0] = sorted(infills) + blocks[0]
    return blocks


def rows_of_step(cache, shift, block, start, length, first, released=False):
    """Positions whose rows are computed: `block` = positions of the block, `start` = its first generated position.

    Row i - shift holds the logits of position i, so for Dream (shift 1) every set is closed under that.
    released: the d2Cache harness shifts the whole set, so that the last row drops out.
    """
    if cache == "none" or first:
        return list(range(length))
    if cache == "prefix":  # the block and everything right of it
        end = length - shift if released else length
        rows = set(block) | set(range(start - shift, end)) | {i - shift for i in block}
        rows -= set(range(end, length))
    else:  # dual: the rows that the block's logits are read from
        rows = {i - shift for i in block}
    return sorted(rows)


def check(o, shape, prompt_length, infills, blocks):
    """Refuse what has no meaning here."""
    if o.cache not in CACHES:
        raise ValueError(f"unknown cache {o.cache!r}")
    if shape.shift and (prompt_length == 0 or 0 in infills):
        raise ValueError("this family reads position i from row i - 1: position 0 cannot be generated")
    if o.steps is not None and (o.steps < blocks or o.steps % blocks):
        raise ValueError("steps must be a multiple of the number of blocks")
    if o.autoregressive and (o.factor is not None or o.gamma is not None or o.kl_threshold is not None):
        raise ValueError("left to right goes with threshold, steps or num_transfer_tokens")
    if o.kl_threshold is not None and o.tau is None and o.factor is None:
        raise ValueError("KLASS goes with threshold or factor")
    if o.reference_quirks and o.cache == "d2" and infills:
        raise ValueError("the released code fills no prompts")


class Generation:
    """One sequence on its way."""

    def __init__(self, model, prompt, o):
        self.model, self.shape, self.o = model, model.shape, o
        self.prompt_length, self.total = len(prompt), len(prompt) + o.gen_length
        self.tokens = torch.tensor(list(prompt) + [self.shape.mask_id] * o.gen_length, dtype=torch.int64)
        infills = [i for i in range(self.prompt_length) if o.infill and prompt[i] == self.shape.mask_id]
        self.editable = infills + list(range(self.prompt_length, self.total))
        self.masked = set(self.editable)
        self.given = [i for i in range(self.prompt_length) if i not in self.masked]
        self.blocks = block_positions(self.prompt_length, o.gen_length, o.block_length, infills)
        check(o, self.shape, self.prompt_length, infills, len(self.blocks))
        self.steps_of_block = None if o.steps is None else o.steps // len(self.blocks)

        self.decisions = Decisions()
        self.trace = []
        self.nfe = 0
        self.idle = 0  # steps in a row that committed nothing
        # What the pass with the prompt and the pass without it remember.
        new = dllm.Features.of if o.cache == "dllm" else type(model).new_cache
        self.conditional, self.unconditional = new(model, self.total), new(model, self.total)
        self.guidance = {}  # position -> cond - un, fp64 [V], when last computed
        self.stability = Stability(o) if o.kl_threshold is not None else None
        self.planner = D2Planner(self.shape.shift, self.blocks, self.total, o, self.decisions)
        self.enter(0)

    def enter(self, b):
        """Begin block b."""
        self.b, self.block, self.t = b, self.blocks[b], 0
        self.masked_at_start = sum(i in self.masked for i in self.block)

    def limit(self):
        """Position of the first committed stop id of the generated region; T if there is none or none stops."""
        stops = self.shape.stop_ids[:1] if self.o.reference_quirks else self.shape.stop_ids
        for i in range(self.prompt_length, self.total):
            if self.o.stop_at_eos and i not in self.masked and int(self.tokens[i]) in stops:
                return i
        return self.total

    def eligible(self):
        return [i for i in self.block if i in self.masked and i < self.limit()]

    def plan(self):
        """Rows of the next step."""
        if self.o.cache == "d2":
            return self.planner.rows(self.block, self.masked, self.limit())
        if self.o.cache == "dllm":  # chosen layer by layer
            return list(range(self.total))
        start = self.prompt_length + self.b * self.o.block_length
        first = self.t == 0
        released = self.o.reference_quirks
        return rows_of_step(self.o.cache, self.shape.shift, self.block, start, self.total, first, released)

    def evaluate(self, memory, tokens, rows, positions, attention=None):
        """Compute the rows; returns (logits fp64 [n, V] of the positions, rows for the trace)."""
        if self.o.cache == "dllm":
            hidden, computed = dllm.forward(self.model, tokens, memory, self.editable, self.o, self.decisions)
        else:
            at, computed = torch.tensor(rows), rows
            hidden = self.model.forward(tokens[at], at, memory, attention)
        read = torch.tensor([rows.index(i - self.shape.shift) for i in positions], dtype=torch.int64)
        return self.model.logits(hidden[read]).double(), computed

    def guided(self, conditional, rows, positions, fresh):
        """un + (w + 1)(cond - un); with the difference of an earlier step, cond + w (cond - un), unless `fresh`."""
        w = self.o.cfg_scale
        if not fresh:
            return conditional + w * torch.stack([self.guidance[i] for i in positions])
        bare = self.tokens.clone()
        bare[self.given] = self.shape.mask_id
        unconditional, _ = self.evaluate(self.unconditional, bare, rows, positions)
        difference = conditional - unconditional
        self.guidance = dict(zip(positions, difference, strict=True))
        return unconditional + (w + 1) * difference

    def step(self, rows):
        """One step of the current block."""
        o, step, eligible = self.o, len(self.trace), self.eligible()
        guided = o.cfg_scale > 0
        interval = o.cfg_interval_steps if o.cache == "dllm" else 1
        fresh = step < 5 or step % interval == 0
        stale_certainties = o.reference_quirks and step > 0
        whole = self.stability is not None or (o.cache == "d2" and not stale_certainties)
        whole = whole or (guided and interval > 1 and fresh)
        limit = self.total if o.reference_quirks else self.limit()  # what lies behind a stop id is never decided
        wanted = sorted(i for i in self.masked if i < limit) if whole else eligible
        at_hand = {i + self.shape.shift for i in rows}
        read = [i for i in wanted if i in at_hand]
        blank = [i for i in wanted if i not in at_hand] if o.reference_quirks else []

        attention = []
        logits, computed = self.evaluate(self.conditional, self.tokens, rows, read, attention)
        self.nfe += 1
        if guided:
            logits = self.guided(logits, rows, read, fresh)
            self.nfe += fresh
        positions = sorted(read + blank)
        zero = torch.zeros(self.model.vocab_size, dtype=torch.float64)
        logits = torch.stack([zero if i in blank else logits[read.index(i)] for i in positions])
        proposal = propose(logits, positions, step, self.shape, o, blank)

        offered = [n for n, i in enumerate(positions) if i in eligible]
        at = [positions[n] for n in offered]
        chosen = self.choose(proposal, positions, offered, eligible)

        self.decisions.note("filter", proposal.filter_gap)
        # Confidences do not jump with the token at temperature 0; otherwise every proposal decides something.
        jumps = o.temperature > 0 or o.confidence_eos_eot_inf or o.token_frequencies is not None
        for n in range(len(positions)) if jumps else [offered[i] for i in chosen]:
            self.decisions.note("token", proposal.token_gap[n])

        committed = [(at[i], proposal.tokens[offered[i]]) for i in chosen]
        for i, token in committed:
            self.tokens[i] = token
            self.masked.remove(i)
        self.trace.append(Step(computed, [i - self.shape.shift for i in read], committed))
        self.t += 1
        if o.cache == "d2":
            self.planner.observe(positions, proposal, rows, attention, eligible, [i for i, _ in committed])
        self.idle = 0 if committed else self.idle + 1
        if self.idle > self.total + (o.steps or 0):
            raise RuntimeError("no progress: the positions that may be committed are never computed")

    def choose(self, proposal, positions, offered, eligible):
        """Indices into `offered` (indices into `positions`: the eligible ones) of what the step commits."""
        o = self.o
        at = [positions[n] for n in offered]
        stable = None
        if self.stability is not None:
            for i, p in zip(positions, proposal.p, strict=True):
                self.stability.follow(i, p)
            stable = [self.stability.stable(i, self.decisions) for i in at]
        d = {}
        if o.prior_sigma > 0:
            region = range(self.editable[0], self.total)
            d = dict(zip(region, density([i not in self.masked for i in region], o.prior_sigma).tolist(), strict=True))
        part = proposal.take(offered)
        return choose(
            part,
            at,
            len(self.trace),
            self.t,
            self.masked_at_start,
            self.steps_of_block,
            o,
            self.decisions,
            score=scores(part, at, d, self.block[0], o),
            stable=stable,
            eligible=eligible,
        )

    def result(self):
        tokens = self.tokens.clone()
        tokens[self.limit() + 1 :] = self.shape.eos_id
        return Run(
            token_ids=tokens[self.prompt_length :].tolist(),
            prompt_ids=tokens[: self.prompt_length].tolist(),
            nfe=self.nfe,
            steps=self.trace,
            margins=self.decisions.smallest,
        )


def generate(model, prompt, o):
    """Generate from a prompt (list of ids) with a reference.model.ReferenceModel. Returns a Run."""
    return generate_batch(model, [prompt], o)[0]


def generate_batch(model, prompts, o):
    """Generate from several prompts. Returns one Run for each.

    Sequences know nothing of each other, but for the released d2Cache: there they go through the blocks together, and
    each computes as many rows as the one with the most.
    """
    together = o.reference_quirks and o.cache == "d2"
    if together and len({len(prompt) for prompt in prompts}) > 1:
        raise ValueError("the released code takes prompts of one length")
    batch = [Generation(model, prompt, o) for prompt in prompts]
    for b in range(len(batch[0].blocks) if batch else 0):
        for sequence in batch:
            sequence.enter(b)
        while active := [sequence for sequence in batch if sequence.eligible()]:
            plans = [sequence.plan() for sequence in active]
            if together and len({len(rows) for rows in plans}) > 1:
                plans = top_up([sequence.planner for sequence in active], plans)
            for sequence, rows in zip(active, plans, strict=True):
                sequence.step(rows)
            if together:
                bonus = max(max(x.planner.weighted(x.masked).values()) for x in active)
                for sequence in active:
                    sequence.planner.bonus = bonus
    return [sequence.result() for sequence in batch]
