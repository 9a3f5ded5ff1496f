"""Intervals: how far a measured share, mean or difference can be trusted.

All are two-sided at ``confidence`` (0.95 unless told) and treat the items as independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Lower and upper bound, in the unit of the quantity."""

    low: float
    high: float


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a share (E. B. Wilson, JASA 1927).

    Unlike the normal approximation it stays within 0..1 and keeps a width at 0 and n successes.

    Raises:
        ValueError: ``n`` is not positive or ``successes`` not in 0..n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes} of n={n}: needs n > 0 and 0 <= successes <= n")
    z = _z(confidence)
    share = successes / n
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / shrink
    # At the ends the bound is exactly 0 or 1; rounding would leave it a hair off.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(low, high)


def mean_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    method: Literal["normal", "bootstrap"] = "normal",
    rng: np.random.Generator | None = None,
    num_resamples: int = 2000,
) -> Interval:
    """Return an interval of the mean of ``values``.

    Args:
        values: one value per item, at least two.
        confidence: share of intervals that hold the true mean.
        method: ``normal`` (mean +- z standard errors) or ``bootstrap`` (percentiles of resampled
            means).
        rng: the bootstrap's only source of randomness.
        num_resamples: resampled means of the bootstrap.

    Raises:
        ValueError: fewer than two values, a bootstrap without generator, or an unknown method.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2:
        raise ValueError(f"{data.size} values have no spread; an interval needs at least two")
    if method == "normal":
        half = _z(confidence) * float(data.std(ddof=1)) / math.sqrt(data.size)
        return Interval(float(data.mean()) - half, float(data.mean()) + half)
    if method != "bootstrap":
        raise ValueError(f"unknown method `{method}`; known: normal, bootstrap")
    if rng is None:
        raise ValueError("method `bootstrap` draws random numbers; pass a generator as `rng`")
    # One resample at a time: the memory stays that of one copy of the values.
    means = [float(rng.choice(data, data.size).mean()) for _ in range(num_resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(float(low), float(high))


def paired_difference_interval(
    first: Sequence[float],
    second: Sequence[float],
    confidence: float = 0.95,
    method: Literal["normal", "bootstrap"] = "normal",
    rng: np.random.Generator | None = None,
    num_resamples: int = 2000,
) -> Interval:
    """Return an interval of mean(``first``) - mean(``second``), both over the same items.

    Pairing takes the items' difficulty out of the spread, so it is narrower than two separate
    intervals suggest. Arguments as for :func:`mean_interval`.

    Raises:
        ValueError: the sequences differ in length; else as :func:`mean_interval`.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values: pairs need equal lengths")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return mean_interval(differences.tolist(), confidence, method, rng, num_resamples)


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie strictly between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)
