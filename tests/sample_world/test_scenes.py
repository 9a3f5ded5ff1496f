"""Scenes: deterministic, exact boxes and masks, splits that share nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vipllava.keyed_random import generator_for
from vipllava.sample_world.objects import DIGITS, DRAWINGS, KINDS
from vipllava.sample_world.scenes import (
    LONGER_SIDE,
    _handwriting,  # pyright: ignore[reportPrivateUsage]
    compose_scene,
)

SPLITS = ("train", "heldout")


def scenes(count: int, split="train"):
    return [compose_scene(generator_for("test", split, i), split) for i in range(count)]


def test_the_same_key_gives_the_same_bytes():
    first, second = (compose_scene(generator_for("same")) for _ in range(2))
    assert first.jpeg() == second.jpeg()
    assert first.objects == second.objects


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_objects_lie_inside_the_picture_and_apart(split):
    for scene in scenes(40, split):
        assert max(scene.image.size) == LONGER_SIDE
        assert 3 <= len(scene.objects) <= 4
        assert len({item.kind for item in scene.objects}) == len(scene.objects)
        width, height = scene.image.size
        for item in scene.objects:
            x1, y1, x2, y2 = item.bbox_xyxy
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            vertices = np.array([vertex for ring in item.polygons for vertex in ring])
            assert vertices.min(0).tolist() == [x1, y1]
            assert vertices.max(0).tolist() == [x2, y2]
        for a, b in itertools.combinations(scene.objects, 2):
            ax1, ay1, ax2, ay2 = a.bbox_xyxy
            bx1, by1, bx2, by2 = b.bbox_xyxy
            assert min(ax2, bx2) <= max(ax1, bx1) or min(ay2, by2) <= max(ay1, by1)


def test_every_kind_occurs_and_has_a_category():
    found = {item.kind: item.category for scene in scenes(150) for item in scene.objects}
    assert set(found) == set(KINDS) == {*DRAWINGS, *DIGITS}
    assert found["7"] == "digit"
    assert found["fish"] == "animal"


def test_training_and_heldout_share_no_scene_and_no_handwriting():
    pictures = {split: {scene.jpeg() for scene in scenes(50, split)} for split in SPLITS}
    assert len(pictures["train"]) == len(pictures["heldout"]) == 50
    assert not pictures["train"] & pictures["heldout"]
    train, heldout = _handwriting("train"), _handwriting("heldout")
    for digit in range(10):
        assert len(train[digit]) > 100
        assert len(heldout[digit]) > 25
    assert sum(len(d) for d in train.values()) + sum(len(d) for d in heldout.values()) == 1797
