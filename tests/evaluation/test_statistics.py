"""Intervals and p-values against values computed by hand, by scipy, or found in the literature."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from vipllava.evaluation.statistics import (
    Estimate,
    estimate,
    group_estimates,
    holm,
    mean_estimate,
    paired_difference,
    sign_flip_p_value,
)


def images(number: int) -> list[str]:
    """A different image for every item."""
    return [f"{at}.jpg" for at in range(number)]


def test_a_mean_against_scipy():
    values = np.random.default_rng(0).random(40)
    found = mean_estimate(values, images(40))
    assert found.value == pytest.approx(0.536682, abs=1e-6)
    # scipy.stats.bootstrap with 1,000,000 resamples
    assert (found.low, found.high) == pytest.approx((0.4400, 0.6263), abs=2e-3)
    assert (found.num_items, found.num_images, found.why_no_interval) == (40, 40, None)


def _mean_of_groups(sums: np.ndarray) -> np.ndarray:
    return (sums[..., 0] / sums[..., 1] + sums[..., 2] / sums[..., 3]) / 2


def _f_mean(sums: np.ndarray) -> np.ndarray:
    """METEOR's harmonic mean, from a corpus's matches and lengths."""
    precision, recall = sums[..., 0] / sums[..., 1], sums[..., 0] / sums[..., 2]
    return 10 * precision * recall / (recall + 9 * precision)


@pytest.mark.parametrize("statistic", [None, _mean_of_groups, _f_mean])
def test_functions_of_sums_over_images_against_scipy(statistic):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 30, size=90)  # 2 to 6 items each
    if statistic is _mean_of_groups:
        first = rng.random(90) < 0.5
        score = rng.random(90)
        columns = np.stack([score * first, first, score * ~first, ~first], axis=1)
    elif statistic is _f_mean:
        columns = np.stack([rng.integers(1, n, size=90) for n in (6, 9, 12)], axis=1)
    else:
        columns = np.stack([rng.random(90) < 0.7, np.ones(90)], axis=1)
    columns = columns.astype(float)
    if statistic is None:
        found = estimate(columns, [str(at) for at in image])
    else:
        found = estimate(columns, [str(at) for at in image], statistic)

    per_image = [columns[image == at].sum(axis=0) for at in sorted(set(image))]
    formula = statistic or (lambda sums: sums[..., 0] / sums[..., 1])

    def of(*of_images: np.ndarray, axis: int = -1) -> np.ndarray:
        return formula(np.stack([each.sum(axis=axis) for each in of_images], axis=-1))

    sums = np.array(per_image)
    expected = stats.bootstrap(
        tuple(sums.T), of, paired=True, vectorized=True, n_resamples=20_000, rng=2
    ).confidence_interval
    assert found.value == pytest.approx(float(formula(columns.sum(axis=0))))
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.04 * width)


def test_right_in_two_joint_tasks():
    """VCR's Q->AR: an item counts if both of its answers are right."""
    answer, rationale = np.array([1, 1, 0, 1]), np.array([1, 0, 1, 1])
    found = mean_estimate(answer * rationale, images(4))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_two_images_that_differ_span_the_scale():
    """Their resamples are 0, 0.5, 0.5, 1."""
    assert mean_estimate([0, 1], images(2)) == Estimate(0.5, 0.0, 1.0, 2, 2)


def test_items_of_one_image_are_one_draw():
    """Each item four times says nothing new; taken as 400 items the interval would be half."""
    values = (np.random.default_rng(3).random(100) < 0.7).astype(float)
    once = mean_estimate(values, images(100))
    repeated = mean_estimate(np.repeat(values, 4), np.repeat(images(100), 4).tolist())
    assert (repeated.low, repeated.high) == (once.low, once.high)
    assert (repeated.num_items, repeated.num_images) == (400, 100)
    independent = mean_estimate(np.repeat(values, 4), images(400))
    assert independent.high - independent.low == pytest.approx((once.high - once.low) / 2, rel=0.1)


def test_neither_order_nor_another_run_changes_it_but_the_seed_does():
    rng = np.random.default_rng(4)
    values, of = rng.random(60), [str(at) for at in rng.integers(0, 20, size=60)]
    found = mean_estimate(values, of)
    order = rng.permutation(60)
    assert mean_estimate(values[order], [of[at] for at in order]) == found
    other = mean_estimate(values, of, seed=1)
    assert other.low != found.low
    assert other.low == pytest.approx(found.low, abs=0.01)


@pytest.mark.parametrize(
    ("values", "of", "bounds", "expected"),
    [
        ([1] * 20, images(20), (0, 1), (0.838875, 1)),
        ([0] * 20, images(20), (0, 1), (0, 0.161125)),
        ([1] * 20, images(10) * 2, (0, 1), (0.722467, 1)),  # of 10 images, whatever their items
        ([100] * 20, images(20), (0, 100), (83.8875, 100)),
    ],
)
def test_where_all_are_right_or_wrong_the_interval_is_wilsons(values, of, bounds, expected):
    found = mean_estimate(values, of, bounds=bounds)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-4)
    assert found.value == values[0]
    assert found.why_no_interval is None


