"""Intervals against values computed by hand or found in the literature."""

from __future__ import annotations

import pytest

from vipllava.evaluation.statistics import (
    mean_interval,
    paired_difference_interval,
    wilson_interval,
)


def test_wilson_against_known_values():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(20, 20)[1] == 1.0


def test_wilson_refuses_impossible_counts():
    for successes, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="needs n > 0"):
            wilson_interval(successes, n)


def test_mean_interval_normal():
    # mean 3, sample deviation 1.5811, standard error 0.7071
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((1.6141, 4.3859), abs=1e-4)


def test_one_value_has_no_spread():
    with pytest.raises(ValueError, match="1 values have no spread"):
        mean_interval([2.0])


def test_pairing_takes_the_common_spread_out():
    first, second = [1.0, 5.0, 9.0, 13.0], [0.0, 4.0, 8.0, 12.0]
    assert paired_difference_interval(first, second) == (1.0, 1.0)
    with pytest.raises(ValueError, match="pairs need equal lengths"):
        paired_difference_interval(first, [1.0])
