"""Statistics of paired differences: a randomisation test, a bootstrap interval, and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
_CHUNK = 2_000_000  # signs or indices held at once


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979); the chance of any false finding stays below the level.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    adjusted = [0.0] * len(p)
    highest = 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = highest
    return adjusted


def randomisation_test(differences: Float64, resamples: int, seed: int) -> float:
    """Two-sided p that the mean of paired differences is 0.

    Args:
        differences: float64 (n_queries,).
        resamples: random flips where 2^n is more than this.
        seed: of the random numbers.

    >>> randomisation_test(np.array([1.0, 2.0, 3.0]), 1000, 0)
    0.25
    """
    changed = differences[differences != 0]  # flipping a zero changes nothing
    if not len(changed):
        return 1.0
    # A sum in another order may differ in its last bits, by as much as the terms are large: the sum itself may be 0.
    observed = abs(changed.sum()) - 1e-12 * np.abs(changed).sum()
    n = len(changed)
    if n < 60 and 2**n <= resamples:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ changed) >= observed).mean())
    random = np.random.default_rng(seed)
    at_least, done = 1, 0
    while done < resamples:
        count = min(resamples - done, max(1, _CHUNK // n))
        signs = 1 - 2 * random.integers(0, 2, (count, n), dtype=np.int8)
        at_least += int((np.abs(signs @ changed) >= observed).sum())
        done += count
    return at_least / (resamples + 1)


def bootstrap_interval(differences: Float64, resamples: int, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean difference over queries drawn with replacement (Efron 1979).

    >>> bootstrap_interval(np.ones(5), 100, 0.95, 0)
    (1.0, 1.0)
    """
    random, n = np.random.default_rng(seed), len(differences)
    means: list[Float64] = []
    for at in range(0, resamples, max(1, _CHUNK // n)):
        count = min(resamples - at, max(1, _CHUNK // n))
        means.append(differences[random.integers(0, n, (count, n))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
