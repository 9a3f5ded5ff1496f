from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from tests.ingest.lint.corpus import BOX2, lint_one, picture, record_of, sample_encoder
from vipllava.conversation.encode import ConversationEncoder
from vipllava.ingest.lint.rules import bounding_area, crosses_itself, ring_area

SQUARE = [(0, 0), (10, 0), (10, 10), (0, 10)]


def ring(points: list[tuple[float, float]]) -> np.ndarray:
    return np.array(points, dtype=np.float64)


@pytest.mark.parametrize(
    "points",
    [
        SQUARE,
        [*SQUARE, (0, 0)],  # closed
        [(0, 0), (0, 0), (10, 0), (10, 0), (10, 10), (0, 10), (0, 10), (0, 0), (0, 0)],
        [(0, 0), (5, 0), (10, 0), (10, 10), (0, 10)],  # a vertex in mid-edge
        [(0, 0), (10, 0), (5, 5)],
        [(0, 0), (10, 0), (5, 0), (5, 10)],  # goes back on its own edge
        [(0, 0), (10, 0), (10, 10), (5, 0), (0, 10)],  # a vertex touches the first edge
        [(0, 0), (10, 0), (10, 10), (5, 1e-9), (0, 10)],  # the same, but for rounding
        [(0, 0), (10, 0), (10, 10), (5, -1e-9), (0, 10)],
        [(0, 0), (5, 5), (0, 10), (10, 10), (5, 5), (10, 0)],  # two parts share a vertex
        [(0, 0), (4, 0), (4, 4), (8, 4), (8, 8), (4, 8), (4, 4), (0, 4)],  # two squares
        [(0, 0), (10, 0), (10, 5), (10, 10), (10, 3), (0, 10)],  # overlapping edges
        [(0, 0), (10, 10), (5, 5), (2, 2)],  # all on one line
        [(1, 1)] * 5,
    ],
)
def test_outlines_that_do_not_cross(points: list[tuple[float, float]]) -> None:
    for shift in range(len(points)):
        turned = np.roll(ring(points), shift, axis=0)
        assert not crosses_itself(turned)
        assert not crosses_itself(turned[::-1])


@pytest.mark.parametrize(
    "points",
    [
        [(0, 0), (10, 10), (10, 0), (0, 10)],
        [(0, 0), (10, 10), (10, 0), (0, 10), (0, 0)],
        [(0, 0), (1e307, 1e307), (1e307, 0), (0, 1e307)],
        [(0, 0), (5, 5), (10, 10), (10, 0), (0, 10)],  # the crossing is a vertex of one part
        [(0, 0), (5, 5), (10, 12), (10, 0), (0, 10)],
        [(0, 0), (10, 0), (10, 10), (5, -1), (0, 10)],  # a tip reaches through the first edge
        [(0, 0), (10, 0), (10, 10), (5, -0.01), (0, 10)],
        [(round(9 * math.sin(n * 4 * math.pi / 5)), round(9 * math.cos(n * 4 * math.pi / 5)))
         for n in range(5)],  # a pentagram
    ],
)  # fmt: skip
def test_outlines_that_cross(points: list[tuple[float, float]]) -> None:
    for shift in range(len(points)):
        turned = np.roll(ring(points), shift, axis=0) * 3.7 + 100
        assert crosses_itself(turned)
        assert crosses_itself(turned[::-1])


def wavy(count: int) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    radius = 200 + 40 * np.sin(9 * angle)
    return np.stack([300 + radius * np.cos(angle), 300 + radius * np.sin(angle)], axis=1)


@pytest.mark.parametrize("count", [200, 1200])
def test_long_rings(count: int) -> None:
    outline = wavy(count)
    assert not crosses_itself(outline)
    assert not crosses_itself(outline.round(2))
    swapped = outline.copy()
    swapped[[60, 70]] = swapped[[70, 60]]
    assert crosses_itself(swapped)
    assert ring_area(outline) == pytest.approx(math.pi * (200**2 + 40**2 / 2), rel=0.01)


def test_two_hundred_vertices_are_fast() -> None:
    outline = wavy(200)
    took = math.inf
    for _ in range(5):
        start = time.perf_counter()
        crosses_itself(outline)
        took = min(took, time.perf_counter() - start)
    assert took < 0.05


