"""d2Cache (arXiv 2509.23094, github.com/Kamichanw/d2Cache): which rows a step computes, one set for all layers."""

from fractions import Fraction
from itertools import pairwise

import torch

from .decoders import relative_gap
from .density import certainty, debias, density


def importance(rows, probabilities, length):
    """Attention rollout of a step, literally: c_j = sum_i R_ij with R = W^{N-1} ... W^0 over T x T matrices.

    W = (E + I) / 2, where E is the identity with the computed rows replaced by their head-mean attention.
    rows: the R computed positions, in the order of the attention's rows; probabilities: per layer [n_heads, R, T].
    Returns fp64 [T].
    """
    eye = torch.eye(length, dtype=torch.float64)
    rollout = eye
    for attention in probabilities:
        effective = eye.clone()
        effective[rows] = attention.double().mean(0)
        rollout = (effective + eye) / 2 @ rollout
    return rollout.sum(0)


def nucleus(c, others, p, decisions):
    """Of the positions `others`, by falling importance, those whose cumulated share stays <= p, and the first.

    c: fp64 [T]. Ties: lowest position. All for p = 1.
    """
    if p >= 1:
        return list(others)
    order = sorted(others, key=lambda j: (-float(c[j]), j))
    share = (c[order].cumsum(0) / c[order].sum()).tolist()
    n = min(len(order), max(1, sum(x <= p for x in share)))
    for x in share[1 : n + 1]:  # the first is taken anyway
        decisions.note("nucleus", abs(x - p))
    if n < len(order):
        decisions.note("importance", relative_gap(float(c[order[n - 1]]), float(c[order[n]])))
    return order[:n]


def inflate(rows, width):
    """`rows` (ascending) and every row between two neighbours of it that are at most `width` apart."""
    out = set(rows)
    if width > 0:
        for a, b in pairwise(rows):
            if b - a <= width:
                out |= set(range(a, b))
    return sorted(out)


class D2Planner:
    """Chooses the rows of each step of one sequence. blocks: the positions of each block; total: T."""

    def __init__(self, shift, blocks, total, o, decisions):
        self.shift, self.blocks, self.total, self.o, self.decisions = shift, blocks, total, o, decisions
        self.first = blocks[0][0]  # the lowest position that is generated
        self.importance = None  # fp64 [T], of the last step
        self.certainty = {}  # position -> s
        self.committed = []  # positions committed by the last step
        self.searched = []  # the last step's block, its masked positions at that step's start
        self.scores = {}  # position -> what the rows were chosen by
        self.bonus = None  # of the released scores, where a batch shares one

    def observe(self, positions, proposal, rows, probabilities, searched, committed):
        """After a step: proposals of masked positions whose row was computed, attention, and what the step did."""
        if not (self.o.reference_quirks and self.certainty):  # the released certainties stay those of step 0
            for n, i in enumerate(positions):
                s = certainty(proposal.confidence[n], proposal.entropy[n], self.o)
                self.certainty[i] = debias(s, proposal.tokens[n], self.o) if self.o.reference_quirks else s
        self.importance = importance(rows, probabilities, self.total)
        self.searched, self.committed, self.bonus = searched, committed, None

    def rows(self, block, masked, limit):
        """Rows of the next step. block: the current one; masked: the masked positions; limit: the first stop id."""
        if self.importance is None:
            return list(range(self.total))
        s = self.weighted(masked)
        if self.o.reference_quirks:
            return self.assemble_released(self.candidates_released(sorted(masked), s))
        return self.assemble(self.candidates(block, [i for i in sorted(masked) if i < limit], s))

    def weighted(self, masked):
        """s * D of every position that has a certainty."""
        d = density([i not in masked for i in range(self.first, self.total)], self.o.d2_sigma)
        return {i: x * float(d[i - self.first]) for i, x in self.certainty.items()}

    def best(self, pool, key):
        """The current_k best of the pool; ties: lowest position. key: position -> (class, score), larger is better."""
        k = self.o.current_k
        order = sorted(pool, key=lambda i: (*(-x for x in key(i)), i))
        if 0 < k < len(order):
            (taken_class, taken), (left_class, left) = key(order[k - 1]), key(order[k])
            if taken_class == left_class:
                self.decisions.note("candidate", relative_gap(float(taken), float(left)))
        return order[:k]

    def candidates(self, block, candidates, s):
        """The positions whose logits the step reads for certain."""
        k = self.o.current_k
        reach = candidates[k - 1] if len(candidates) >= k else self.total - 1
        end = next((b[-1] for b in self.blocks if reach in b), self.total - 1)
        return self.best([i for i in candidates if i <= end], lambda i: (i in block, s[i]))

    def candidates_released(self, candidates, s):
        """With the block of the step before, which by then holds only what was masked when that step began.

        Its length is the unit that the end of the search is rounded up to. Its positions get a bonus, the largest score
        of all (in a batch: of all sequences): with positive scores they come first. Exact sums, as a rounded one could
        merge two scores.
        """
        k = self.o.current_k
        reach = candidates[k - 1] if len(candidates) >= k else self.total - 1
        unit = len(self.searched)
        end = self.first + ((reach - self.first) // unit + 1) * unit - 1
        bonus = Fraction(max(s.values()) if self.bonus is None else self.bonus)
        score = {i: Fraction(x) + (bonus if i in self.searched else 0) for i, x in s.items()}
        self.scores = {i: float(x) for i, x in score.items()}
        return self.best([i for i in candidates if self.searched[0] <= i <= end], lambda i: (0, score[i]))

    def assemble(self, chosen):
        rows = {i - self.shift for i in chosen} | set(self.committed)
        others = [j for j in range(self.total) if j not in rows]
        rows |= set(nucleus(self.importance, others, self.o.rollout_p, self.decisions))
        return inflate(sorted(rows), self.o.inflate_w)

    def assemble_released(self, chosen):
        """As above, but the row before the first generated position follows its own rule, which comes last."""
        before = self.first - self.shift
        rows = {i - self.shift for i in chosen} | set(self.committed)
        if self.shift:
            rows.discard(before)
        others = [j for j in range(self.total) if j not in rows]
        rows |= set(nucleus(self.importance, others, self.o.rollout_p, self.decisions))
        if self.shift:
            rows.discard(before)
            rows |= {before} if self.first in chosen else set()
        return inflate(sorted(rows), self.o.inflate_w)


def top_up(planners, plans):
    """Released batches: as many rows for every sequence as for the one with the most. plans: rows of each sequence.

    Missing rows are taken by c + score + max c for generated positions, max over the rows that no sequence plans in
    its own set, and by c for the prompt: so generated positions come first.
    """
    target = max(len(rows) for rows in plans)
    left = [[j for j in range(x.total) if j not in set(rows)] for x, rows in zip(planners, plans, strict=True)]
    largest = max((float(x.importance[j]) for x, js in zip(planners, left, strict=True) for j in js), default=0.0)
    out = []
    for x, rows, js in zip(planners, plans, left, strict=True):

        def key(j, x=x):
            c = float(x.importance[j])
            return c + largest + x.scores[j] if j >= x.first else c

        order = sorted(js, key=lambda j: (-key(j), j))
        missing = target - len(rows)
        if 0 < missing < len(order):
            x.decisions.note("top up", key(order[missing - 1]) - key(order[missing]))
        out.append(sorted([*rows, *order[:missing]]))
    return out
