"""Means with their errors, paired differences, percentiles, the bootstrap, and Pareto frontiers."""

import math
from collections.abc import Sequence

import numpy as np


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is unknown and given as 0."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def paired_difference(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of mine - theirs, item by item, and its standard error.

    Smaller than the error of the difference of two independent means, since most problems come out the same both times.
    """
    return mean_and_error([float(a) - float(b) for a, b in zip(mine, theirs, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of 100 of the values do not exceed, interpolated between neighbours."""
    return float(np.percentile(np.asarray(values, dtype=float), percent))


def resamples(items: int, draws: int, seed: int) -> np.ndarray:
    """Bootstrap: in each draw, how often each item was drawn, out of `items` drawn with replacement; [draws, items].

    `resamples(...) @ sums` gives the sums of every draw at once, for all columns with the same draws, which is what
    keeps comparisons between columns paired.
    """
    return np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=draws).astype(float)


def frontier(cost: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Which points no other dominates, as booleans; less cost and more value are better, along the last axis.

    A point is dominated by one that is at least as good in both and better in one, so equal points stay together.
    """
    cost, value = np.broadcast_arrays(np.asarray(cost, dtype=float), np.asarray(value, dtype=float))
    on = np.empty(cost.shape, dtype=bool)
    for point in range(cost.shape[-1]):
        on[..., point] = ~dominators(cost, value, point).any(axis=-1)
    return on


def dominators(cost: np.ndarray, value: np.ndarray, point: int) -> np.ndarray:
    """Which points dominate this one, as booleans along the last axis."""
    c, v = cost[..., point, None], value[..., point, None]
    return (cost <= c) & (value >= v) & ((cost < c) | (value > v))
