"""An image asked about again does not go through the tower again."""

from __future__ import annotations

import torch

from vipllava.inference.features import ImageFeatures, Picture


class Tower:
    """Features of 8 bytes an image: its mean, twice."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        means = pixels.float().mean(dim=(1, 2, 3))
        self.seen.append(means.int().tolist())
        return means[:, None, None].repeat(1, 1, 2)


def picture(value: int) -> Picture:
    return Picture.of(torch.full((3, 2, 2), value, dtype=torch.uint8))


def values(found: list[torch.Tensor]) -> list[list[list[float]]]:
    return [each.tolist() for each in found]


def test_what_is_new_goes_through_at_once_and_what_is_known_does_not():
    tower = Tower()
    features = ImageFeatures(tower, max_bytes=1000)
    found = features.of([picture(1), picture(2), picture(1)])
    assert values(found) == [[[1, 1]], [[2, 2]], [[1, 1]]]
    assert values(features.of([picture(2), picture(3)])) == [[[2, 2]], [[3, 3]]]
    assert tower.seen == [[1, 2], [3]]
    assert (features.num_hits, features.num_misses, features.num_bytes) == (2, 3, 24)
    assert features.of([]) == []


def test_what_was_not_asked_about_longest_goes_first():
    tower = Tower()
    features = ImageFeatures(tower, max_bytes=16)  # two images
    features.of([picture(1)])
    features.of([picture(2)])
    features.of([picture(1)])
    assert values(features.of([picture(3)])) == [[[3, 3]]]
    features.of([picture(1)])
    assert tower.seen == [[1], [2], [3]]
    features.of([picture(2)])
    assert tower.seen == [[1], [2], [3], [2]]
    assert features.num_bytes == 16


def test_more_images_at_once_than_are_kept():
    features = ImageFeatures(Tower(), max_bytes=8)
    found = features.of([picture(1), picture(2), picture(3)])
    assert values(found) == [[[1, 1]], [[2, 2]], [[3, 3]]]
    assert features.num_bytes == 8
    # What is kept holds none of its neighbours' memory.
    assert all(each.untyped_storage().nbytes() == 8 for each in found)


def test_nothing_is_kept_where_nothing_may_be():
    tower = Tower()
    features = ImageFeatures(tower, max_bytes=0)
    features.of([picture(1)])
    features.of([picture(1)])
    assert tower.seen == [[1], [1]]
    assert features.num_bytes == 0


def test_clear():
    tower = Tower()
    features = ImageFeatures(tower, max_bytes=1000)
    features.of([picture(1)])
    features.clear()
    assert features.num_bytes == 0
    features.of([picture(1)])
    assert tower.seen == [[1], [1]]
