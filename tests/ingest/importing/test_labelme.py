"""LabelMe: every shape, versions, groups, pictures inside of the file."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ingest.importing.exports import (
    KITCHEN,
    Picture,
    labelme,
    labelme_mask,
    put_json,
    put_pictures,
    ring_mask,
    shape,
)
from tests.ingest.importing.importing import imported, manifest_of, refused
from vipllava.ingest.lint.findings import CODES as LINT_CODES
from vipllava.visual_prompts.rle import check_rle, mask_of_rle

SQUARE = [(20, 20), (60, 20), (60, 60), (20, 60)]


def put(root: Path, *shapes: dict[str, Any], **changes: Any) -> Path:
    put_pictures(root / "there", (KITCHEN,))
    return put_json(root / "there" / "kitchen.json", labelme(KITCHEN, *shapes, **changes))


def region(root: Path, *shapes: dict[str, Any]) -> tuple[list[float], Any, Any, list[str]]:
    """Import shapes that are one region; return box, mask, mark and what was found."""
    summary, (record,) = imported(root, "labelme", put(root, *shapes))
    (box,) = record["bboxes"]
    (mask,) = record.get("segmentations", [None])
    (mark,) = record.get("visual_prompts", [None])
    return box, mask, mark, [found.code for found in summary.report.findings]


def test_a_polygon(tmp_path: Path):
    box, mask, mark, found = region(tmp_path, shape("cup", "polygon", SQUARE))
    assert (box, mask, mark, found) == (
        [20, 20, 60, 60], [[20, 20, 60, 20, 60, 60, 20, 60]], None, [],
    )  # fmt: skip


def test_a_turned_rectangle_of_version_6(tmp_path: Path):
    points = [(40, 20), (60, 40), (40, 60), (20, 40)]
    box, mask, _, _ = region(tmp_path, shape("cup", "oriented_rectangle", points))
    assert (box, mask) == ([20, 20, 60, 60], [[40, 20, 60, 40, 40, 60, 20, 40]])


@pytest.mark.parametrize("points", [[(60, 60), (20, 20)], [(20, 60), (60, 20)]])
def test_a_rectangle_drawn_from_another_corner(tmp_path: Path, points: Any):
    box, mask, _, found = region(tmp_path, shape("cup", "rectangle", points))
    assert (box, mask, found) == ([20, 20, 60, 60], None, ["corners-reversed"])


def test_a_circle(tmp_path: Path):
    box, mask, _, _ = region(tmp_path, shape("cup", "circle", [(60, 60), (90, 100)]))
    assert box == [10, 10, 110, 110]
    (ring,) = mask
    points = np.array(ring).reshape(-1, 2)
    assert np.allclose(np.linalg.norm(points - 60, axis=1), 50, atol=0.01)
    x, y = points.T
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
    assert area == pytest.approx(math.pi * 50**2, rel=0.003)


def test_a_point_stays_a_point(tmp_path: Path):
    box, mask, mark, _ = region(tmp_path, shape("cup", "point", [(30.5, 40)]))
    assert (box, mask, mark) == ([30, 39.5, 31, 40.5], None, {"shape": "point"})


@pytest.mark.parametrize(
    ("kind", "points", "box"),
    [
        ("line", [(20, 60), (60, 30)], [20, 30, 60, 60]),
        ("line", [(20, 30), (60, 30)], [20, 29.5, 60, 30.5]),
        ("linestrip", [(20, 60), (60, 30), (50, 80)], [20, 30, 60, 80]),
    ],
)
def test_a_line_becomes_the_box_around_it_and_that_is_said(
    tmp_path: Path, kind: str, points: Any, box: list[float]
):
    assert region(tmp_path, shape("cup", kind, points)) == (box, None, None, ["shape-boxed"])


def test_a_mask_keeps_its_hole(tmp_path: Path):
    mask = ring_mask(KITCHEN.size, (20, 30, 60, 80))
    box, rle, _, _ = region(tmp_path, labelme_mask("cup", mask))
    assert box == [20, 30, 60, 80]
    assert np.array_equal(mask_of_rle(check_rle(rle, "mask")), mask)


def test_shapes_of_a_group_are_one_region(tmp_path: Path):
    other = [(100, 70), (120, 70), (110, 90)]
    box, mask, _, _ = region(
        tmp_path,
        shape("cup", "rectangle", [SQUARE[0], SQUARE[2]], group_id=3),
        shape("cup", "polygon", other, group_id=3),
    )
    assert box == [20, 20, 120, 90]
    assert mask == [[20, 20, 60, 20, 60, 60, 20, 60], [100, 70, 120, 70, 110, 90]]


def test_a_group_with_a_mask_becomes_one_mask(tmp_path: Path):
    mask = ring_mask(KITCHEN.size, (20, 30, 60, 80))
    given = labelme_mask("cup", mask) | {"group_id": 3}
    other = shape("cup", "polygon", [(100, 70), (119, 70), (119, 89), (100, 89)], group_id=3)
    box, rle, _, _ = region(tmp_path, given, other)
    assert box == [20, 30, 120, 90]
    whole = mask.copy()
    whole[70:90, 100:120] = True
    assert np.array_equal(mask_of_rle(check_rle(rle, "mask")), whole)


def test_groups_are_of_one_label(tmp_path: Path):
    shapes = [shape(label, "polygon", SQUARE, group_id=3) for label in ("cup", "fork")]
    _, (record,) = imported(tmp_path, "labelme", put(tmp_path, *shapes))
    assert len(record["bboxes"]) == 2


def test_version_4(tmp_path: Path):
    old = {"label": "cup", "points": [[20.0, 20.0], [60.0, 60.0]], "group_id": None}
    old |= {"shape_type": "rectangle", "flags": {}}
    source = put(tmp_path, old, version="4.5.6", imageData="", imagePath="..\\there\\kitchen.jpg")
    _, (record,) = imported(tmp_path, "labelme", source)
    assert record["bboxes"] == [[20, 20, 60, 60]]
    assert record["image"] == "kitchen.jpg"


def test_attributes_are_placeholders(tmp_path: Path):
    given = shape("cup", "polygon", SQUARE, description="blue, empty", flags={"broken": True})
    _, (record,) = imported(
        tmp_path, "labelme", put(tmp_path, given), answer="a {category}: {description}, {broken}"
    )
    assert record["conversations"][1]["value"] == "a cup: blue, empty, yes"


def test_a_picture_in_the_file_is_unpacked_if_there_is_no_other(tmp_path: Path):
    lying = Picture(KITCHEN.name, KITCHEN.size, KITCHEN.things, 6)
    encoded = KITCHEN.encoded()  # LabelMe turns it before it keeps it
    given = labelme(lying, imageData=base64.b64encode(encoded).decode())
    source = put_json(tmp_path / "there" / "kitchen.json", given)
    summary, (record,) = imported(tmp_path, "labelme", source)
    assert record["image"] == "mine/embedded/000000.jpg"
    assert (tmp_path / "data" / record["image"]).read_bytes() == encoded
    assert manifest_of(summary)["image_roots"] == ["mine/embedded"]
    put_pictures(tmp_path / "there", (lying,))
    _, (record,) = imported(tmp_path / "two", "labelme", source)
    assert record["image"] == "kitchen.jpg"


@pytest.mark.parametrize("data", ["%", "\ud83d", "AAAA"])
def test_a_picture_in_the_file_that_is_none(tmp_path: Path, data: str):
    source = put_json(tmp_path / "there" / "kitchen.json", labelme(KITCHEN, imageData=data))
    why = refused(tmp_path, "labelme", source)
    assert "kitchen.json, picture kitchen.jpg" in why
    assert "its imageData is no base64" in why or "are no image" in why


def test_a_folder_of_files_and_one_that_is_none(tmp_path: Path):
    source = put(tmp_path)
    put_json(source.parent / "more" / "settings.json", {"a": 1})
    summary, records = imported(tmp_path, "labelme", source.parent)
    assert len(records) == 1
    (found,) = summary.report.findings
    assert (found.code, found.place) == ("file-ignored", "more/settings.json")
    (tmp_path / "empty").mkdir()
    assert "holds no *.json" in refused(tmp_path / "two", "labelme", tmp_path / "empty")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (shape("cup", "cuboid", SQUARE), "its shape_type is 'cuboid'; known: rectangle, polygon"),
        (shape("cup", "polygon", SQUARE[:2]), "its polygon has 2 points; expected at least 3"),
        (shape("cup", "circle", SQUARE), "its circle has 4 points; expected 2"),
        (shape("cup", "mask", SQUARE[:2]), "its mask is no PNG in base64 (None is no text)"),
        (shape("cup", "mask", SQUARE[:2], mask="AAAA"), "its mask is no PNG in base64"),
        (shape(" ", "polygon", SQUARE), "its label is ' '"),
        (shape("cup", "point", [(300, 10)]), "the point 300, 10 is outside its 200 x 120 picture"),
        (shape("cup", "polygon", [(1, "a")]), "a point of its polygon has 'a'; expected finite"),
    ],
)
def test_what_is_refused_has_file_and_shape(tmp_path: Path, given: dict[str, Any], message: str):
    why = refused(tmp_path, "labelme", put(tmp_path, given))
    assert f"- kitchen.json, picture kitchen.jpg, shape 0: {message}" in why


def test_fractions_are_recognised_in_any_tools_pixels(tmp_path: Path):
    points = [(0.1, 0.2), (0.4, 0.5)]
    why = refused(tmp_path, "labelme", put(tmp_path, shape("cup", "rectangle", points)))
    assert "all 1 boxes lie within 0..1 pixels: they look like fractions" in why


def test_per_cent_is_a_remark(tmp_path: Path):
    picture = Picture("large.png", (400, 300), ())
    put_pictures(tmp_path / "there", (picture,))
    shapes = [shape("cup", "rectangle", [(n, n), (n + 60, 90)]) for n in range(25)]
    source = put_json(tmp_path / "there" / "large.json", labelme(picture, *shapes))
    summary, _ = imported(tmp_path, "labelme", source)
    (found,) = summary.report.findings
    assert found.code == "box-form"
    assert "they look like per cent of the image" in found.message
    assert LINT_CODES[found.code][0] == "warning"
