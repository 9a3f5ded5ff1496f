"""VIA: shapes and attributes of versions 2 and 3."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.ingest.importing.exports import KITCHEN, SCENE, put_json, put_pictures, via_2, via_3
from tests.ingest.importing.importing import imported, refused


def put(root: Path, given: Any) -> Path:
    put_pictures(root / "there")
    return put_json(root / "there" / "via.json", given)


def version_2(root: Path, shape: dict[str, Any], **attributes: Any) -> Path:
    """Put a project of one region."""
    given = via_2((KITCHEN,))
    (image,) = given["_via_img_metadata"].values()
    about = attributes or {"object": "cup"}
    image["regions"] = [{"shape_attributes": shape, "region_attributes": about}]
    return put(root, given)


def version_3(root: Path, xy: list[Any], **changes: Any) -> Path:
    given = via_3((KITCHEN,))
    key = next(iter(given["metadata"]))
    given["metadata"] = {key: given["metadata"][key] | {"xy": xy} | changes}
    return put(root, given)


def box_of(root: Path, source: Path) -> list[float]:
    _, (record,) = imported(root, "via", source)
    return record["bboxes"][0]


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ({"name": "circle", "cx": 60, "cy": 50, "r": 20}, [40, 30, 80, 70]),
        (
            {"name": "ellipse", "cx": 60, "cy": 50, "rx": 40, "ry": 20, "theta": 0},
            [20, 30, 100, 70],
        ),
        (
            {"name": "ellipse", "cx": 60, "cy": 50, "rx": 40, "ry": 20, "theta": math.pi / 2},
            [40, 10, 80, 90],
        ),
        (
            {"name": "polygon", "all_points_x": [20, 60, 40], "all_points_y": [30, 30, 70]},
            [20, 30, 60, 70],
        ),
        (
            {"name": "polyline", "all_points_x": [20, 60], "all_points_y": [30, 70]},
            [20, 30, 60, 70],
        ),
        ({"name": "point", "cx": 60, "cy": 50}, [59.5, 49.5, 60.5, 50.5]),
    ],
)
def test_shapes_of_version_2(tmp_path: Path, shape: dict[str, Any], box: list[float]):
    assert box_of(tmp_path, version_2(tmp_path, shape)) == box


@pytest.mark.parametrize(
    ("xy", "box"),
    [
        ([1, 60, 50], [59.5, 49.5, 60.5, 50.5]),
        ([3, 60, 50, 20], [40, 30, 80, 70]),
        ([4, 60, 50, 40, 20], [20, 30, 100, 70]),
        ([5, 20, 30, 60, 70], [20, 30, 60, 70]),
        ([6, 20, 30, 60, 70, 30, 90], [20, 30, 60, 90]),
        ([7, 20, 30, 60, 30, 40, 70], [20, 30, 60, 70]),
        ([8, 20, 50, 60, 30, 100, 55, 70, 90], [20, 30, 100, 90]),
        ([9, 40, 50, 80, 50, 60, 30], [40, 30, 80, 70]),
    ],
)
def test_shapes_of_version_3(tmp_path: Path, xy: list[float], box: list[float]):
    assert box_of(tmp_path, version_3(tmp_path, xy)) == box


RECT = {"name": "rect", "x": 20, "y": 30, "width": 40, "height": 40}


def test_of_several_attributes_one_is_named(tmp_path: Path):
    source = version_2(
        tmp_path, RECT, kind="cup", colour={"red": True, "blue": True, "lime": False}
    )
    why = refused(tmp_path, "via", source)
    assert "regions have several attributes, or none; name the one that is meant: category=" in why
    assert "category=size: no region has this attribute; there are: kind, colour" in refused(
        tmp_path, "via", source, category="size"
    )
    answer = "{colour} {category}"
    summary, (record,) = imported(tmp_path, "via", source, category="kind", answer=answer)
    assert record["conversations"][1]["value"] == "red, blue cup"
    assert summary.facts["category"] == "the attribute `kind`"


def test_the_attribute_of_that_name_is_the_category(tmp_path: Path):
    source = version_2(tmp_path, RECT, category="cup", size="small")
    _, (record,) = imported(tmp_path, "via", source)
    assert record["conversations"][1]["value"] == "cup"


def test_choices_of_version_3_are_texts(tmp_path: Path):
    source = version_3(tmp_path, [2, 20, 30, 40, 40], av={"1": "0,1"})
    _, (record,) = imported(tmp_path, "via", source)
    assert record["conversations"][1]["value"] == "cup, fork"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"name": "cube"}, "its shape is 'cube'; known: rect, circle"),
        ({"name": "rect", "x": 1, "y": 2, "width": None, "height": 4}, "its rect has width=None"),
        (
            {"name": "polygon", "all_points_x": [1, 2, 3], "all_points_y": [1, 2]},
            "its polygon has 3 x and 2 y",
        ),
        ({"name": "circle", "cx": 5, "cy": 5, "r": 0}, "an ellipse of radii 0 and 0 has no area"),
    ],
)
def test_what_is_refused_of_version_2(tmp_path: Path, shape: dict[str, Any], message: str):
    why = refused(tmp_path, "via", version_2(tmp_path, shape))
    assert f"- via.json, picture kitchen.jpg, region 0: {message}" in why


@pytest.mark.parametrize(
    ("xy", "changes", "message"),
    [
        ([2, 1, 2, 3], {}, "its xy is [2, 1, 2, 3]; expected 4 numbers behind the shape"),
        ([[2], 1, 2], {}, "its xy is [[2], 1, 2]; expected the number of its shape"),
        (" ", {}, "its xy is []; expected the number of its shape"),
        ([12, 1, 2], {}, "its shape is number 12; known: 1 to 9"),
        ([2, 1, 2, 3, 4], {"z": [1.5]}, "it belongs to a time of a video"),
        ([9, 1, 1, 2, 2, 3, 3], {}, "no circle goes through"),
        ([2, 1, 2, 3, 4], {"vid": "7"}, "its view is '7', which the project does not have"),
    ],
)
def test_what_is_refused_of_version_3(tmp_path: Path, xy: Any, changes: Any, message: str):
    assert message in refused(tmp_path, "via", version_3(tmp_path, xy, **changes))


def test_pictures_lie_where_the_project_says(tmp_path: Path):
    put_pictures(tmp_path / "there" / "photos")
    given = via_2()
    given["_via_settings"]["core"]["default_filepath"] = "photos/"
    source = put_json(tmp_path / "there" / "via.json", given)
    summary, _ = imported(tmp_path, "via", source)
    assert summary.num_images == len(SCENE)


def test_what_is_none_of_vias(tmp_path: Path):
    assert "has no pictures with `filename` and `regions`" in refused(
        tmp_path, "via", put(tmp_path, {"a": {"b": 1}})
    )
    table = tmp_path / "there" / "via.csv"
    table.write_text("filename,x\na.jpg,1\n")
    assert "has no column region_shape_attributes" in refused(tmp_path, "via", table)
    table.write_text(
        "#filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,"
        'region_attributes\nkitchen.jpg,1,{},1,0,"{""name"":",{}\n'
    )
    assert "line 2: region_shape_attributes is no JSON" in refused(tmp_path, "via", table)
