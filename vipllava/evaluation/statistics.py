"""95 % intervals, two-sided: how far a measured share, mean or difference can be trusted.

They treat the items as independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final

import numpy as np

Interval = tuple[float, float]
"""Lower and upper bound, in the unit of the quantity."""

_Z: Final = NormalDist().inv_cdf(0.975)


def wilson_interval(successes: int, n: int) -> Interval:
    """Return Wilson's score interval of a share (E. B. Wilson, JASA 1927).

    Unlike the normal approximation it stays within 0..1 and keeps a width at 0 and n successes.

    Raises:
        ValueError: ``n`` is not positive or ``successes`` not in 0..n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes} of n={n}: needs n > 0 and 0 <= successes <= n")
    share = successes / n
    shrink = 1 + _Z * _Z / n
    centre = (share + _Z * _Z / (2 * n)) / shrink
    half = _Z * math.sqrt(share * (1 - share) / n + _Z * _Z / (4 * n * n)) / shrink
    # At the ends the bound is exactly 0 or 1; rounding would leave it a hair off.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the interval of a mean: that and 1.96 standard errors to both sides.

    Raises:
        ValueError: there are fewer than two values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2:
        raise ValueError(f"{data.size} values have no spread; an interval needs at least two")
    half = _Z * float(data.std(ddof=1)) / math.sqrt(data.size)
    return float(data.mean()) - half, float(data.mean()) + half


def paired_difference_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return the interval of mean(``first``) - mean(``second``), both over the same items.

    Pairing takes the items' difficulty out of the spread, so it is narrower than two separate
    intervals suggest.

    Raises:
        ValueError: the sequences differ in length, or have fewer than two values.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values: pairs need equal lengths")
    return mean_interval([a - b for a, b in zip(first, second, strict=True)])
