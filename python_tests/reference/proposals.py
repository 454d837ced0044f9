"""What the logits of a step say: a token, a confidence and a distribution for each position that was read."""

import math
from dataclasses import dataclass, field

import torch

from . import philox


@dataclass
class Proposal:
    """What the logits say about some positions; lists have one entry per position."""

    tokens: list[int]
    confidence: list[float]
    token_gap: list[float]  # score of the proposed token minus that of the second
    exact: list[bool]  # the confidence is free of rounding: 0 by decree, one token survived the filter, or a blank row
    filter_gap: float = math.inf  # distance of top_p and top_k from keeping other tokens
    entropy: list[float] = field(default_factory=list)
    p: list[torch.Tensor] = field(default_factory=list)  # fp64 [V], after temperature (schedule dream) and filters

    def take(self, indices):
        """The same for some of the positions."""

        def pick(values):
            return [values[i] for i in indices]

        lists = [pick(x) for x in (self.tokens, self.confidence, self.token_gap, self.exact)]
        return Proposal(*lists, self.filter_gap, pick(self.entropy), pick(self.p))


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


def propose(logits, positions, step, shape, o, blank=()):
    """Token and confidence for each position from its logits: [n, V] fp64, positions list[int] of length n.

    blank: positions whose logits are zeros because their row was not computed (reference_quirks).
    """
    vocab = logits.shape[1]
    others = [i for i in range(vocab) if i != shape.mask_id]  # the mask id is never proposed, but has probability
    tempered = o.schedule == "dream" and o.temperature > 0
    noise = philox.token_gumbel(o.seed, step, positions, vocab) if o.temperature > 0 else None
    u = philox.selection_uniform(o.seed, step, positions)
    out = Proposal([], [], [], [])
    for n, z in enumerate(logits):
        is_blank = positions[n] in blank
        if o.logits_eos_inf:
            z = z.index_fill(0, torch.tensor([shape.eos_id]), -math.inf)
        if tempered:
            z = z / o.temperature
        # Among equal logits top_k drops none, and that is no close call.
        z, filter_gap = keep_tokens(z, o.top_p, None if is_blank else o.top_k, shape.mask_id)
        out.filter_gap = min(out.filter_gap, filter_gap)
        p = z.softmax(-1)

        score = z
        if noise is not None:
            score = z + (1.0 if tempered else o.temperature) * torch.from_numpy(noise[n])
        ranked = score[others].sort(descending=True, stable=True)
        x0 = others[int(ranked.indices[0])]
        out.tokens.append(x0)
        tied = is_blank and noise is None
        out.token_gap.append(math.inf if tied else float(ranked.values[0] - ranked.values[1]))

        p_ln_p = float(torch.special.xlogy(p, p).sum())
        if o.remasking == "low_confidence":
            c = float(p[x0])
        elif o.remasking == "topk_margin":
            best = p[others].sort(descending=True).values
            c = float(best[0] - best[1])
        elif o.remasking == "entropy":
            c = p_ln_p
        else:  # random, origin
            c = float(u[n])
        force = o.confidence_eos_eot_inf and o.remasking in ("low_confidence", "topk_margin")
        forced = force and x0 in shape.stop_ids
        certain = o.remasking not in ("random", "origin") and (is_blank or int((p > 0).sum()) == 1)
        out.confidence.append(0.0 if forced else c)
        out.exact.append(forced or certain)
        out.entropy.append(-p_ln_p)
        out.p.append(p)
    return out
