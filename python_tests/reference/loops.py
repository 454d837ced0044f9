"""The denoising loop of masked-diffusion models, one sequence at a time, written as formulas.

Covers the caches none, prefix and dual (Fast-dLLM, arXiv 2505.22618), the schedules of LLaDA (arXiv 2502.09992) and
Dream (arXiv 2508.15487), and the parallel decoders threshold and factor (Fast-dLLM).

Notation: P prompt length, G generated length, S block length, T = P + G, V vocabulary. All positions are absolute.
"""

import math
from dataclasses import dataclass, field

import torch

from . import philox


@dataclass(frozen=True)
class Options:
    """The fields of a generation, under the names of the package's own configuration."""

    gen_length: int = 128
    block_length: int = 32
    steps: int | None = None
    threshold: float | None = None
    factor: float | None = None
    num_transfer_tokens: int | None = None
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
    cache: str = "prefix"  # | "none" | "dual"
    infill: bool = False

    @property
    def tau(self):
        """The threshold in force: 0.9 unless something else decides how many tokens are committed."""
        if self.threshold is not None:
            return self.threshold
        return 0.9 if self.steps is None and self.factor is None and self.num_transfer_tokens is None else None


@dataclass
class Step:
    """One denoising step of one sequence."""

    rows: list[int]  # positions that the model computed
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


@dataclass
class Proposal:
    """What the logits say about the eligible positions; lists have one entry per position."""

    tokens: list[int]
    confidence: list[float]
    token_gap: list[float]  # score of the proposed token minus that of the second
    exact: list[bool]  # the confidence is free of rounding: 0 by decree, or one token survived the filter
    filter_gap: float = math.inf  # distance of top_p and top_k from keeping other tokens


@dataclass
class Decisions:
    """Smallest gaps seen so far."""

    smallest: dict[str, float] = field(default_factory=dict)

    def note(self, kind, gap):
        if not math.isinf(gap):
            self.smallest[kind] = min(gap, self.smallest.get(kind, math.inf))


def block_positions(prompt_length, gen_length, block_length, infills):
    """Positions of each block: [P + b S, min(P + (b + 1) S, T)), block 0 after the masked prompt positions."""
    end = prompt_length + gen_length
    starts = list(range(prompt_length, end, block_length)) or [prompt_length]  # nothing to generate, only infills
    blocks = [list(range(s, min(s + block_length, end))) for s in starts]
    blocks[0] = sorted(infills) + blocks[0]
    return blocks


def rows_of_step(cache, shift, block, start, length, first):
    """Positions whose rows are computed: `block` = positions of the block, `start` = its first generated position.

    Row i - shift holds the logits of position i, so for Dream (shift 1) every set is closed under that.
    """
    if cache == "none" or first:
        return list(range(length))
    if cache == "prefix":  # the block and everything right of it
        rows = set(block) | set(range(start - shift, length)) | {i - shift for i in block}
    elif cache == "dual":  # the rows that the block's logits are read from
        rows = {i - shift for i in block}
    else:
        raise ValueError(f"unknown cache {cache!r}")
    return sorted(rows)


def keep_tokens(z, top_p, top_k, mask_id=None):
    """Filter one row: z fp64 [V] -> (z with dropped tokens at -inf, smallest distance from keeping other tokens).

    top_p: sorted by descending logit (ties: lowest id first), drop every token whose preceding tokens already hold
    more than p; the token that crosses p is kept. top_k, after that: keep logits >= the k-th largest. The best token
    other than mask_id stays in any case: otherwise a row that favours the mask would have nothing to propose.
    """
    gap = math.inf
    unfiltered = z
    if top_p is not None:
        order = z.sort(descending=True, stable=True).indices
        preceding = z.softmax(-1)[order].cumsum(-1).roll(1)
        preceding[0] = 0.0
        dropped = preceding > top_p
        if dropped.any():
            cut = int(dropped.nonzero()[0])
            gap = min(gap, float(preceding[cut] - top_p), abs(float(top_p - preceding[cut - 1])))
            z = z.index_fill(0, order[cut:], -math.inf)
    if top_k is not None and top_k < len(z):
        ranked = z.sort(descending=True).values
        z = z.masked_fill(z < ranked[top_k - 1], -math.inf)
        if ranked[top_k] > -math.inf:
            gap = min(gap, float(ranked[top_k - 1] - ranked[top_k]))
    if mask_id is not None:
        best = (
            unfiltered.index_fill(0, torch.tensor([mask_id]), -math.inf).sort(descending=True, stable=True).indices[0]
        )
        z = z.index_copy(0, best[None], unfiltered[best][None])
    return z, gap