def test_areas() -> None:
    assert ring_area(ring(SQUARE)) == 100
    assert ring_area(ring(SQUARE)[::-1] + 1e6) == pytest.approx(100)
    assert bounding_area(ring(SQUARE)) == pytest.approx(100)
    assert bounding_area(ring([(0, 0), (30, 30), (10, 10), (20, 20)])) == pytest.approx(0, abs=1e-9)
    assert bounding_area(ring([(0, 0), (30, 30), (29, 31), (-1, 1)])) == pytest.approx(60)


def test_box_by_box_and_polygon_by_polygon(encoder: ConversationEncoder) -> None:
    record = record_of(
        "regions",
        bboxes=[[120, 20, 20, 110], [5000, 0, 5001, 9], [1, 2, 3], [300, 20, 380, 110], BOX2],
        segmentations=[[[1, 1, 9, 9], [1, 1, 9]], 3, [7], [], None],
    )
    findings = lint_one(record, sample_encoder(encoder), image=picture())
    assert [(finding.code, finding.message) for finding in findings[:8]] == [
        ("box-reversed", "field `bboxes[0]` is [120, 20, 20, 110]; expected x1 <= x2 and y1 <= y2: "
         "this box is reversed; if it says x, y, width and height, write [120, 20, 140, 130]"),
        ("box-outside", "field `bboxes[1]` is [5000, 0, 5001, 9]; expected a box inside the "
         "336 x 252 image"),
        ("box-invalid", "field `bboxes[2]` is [1, 2, 3]; expected a box [x1, y1, x2, y2] in "
         "pixels"),
        ("box-clipped", "field `bboxes[3]` is [300, 20, 380, 110]; it reaches 44 pixels out of the "
         "336 x 252 image and is cut there: check whether box and image belong together"),
        ("polygon-invalid", "field `segmentations[0][0]` is [[1, 1], [9, 9]]; expected at least 3 "
         "points, not 2"),
        ("polygon-invalid", "field `segmentations[0][1]` is [1, 1, 9]; expected an even count of "
         "coordinates, not 3"),
        ("polygon-invalid", "field `segmentations[1]` is 3; expected a list of polygons, each a "
         "flat list x, y, x, y of at least 3 points; or run lengths {size: [height, width], "
         "counts}"),
        ("polygon-invalid", "field `segmentations[2][0]` is 7; expected a list of polygons, each a "
         "flat list x, y, x, y of at least 3 points"),
    ]  # fmt: skip
    assert [finding.code for finding in findings[8:]] == ["region-unmentioned"]


def test_run_length_by_run_length(encoder: ConversationEncoder) -> None:
    clean = {"size": [252, 336], "counts": [252 * 40 + 30, 60, 252 * 296 - 90]}
    turned = {**clean, "size": [336, 252]}
    short = {**clean, "counts": [9, 9]}
    record = record_of("regions", segmentations=[turned, short])
    findings = lint_one(record, sample_encoder(encoder), image=picture())
    assert [(finding.code, finding.message) for finding in findings] == [
        ("mask-size", "field `segmentations[0].size` is [336, 252]; expected [252, 336], height "
         "and width of the image: these are width and height, or those before its EXIF rotation"),
        ("mask-invalid", "field `segmentations[1].counts` is 2 lengths of 18 pixels in all; "
         "expected 252 x 336 = 84672 pixels, as size says"),
    ]  # fmt: skip
    vcr: dict[str, Any] = record_of("vcr")
    vcr["meta"]["segms"][0] = short
    findings = lint_one(vcr, sample_encoder(encoder), image=picture())
    assert [(f.code, f.message[:24]) for f in findings] == [
        ("mask-invalid", "field `segms[0].counts` "),
    ]
    record = record_of("regions", segmentations=[clean, None])
    assert lint_one(record, sample_encoder(encoder), image=picture()) == []


def test_vcr_objects_that_any_text_mentions(encoder: ConversationEncoder) -> None:
    record: dict[str, Any] = record_of("vcr")
    bad = [[40, 40, 90, 40, 0.5], [9, 9, 1, 1, 0.5], [1000, 9, 2000, 19, 0.5]]
    record["meta"]["boxes"] = bad
    record["answer_choices"] = [["no"], [[1], "barks"], ["so"], ["it"]]
    record["rationale_choices"] = [["a"], ["b"], ["c"], ["it", "smiles"]]
    findings = lint_one(record, sample_encoder(encoder), image=picture())
    # Object 2 is never mentioned: its box is not used.
    assert [(f.code, f.message[:15]) for f in findings] == [
        ("box-empty", "field `boxes[0]"),
        ("box-reversed", "field `boxes[1]"),
    ]