@pytest.mark.parametrize(
    ("values", "of", "expected"),
    [
        ([], [], Estimate(None, None, None, 0, 0, "there are no items")),
        (
            [1],
            ["a"],
            Estimate(1.0, None, None, 1, 1, "1 item of one image: one image shows no spread"),
        ),
        (
            [1, 0],
            ["a", "a"],
            Estimate(0.5, None, None, 2, 1, "2 items of one image: one image shows no spread"),
        ),
        (
            [0.5] * 3,
            ["a", "b", "c"],
            Estimate(
                0.5, None, None, 3, 3, "all 3 images give the same value, which shows no spread"
            ),
        ),
    ],
)
def test_where_no_interval_can_be_given(values, of, expected):
    assert mean_estimate(values, of) == expected


def test_a_scale_without_ends_has_no_wilson_interval():
    found = mean_estimate([0, 0], images(2), bounds=None)
    assert (found.value, found.low) == (0.0, None)
    assert mean_estimate([0, 3, 0.5], images(3), bounds=None).high == 3  # CIDEr


def test_a_group_on_one_of_four_images_gives_no_interval():
    """It is in 1 - (3/4)**4 = 68 % of the draws."""
    columns = [[1, 1], [0, 0], [0, 0], [0, 0]]
    found = estimate(columns, images(4))
    assert found.value == 1
    assert found.why_no_interval == "too few images: many draws of them give no score"
    nothing = estimate([[0, 0]] * 3, images(3))
    assert (nothing.value, nothing.why_no_interval) == (None, "these items give no score")


def test_groups_share_items():
    found = group_estimates([1, 0, 1], images(3), [("rec", "ocr"), ("rec",), ("know", "know")])
    assert list(found) == ["know", "ocr", "rec"]
    assert [(each.value, each.num_items) for each in found.values()] == [(1, 1), (1, 1), (0.5, 2)]
    assert (found["rec"].low, found["rec"].high) == (0, 1)


def test_memory_does_not_grow_with_resamples_times_images():
    """10,000 resamples of 5,000 images would be 400 MB."""
    values, of = np.random.default_rng(5).random(5000), images(5000)
    tracemalloc.start()
    try:
        paired_difference(values, values[::-1], of)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6


def test_as_text():
    assert mean_estimate([0, 1], images(2)).text() == "50.0 (0.0 to 100.0)"
    assert Estimate(0.0214, -0.0101, 0.052, 9, 9).text(signed=True) == "+2.1 (-1.0 to +5.2)"
    assert mean_estimate([1], ["a"]).text() == "100.0 (no interval)"
    assert mean_estimate([], []).text() == "-"


def test_pairing_takes_the_common_spread_out():
    hard = np.random.default_rng(6).random(50)
    change = np.tile([0.0, 0.1], 25)
    found = paired_difference(hard, hard + change, images(50))
    assert found.estimate.value == pytest.approx(0.05)
    # the normal interval: 0.05 +- 1.96 * 0.0505 / sqrt(50)
    assert found.estimate.low == pytest.approx(0.036, abs=2e-3)
    assert found.estimate.high == pytest.approx(0.064, abs=2e-3)
    assert (found.num_lower, found.num_higher) == (0, 25)
    assert found.p_value == pytest.approx(1e-4, rel=1e-3)  # 1 of 10,001: the one that was seen


def test_models_that_are_alike():
    found = paired_difference([1, 0, 1], [1, 0, 1], images(3))
    assert found.estimate == Estimate(
        0.0, None, None, 3, 3, "all 3 images give the same value, which shows no spread"
    )
    assert (found.p_value, found.num_lower, found.num_higher) == (1.0, 0, 0)
    assert paired_difference([], [], []).p_value is None


@pytest.mark.parametrize(
    ("differences", "of", "expected"),
    [
        ([0.1, 0.2, 0.3], "abc", 2 / 8),  # all of one sign
        ([0.1, 0.2, -0.3], "abc", 1.0),  # sums to 0, but for rounding
        ([0.3, 0.3, -0.1], "abc", 4 / 8),  # as far: 0.7 and 0.5 of either sign; the other four 0.1
        ([1, 1, 1, 1, 1, -1, 0, 0], "abcdefgh", 0.21875),  # McNemar, exact: 2 * 7 / 64
        ([1, 1, 1, 1, 1, 1], "aaaaaa", 1.0),  # one image
        ([1, -1, 1, 1], "aabc", 0.5),  # a sums to 0: two images of one sign
        ([], "", 1.0),
    ],
)
def test_sign_flips_by_hand(differences, of, expected):
    assert sign_flip_p_value(differences, list(of)) == pytest.approx(expected)


def test_sign_flips_of_many_images_are_mcnemars_test():
    change = [1.0] * 30 + [-1.0] * 14 + [0.0] * 9
    assert stats.binomtest(30, 44).pvalue == pytest.approx(0.02263, abs=1e-5)
    assert sign_flip_p_value(change, images(53)) == pytest.approx(0.0226, abs=4e-3)
    assert sign_flip_p_value(change, images(53)) == sign_flip_p_value(change[::-1], images(53))


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_cannot_be_estimated():
    with pytest.raises(ValueError, match="2 items and 1 images: each item needs its image"):
        mean_estimate([1, 0], ["a"])
    with pytest.raises(ValueError, match="a number is not finite; leave items without a score out"):
        mean_estimate([1, math.nan], ["a", "b"])
    with pytest.raises(ValueError, match=r"values from 0 to 2 are not within \(0.0, 1.0\)"):
        mean_estimate([0, 2], ["a", "b"])
    with pytest.raises(ValueError, match="2 and 1 scores: pairs need equal lengths"):
        paired_difference([1, 0], [1], ["a", "b"])