def propose(logits, positions, step, shape, o):
    """Token and confidence for each position from its logits: [n, V] fp64, positions list[int] of length n."""
    vocab = logits.shape[1]
    others = [i for i in range(vocab) if i != shape.mask_id]  # the mask id is never proposed, but has probability
    tempered = o.schedule == "dream" and o.temperature > 0
    noise = philox.token_gumbel(o.seed, step, positions, vocab) if o.temperature > 0 else None
    u = philox.selection_uniform(o.seed, step, positions)
    out = Proposal([], [], [], [])
    for n, z in enumerate(logits):
        if o.logits_eos_inf:
            z = z.index_fill(0, torch.tensor([shape.eos_id]), -math.inf)
        if tempered:
            z = z / o.temperature
        z, filter_gap = keep_tokens(z, o.top_p, o.top_k, shape.mask_id)
        out.filter_gap = min(out.filter_gap, filter_gap)
        p = z.softmax(-1)

        score = z
        if noise is not None:
            score = z + (1.0 if tempered else o.temperature) * torch.from_numpy(noise[n])
        ranked = score[others].sort(descending=True, stable=True)
        x0 = others[int(ranked.indices[0])]
        out.tokens.append(x0)
        out.token_gap.append(float(ranked.values[0] - ranked.values[1]))

        if o.remasking == "low_confidence":
            c = float(p[x0])
        elif o.remasking == "topk_margin":
            best = p[others].sort(descending=True).values
            c = float(best[0] - best[1])
        elif o.remasking == "entropy":
            c = float(torch.special.xlogy(p, p).sum())
        else:  # random, origin
            c = float(u[n])
        force = o.confidence_eos_eot_inf and o.remasking in ("low_confidence", "topk_margin")
        forced = force and x0 in shape.stop_ids
        out.confidence.append(0.0 if forced else c)
        out.exact.append(forced or (o.remasking not in ("random", "origin") and int((p > 0).sum()) == 1))
    return out


