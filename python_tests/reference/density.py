"""Certainty density and certainty prior (d2Cache, arXiv 2509.23094, section on certainty-prior decoding)."""

import math

import numpy as np


def density(known, sigma):
    """Share of known positions around each position, under a Gaussian window: bool [L] -> fp64 [L].

        D_i = sum_{j=-L}^{2L-1} phi(i - j) known*(j)  /  sum_{d=-3L}^{3L-1} phi(d),    phi(d) = exp(-d^2 / (2 sigma^2))

    known* continues `known` by L positions on either side, as Kamichanw/d2Cache does: true on the left (the prompt),
    on the right a copy of the last entry. Rounded to 40 bits: equal sums in another order are to be equal.
    """

    def phi(d):
        return np.exp(-(d.astype(np.float64) ** 2) / (2 * sigma**2))

    known = np.asarray(known, dtype=bool)
    size = len(known)
    extended = np.concatenate([np.ones(size), known, np.full(size, known[-1])])
    i = np.arange(size)[:, None]
    j = np.arange(-size, 2 * size)[None, :]
    mantissa, exponent = np.frexp((phi(i - j) * extended).sum(-1) / phi(np.arange(-3 * size, 3 * size)).sum())
    return np.ldexp(np.rint(np.ldexp(mantissa, 40)), exponent - 40)


def certainty(confidence, entropy, o):
    """s of one position: its confidence; exp(-H) where the confidence is -H, as a factor must not be negative.

    The released code multiplies -H itself.
    """
    return math.exp(-entropy) if o.remasking == "entropy" and not o.reference_quirks else confidence


def debias(s, token, o):
    """PC-Sampler (arXiv 2508.13021): min(-s ln(f(token) + 1e-10), alpha), f the token's frequency in a corpus.

    In the released d2Cache harness every other measure of confidence overwrites the debiased one.
    """
    if o.token_frequencies is None or (o.reference_quirks and o.remasking != "low_confidence"):
        return s
    return min(-s * math.log(o.token_frequencies[token] + 1e-10), o.clip_alpha)


def scores(proposal, positions, density_at, block_start, o):
    """(debiased) s * D * exp(-lambda (i - block_start)) of each position; None where none of the factors is in force.

    density_at: D by position, used if o.prior_sigma > 0.
    """
    if not (o.prior_sigma > 0 or o.token_frequencies is not None or o.position_decay > 0):
        return None
    out = []
    for n, i in enumerate(positions):
        score = debias(certainty(proposal.confidence[n], proposal.entropy[n], o), proposal.tokens[n], o)
        if o.prior_sigma > 0:
            score *= density_at[i]
        out.append(score * math.exp(-o.position_decay * (i - block_start)))
    return out
