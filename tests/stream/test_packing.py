"""Packs: every sample once, bounds kept, and full enough on lengths like those of stage 2."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vipllava.stream.pack_planner import plan_packs
from vipllava.types import RecordError

HISTOGRAM = Path(__file__).with_name("length_histogram.json")
BIN_WIDTH, LONGEST, IMAGE_TOKENS = 16, 2048, 576

Lengths = npt.NDArray[np.int32]


def make_histogram() -> dict[str, object]:
    """Return the lengths of 100 000 samples as stage 2 has them, by formula.

    94 % have a picture of 576 ids; their texts are log-normal with median 165 and sigma 0.72. The
    others are text only: median 400, sigma 0.8. What is longer than 2048 is cut there. Bin ``k``
    counts the lengths from ``16 k + 1`` to ``16 k + 16``.
    """
    return {
        "bin_width": BIN_WIDTH,
        "with_image": _log_normal(94_000, IMAGE_TOKENS, 165.0, 0.72),
        "text_only": _log_normal(6_000, 0, 400.0, 0.8),
    }


def _log_normal(count: int, shift: int, median: float, sigma: float) -> list[int]:
    below = [
        round(count * NormalDist().cdf(math.log((edge - shift) / median) / sigma))
        if edge > shift
        else 0
        for edge in range(0, LONGEST, BIN_WIDTH)
    ]
    return np.diff([*below, count]).tolist()


def draw_window(seed: int, count: int) -> tuple[Lengths, npt.NDArray[np.bool_]]:
    """Draw samples from the committed histogram, evenly within a bin."""
    stored = json.loads(HISTOGRAM.read_text())
    counts = np.array([stored["with_image"], stored["text_only"]])
    rng = np.random.default_rng(seed)
    drawn = rng.choice(counts.size, count, p=counts.ravel() / counts.sum())
    lengths = drawn % counts.shape[1] * BIN_WIDTH + rng.integers(1, BIN_WIDTH + 1, count)
    return lengths.astype(np.int32), drawn < counts.shape[1]


def test_the_histogram_is_the_formulas_and_shaped_like_stage_2() -> None:
    stored = json.loads(HISTOGRAM.read_text())
    assert stored == make_histogram()
    counts = np.array(stored["with_image"]) + np.array(stored["text_only"])
    middles = np.arange(len(counts)) * BIN_WIDTH + (BIN_WIDTH + 1) / 2
    assert np.average(middles, weights=counts) == pytest.approx(774, abs=2)
    p95 = middles[np.searchsorted(np.cumsum(counts), 0.95 * counts.sum())]
    assert p95 == pytest.approx(1132, abs=BIN_WIDTH / 2)
    assert sum(stored["text_only"]) / counts.sum() == 0.06
    assert sum(stored["with_image"][: IMAGE_TOKENS // BIN_WIDTH]) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("pack_length", "fill"), [(4096, 0.955), (8192, 0.98)])
def test_fill(pack_length: int, fill: float, seed: int) -> None:
    lengths, has_image = draw_window(seed, 4096)
    packs = plan_packs(lengths, has_image, pack_length=pack_length, max_images=16)
    assert lengths.sum() / (len(packs) * pack_length) >= fill


SAMPLES = st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=60)


@given(SAMPLES, st.integers(40, 90), st.integers(1, 4))
def test_every_sample_once_and_no_bound_broken(
    samples: list[tuple[int, bool]], pack_length: int, max_images: int
) -> None:
    lengths = np.array([length for length, _ in samples], dtype=np.int32)
    has_image = np.array([image for _, image in samples], dtype=bool)
    packs = plan_packs(lengths, has_image, pack_length=pack_length, max_images=max_images)
    assert sorted(index for pack in packs for index in pack.tolist()) == list(range(len(samples)))
    for pack in packs:
        assert len(pack) > 0
        assert (np.diff(pack) > 0).all()
        assert lengths[pack].sum() <= pack_length
        assert has_image[pack].sum() <= max_images
    # Best fit opens a pack only for what fits into none.
    if len(samples) and max_images >= has_image.sum():
        assert sum(lengths[pack].sum() * 2 <= pack_length for pack in packs) <= 1


def test_packs_in_numbers() -> None:
    lengths = np.array([3, 6, 4, 7, 10], dtype=np.int32)
    packs = plan_packs(lengths, np.ones(5, dtype=bool), pack_length=10, max_images=2)
    assert [pack.tolist() for pack in packs] == [[4], [0, 3], [1, 2]]


def test_text_goes_where_no_picture_may() -> None:
    lengths = np.array([5, 5, 5, 4], dtype=np.int32)
    has_image = np.array([True, True, False, False])
    packs = plan_packs(lengths, has_image, pack_length=10, max_images=1)
    assert [pack.tolist() for pack in packs] == [[0, 2], [1, 3]]


def test_the_same_arguments_give_the_same_packs() -> None:
    lengths, has_image = draw_window(0, 512)
    first, again = (
        plan_packs(lengths.copy(), has_image.copy(), pack_length=4096, max_images=6)
        for _ in range(2)
    )
    assert [pack.tolist() for pack in first] == [pack.tolist() for pack in again]


def test_nothing_to_pack() -> None:
    empty = np.empty(0, dtype=np.int32)
    assert plan_packs(empty, empty.astype(bool), pack_length=4, max_images=1) == []


def test_a_sample_longer_than_a_pack_is_named() -> None:
    lengths = np.array([5, 4097, 4096], dtype=np.int32)
    with pytest.raises(
        RecordError, match=r"sample 1 of the window has 4097 ids, .* 4096;"
    ) as error:
        plan_packs(lengths, np.zeros(3, dtype=bool), pack_length=4096, max_images=1)
    assert error.value.fault == "too-long"