def llada_schedule(masked, steps):
    """How many of `masked` positions to commit at each of `steps` steps: m // n, one more in the first m % n steps."""
    return [masked // steps + (1 if t < masked % steps else 0) for t in range(steps)]


def dream_share(eps, steps, t):
    """1 - s/t' of Dream's step t, fp32; 1 in the last step. t', s: entries t, t + 1 of linspace(1, eps, steps + 1)."""
    if t >= steps - 1:
        return torch.tensor(1.0)
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    return 1 - times[t + 1] / times[t]


def number_for_factor(confidence, factor):
    """max n such that every k <= n has k == 1 or (k + 1)(1 - c_k) < factor; confidence sorted descending, c_1 first.

    Returns (n, smallest distance of a deciding (k + 1)(1 - c_k) from factor).
    """
    gap = math.inf
    n = 1
    for k in range(2, len(confidence) + 1):
        excess = (k + 1) * (1 - confidence[k - 1]) - factor
        gap = min(gap, abs(excess))
        if excess >= 0:
            break
        n = k
    return n, gap


def choose(proposal, positions, step, t, masked_at_start, steps_of_block, o, decisions):
    """Indices into `positions` that are committed in step t of the block. `step` counts from the generation's start."""
    c = proposal.confidence
    count = len(c)
    share = dream_share(o.eps, steps_of_block, t) if o.steps is not None and o.schedule == "dream" else None
    key = c
    if o.alg_temp is not None:
        g = philox.gumbel(philox.selection_uniform(o.seed, step, positions))
        key = [c[i] / o.alg_temp + float(g[i]) for i in range(count)]

    if o.remasking == "origin":
        for i in range(count):
            if share < 1:
                decisions.note("origin", abs(c[i] - float(share)))
        return [i for i in range(count) if c[i] < float(share)]

    order = sorted(range(count), key=lambda i: (-key[i], positions[i]))
    if o.steps is not None and o.schedule == "llada":
        n = llada_schedule(masked_at_start, steps_of_block)[t] if t < steps_of_block else count
    elif o.steps is not None:
        n = int(torch.tensor(count, dtype=torch.float32) * share)
    elif o.factor is not None:
        n, gap = number_for_factor([c[i] for i in order], o.factor)
        decisions.note("factor", gap)
    elif o.tau is not None:
        n = max(1, sum(x >= o.tau for x in c))
        decisions.note("threshold", min(abs(x - o.tau) for x in c))
    else:
        n = 0
    n = min(count, max(n, o.num_transfer_tokens or 0))
    if 0 < n < count:
        last, following = order[n - 1], order[n]
        if not (proposal.exact[last] and proposal.exact[following] and key is c):
            decisions.note("selection", key[last] - key[following])
    return sorted(order[:n])


def generate(model, prompt, o):
    """Generate from a prompt (list of ids) with a reference.model.ReferenceModel. Returns a Run."""
    shape = model.shape
    prompt_length, total = len(prompt), len(prompt) + o.gen_length
    tokens = torch.tensor(list(prompt) + [shape.mask_id] * o.gen_length, dtype=torch.int64)
    infills = [i for i in range(prompt_length) if o.infill and prompt[i] == shape.mask_id]
    if shape.shift and (prompt_length == 0 or 0 in infills):
        raise ValueError("this family reads position i from row i - 1: position 0 cannot be generated")
    masked = set(infills) | set(range(prompt_length, total))
    hidden_prompt = [i for i in range(prompt_length) if i not in masked]  # what classifier-free guidance leaves out
    blocks = block_positions(prompt_length, o.gen_length, o.block_length, infills)
    if o.steps is not None and (o.steps < len(blocks) or o.steps % len(blocks)):
        raise ValueError("steps must be a multiple of the number of blocks")
    steps_of_block = None if o.steps is None else o.steps // len(blocks)
    guided = o.cfg_scale > 0

    cache = model.new_cache(total)
    unconditional_cache = model.new_cache(total)
    decisions = Decisions()
    trace = []

    def first_stop():
        """Position of the first committed stop id of the generated region; T if there is none."""
        for i in range(prompt_length, total):
            if i not in masked and int(tokens[i]) in shape.stop_ids:
                return i
        return total

    def eligible_of(block):
        limit = first_stop() if o.stop_at_eos else total
        return [i for i in block if i in masked and i < limit]

    for b, block in enumerate(blocks):
        masked_at_start = sum(i in masked for i in block)
        t = 0
        while eligible := eligible_of(block):
            start = prompt_length + b * o.block_length
            rows = rows_of_step(o.cache, shape.shift, block, start, total, first=t == 0)
            at = torch.tensor(rows)
            logit_rows = [i - shape.shift for i in eligible]
            read = torch.tensor([rows.index(i) for i in logit_rows])
            logits = model.logits(model.forward(tokens[at], at, cache)[read]).double()
            if guided:
                bare = tokens.clone()
                bare[hidden_prompt] = shape.mask_id
                bare_logits = model.logits(model.forward(bare[at], at, unconditional_cache)[read]).double()
                logits = bare_logits + (o.cfg_scale + 1) * (logits - bare_logits)

            step = len(trace)
            proposal = propose(logits, eligible, step, shape, o)
            chosen = choose(proposal, eligible, step, t, masked_at_start, steps_of_block, o, decisions)
            decisions.note("filter", proposal.filter_gap)
            # Confidences do not jump with the token at temperature 0; otherwise every proposal decides something.
            jumps = o.temperature > 0 or o.confidence_eos_eot_inf
            for i in range(len(eligible)) if jumps else chosen:
                decisions.note("token", proposal.token_gap[i])

            for i in chosen:
                tokens[eligible[i]] = proposal.tokens[i]
                masked.remove(eligible[i])
            committed = [(eligible[i], proposal.tokens[i]) for i in chosen]
            trace.append(Step(rows, logit_rows, committed))
            t += 1

    if o.stop_at_eos:
        tokens[first_stop() + 1 :] = shape.eos_id
    return Run(
        token_ids=tokens[prompt_length:].tolist(),
        prompt_ids=tokens[:prompt_length].tolist(),
        nfe=len(trace) * (2 if guided else 1),
        steps=trace,
        margins=decisions.smallest,
    )
