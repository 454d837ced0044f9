"""Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A number depends only on (seed, stream, step, position, token id), so it is the same for any batch, thread count or
device. Everything is numpy uint64 arithmetic, in which a 32 x 32 bit product cannot overflow.
"""

import numpy as np

TOKEN_STREAM = 0  # one number per vocabulary id
SELECTION_STREAM = 1  # one number per position, token id 0

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))  # golden ratio, sqrt(3) - 1
LOW32 = np.uint64(0xFFFFFFFF)
SHIFT32 = np.uint64(32)
ROUNDS = 10


def philox4x32(counter, key):
    """Philox4x32-10.

    counter: 4 words, key: 2 words; each an int or an integer array (broadcast together), values below 2^32.
    Returns 4 uint64 arrays holding 32-bit words.

    One round, with (hi, lo) the halves of a 64-bit product:
        (hi0, lo0) = M0 * c0;  (hi1, lo1) = M1 * c2
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0,  lo1,  hi0 ^ c3 ^ k1,  lo0
    and between rounds k0 += W0, k1 += W1 (mod 2^32).
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    for _ in range(ROUNDS):
        product0 = MULTIPLIERS[0] * c0
        product1 = MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> SHIFT32) ^ c1 ^ k0,
            product1 & LOW32,
            (product0 >> SHIFT32) ^ c3 ^ k1,
            product0 & LOW32,
        )
        k0 = (k0 + WEYL[0]) & LOW32
        k1 = (k1 + WEYL[1]) & LOW32
    return c0, c1, c2, c3


def uniform(seed, stream, step, position, token_id):
    """Uniform fp64 numbers in the open interval (0, 1), on the grid (k + 1/2) * 2^-52.

    key = (seed low 32 bits, seed high 32 bits), counter = (token_id, position, step, stream);
    u = ((w0 >> 6) * 2^26 + (w1 >> 6) + 0.5) * 2^-52 with w0, w1 the first two output words.
    seed: int below 2^64; the others ints or integer arrays (broadcast). Returns fp64 of the broadcast shape.
    """
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    w0, w1, _, _ = philox4x32((token_id, position, step, stream), key)
    high = (w0 >> np.uint64(6)).astype(np.float64)
    low = (w1 >> np.uint64(6)).astype(np.float64)
    return (high * 2.0**26 + low + 0.5) * 2.0**-52


def gumbel(u):
    """Standard Gumbel variates g = -ln(-ln u), fp64, same shape as u."""
    return -np.log(-np.log(u))


def token_gumbel(seed, step, positions, vocab_size):
    """Token noise of a step: fp64 [len(positions), vocab_size], one number per (position, vocabulary id)."""
    rows = np.asarray(positions, dtype=np.uint64)[:, None]
    ids = np.arange(vocab_size, dtype=np.uint64)[None, :]
    return gumbel(uniform(seed, TOKEN_STREAM, step, rows, ids))


def selection_uniform(seed, step, positions):
    """Selection noise of a step: fp64 [len(positions)], one number per position."""
    return uniform(seed, SELECTION_STREAM, step, np.asarray(positions, dtype=np.uint64), 0)
