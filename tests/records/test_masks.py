"""Masks of records: polygons and COCO's run lengths, in every kind that has masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from tests.records.test_kinds import BOX, BOX2, RECORDS, SQUARE, parse
from vipllava.types import RunLengths, Sample
from vipllava.visual_prompts.rle import check_rle, mask_of_rle

SIZE = (48, 64)


def holed() -> np.ndarray:
    """Return two parts, one of them with a hole, of the size of the tests' image."""
    image = Image.new("1", SIZE[::-1])
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((5, 5, 29, 39), fill=1)
    canvas.rectangle((12, 14, 20, 28), fill=0)
    canvas.rectangle((40, 41, 50, 46), fill=1)
    return np.asarray(image)


MASK = holed()
_COLUMNS = MASK.ravel(order="F")
_STARTS = np.flatnonzero(np.diff(_COLUMNS, prepend=False)).tolist()
UNCOMPRESSED = {"size": [48, 64], "counts": np.diff([0, *_STARTS, 48 * 64]).tolist()}


def compressed() -> dict[str, Any]:
    """Return what pycocotools writes, as it stands in a file of COCO's."""
    packed: Any = coco.encode(np.asfortranarray(MASK.astype(np.uint8)))
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def masks_of(sample: Sample) -> list[RunLengths | None]:
    return [region.rle for region in sample.regions]


# pycocotools 2 is older than numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("mask", [compressed(), UNCOMPRESSED], ids=["compressed", "uncompressed"])
@pytest.mark.parametrize("kind", ["refcocog", "refcocog-gpt4v", "regions", "vcr"])
def test_run_lengths_may_stand_where_polygons_do(kind: str, mask: dict[str, Any]):
    changes: dict[str, Any] = {"segmentations": [mask]}
    if kind == "vcr":
        meta = RECORDS["vcr"]["meta"]
        changes = {"meta": {**meta, "segms": [mask, *meta["segms"][1:]]}}
    sample = parse(kind, **changes)
    (rle, *others) = masks_of(sample)
    assert rle is not None
    assert np.array_equal(mask_of_rle(rle), MASK)
    assert others == [None] * len(others)
    assert sample.regions[0].bbox_xyxy == tuple(BOX)
    assert sample.regions[0].polygons == ()
    assert np.array_equal(coco.decode({"size": [48, 64], "counts": rle.counts.encode()}) > 0, MASK)


def test_every_region_has_its_own_form():
    masks = [compressed(), [SQUARE], None]
    sample = parse("regions", bboxes=[BOX, BOX2, BOX], segmentations=masks, visual_prompts=None)
    assert masks_of(sample) == [check_rle(MASK, "mask"), None, None]
    assert [len(region.polygons) for region in sample.regions] == [0, 1, 0]


def test_letters_stay_as_they_came():
    (rle,) = masks_of(parse("refcocog", segmentations=[compressed()]))
    assert rle == RunLengths((48, 64), compressed()["counts"])
