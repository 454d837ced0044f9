"""Which positions a step commits: schedules, threshold, factor, EB-sampler, KLASS, PC-Sampler, left to right."""

import math
from dataclasses import dataclass, field

import torch

from . import philox


@dataclass
class Decisions:
    """Smallest gaps seen so far."""

    smallest: dict[str, float] = field(default_factory=dict)

    def note(self, kind, gap):
        if not math.isinf(gap):
            self.smallest[kind] = min(gap, self.smallest.get(kind, math.inf))


def relative_gap(a, b):
    """(a - b) / max(|a|, |b|); infinite for two zeros, which no rounding can turn round."""
    return (a - b) / max(abs(a), abs(b)) if a or b else math.inf


def llada_schedule(masked, steps):
    """How many of `masked` positions to commit at each of `steps` steps: m // n, one more in the first m % n steps."""
    return [masked // steps + (1 if t < masked % steps else 0) for t in range(steps)]


def dream_share(eps, steps, t):
    """1 - s/t' of Dream's step t, fp32; 1 in the last step. t', s: entries t, t + 1 of linspace(1, eps, steps + 1)."""
    if t >= steps - 1:
        return torch.tensor(1.0)
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    return 1 - times[t + 1] / times[t]


def number_for_factor(confidence, factor, free=1, released=False):
    """max n such that every k <= n has k <= free or (k + 1)(1 - c_k) < factor; confidence sorted descending, c_1 first.

    free = 1 always takes the best (Fast-dLLM, arXiv 2505.22618); with 0 the best has to pass as well. released: the
    d2Cache harness takes one less than the first n that fails, so where none fails it leaves the last one out.
    Returns (n, smallest distance of a deciding (k + 1)(1 - c_k) from factor).
    """
    gap = math.inf
    n = free
    for k in range(free + 1, len(confidence) + 1):
        excess = (k + 1) * (1 - confidence[k - 1]) - factor
        gap = min(gap, abs(excess))
        if excess >= 0:
            break
        n = k
    return (min(n, max(0, len(confidence) - 1)) if released else n), gap


def number_for_gamma(entropy, gamma, released=False):
    """EB-sampler (arXiv 2505.24857): the largest n with (sum - max of the first n entropies) <= gamma.

    entropy: in the order of preference. released: the d2Cache harness subtracts the last entropy, not the largest.
    Returns (n, smallest distance of a deciding bound from gamma). The first always passes: its bound is 0.
    """
    gap = math.inf
    n = 0
    for k in range(1, len(entropy) + 1):
        bound = sum(entropy[:k]) - (entropy[k - 1] if released else max(entropy[:k]))
        if k > 1:
            gap = min(gap, abs(bound - gamma))
            if bound > gamma:
                break
        n = k
    return n, gap


class Stability:
    """KLASS (arXiv 2511.05664): the last h values of KL(p || p') of every position, p' its distribution before."""

    EPSILON = 1e-12

    def __init__(self, o):
        self.o = o
        self.before = {}  # position -> fp64 [V]
        self.history = {}  # position -> up to h values, the newest last

    def follow(self, position, p):
        """Note the distribution p (fp64 [V]) of a position: KL = sum p ln((p + eps) / (p' + eps)), p' = 0 at first."""
        h = self.o.kl_history_length
        before = self.before.get(position, torch.zeros_like(p))
        kl = float((p * ((p + self.EPSILON).log() - (before + self.EPSILON).log())).sum())
        missing = [0.0] * h if self.o.reference_quirks else []
        self.history[position] = [*self.history.get(position, missing), kl][-h:]
        self.before[position] = p

    def stable(self, position, decisions):
        """h values exist and all are below kl_threshold."""
        values = self.history[position]
        if len(values) < self.o.kl_history_length:
            return False
        decisions.note("kl", abs(max(values) - self.o.kl_threshold))
        return max(values) < self.o.kl_threshold


def scheduled_number(o, t, masked_at_start, steps_of_block, eligible):
    """Positions to commit in step t of a block by `steps`: LLaDA's or Dream's schedule."""
    if o.schedule == "llada":
        return llada_schedule(masked_at_start, steps_of_block)[t] if t < steps_of_block else eligible
    return int(torch.tensor(eligible, dtype=torch.float32) * dream_share(o.eps, steps_of_block, t))


def choose(
    proposal,
    positions,
    step,
    t,
    masked_at_start,
    steps_of_block,
    o,
    decisions,
    *,
    score=None,
    stable=None,
    eligible=None,
):
    """Indices into `positions` that are committed in step t of the block. `step` counts from the generation's start.

    positions: the eligible positions that have a proposal, ascending. eligible: all eligible ones, if there are others.
    score: what orders the positions in the place of their confidence. stable: KLASS's verdict on each position.
    """
    c = proposal.confidence
    count = len(c)
    eligible = positions if eligible is None else eligible
    # The released harness hands the scores to threshold and factor in the place of the confidences.
    value = score if o.reference_quirks and score is not None else c
    key = c if score is None else score
    if o.alg_temp is not None:
        g = philox.gumbel(philox.selection_uniform(o.seed, step, positions))
        key = [key[i] / o.alg_temp + float(g[i]) for i in range(count)]

    def ranked(indices, by):
        return sorted(indices, key=lambda i: (-by[i], positions[i]))

    def note_cut(order, n, by):
        """The gap between the last position taken and the first left."""
        if 0 < n < len(order):
            last, following = order[n - 1], order[n]
            if by is score:
                decisions.note("score", relative_gap(by[last], by[following]))
            elif not (proposal.exact[last] and proposal.exact[following] and by is c):
                decisions.note("selection", by[last] - by[following])

    def best(n):
        order = ranked(range(count), key)
        note_cut(order, n, key)
        return sorted(order[:n])

    def by_rule(indices, free, least):
        """What threshold or factor take of these positions; the `least` best of all if that is less."""
        order = ranked(indices, value)
        values = [value[i] for i in order]
        if o.factor is None:
            n = sum(x >= o.tau for x in values)
            decisions.note("threshold", min((abs(x - o.tau) for x in values), default=math.inf))
        else:
            n, gap = number_for_factor(values, o.factor, 0 if o.reference_quirks else free, o.reference_quirks)
            decisions.note("factor", gap)
        if n < least:
            return best(min(count, o.num_transfer_tokens or 1))
        note_cut(order, n, value)
        return sorted(order[:n])

    if o.remasking == "origin":
        share = float(dream_share(o.eps, steps_of_block, t))
        for x in c:
            if share < 1:
                decisions.note("origin", abs(x - share))
        return [i for i in range(count) if c[i] < share]

    if o.autoregressive:
        run = [i for i in range(count) if positions[i] == eligible[0] + i]
        if o.tau is not None:
            failing = next((n for n, i in enumerate(run) if value[i] < o.tau), len(run))
            for i in run[: failing + 1]:
                decisions.note("threshold", abs(value[i] - o.tau))
            n = max(failing, o.num_transfer_tokens or 1)
        elif o.reference_quirks:
            n = len(run)
        else:
            n = o.num_transfer_tokens or 0
            if o.steps is not None:
                n = max(n, scheduled_number(o, t, masked_at_start, steps_of_block, len(eligible)))
        return run[:n]

    if stable is not None:
        return by_rule([i for i in range(count) if stable[i]], free=0, least=1)
    if o.factor is not None or o.tau is not None:
        # Where the score decides who is committed for want of a passing position, the best must pass to count as such.
        return by_rule(range(count), free=1 if score is None else 0, least=min(count, o.num_transfer_tokens or 1))

    n = o.num_transfer_tokens or 0
    if o.steps is not None:
        n = max(n, scheduled_number(o, t, masked_at_start, steps_of_block, len(eligible)))
    elif o.gamma is not None:
        order = ranked(range(count), key)
        found, gap = number_for_gamma([proposal.entropy[i] for i in order], o.gamma, o.reference_quirks)
        decisions.note("gamma", gap)
        note_cut(order, found + 1, key)  # another position in the place of the first one left out might have passed
        n = max(n, found)
    return best(min(count, n))
