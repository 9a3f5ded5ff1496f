"""Label Studio: turned shapes, brushes, several annotations, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ingest.importing.exports import (
    KITCHEN,
    brush_of_mask,
    label_studio_min,
    ls_result,
    ls_task,
    ls_value,
    put_json,
    put_pictures,
    ring_mask,
)
from tests.ingest.importing.importing import imported, refused
from vipllava.ingest.importing.brush import mask_of_brush
from vipllava.types import RecordError
from vipllava.visual_prompts.rle import check_rle, mask_of_rle


def put(root: Path, *tasks: dict[str, Any]) -> Path:
    put_pictures(root / "there")
    return put_json(root / "there" / "project.json", [*tasks])


def task(value: dict[str, Any], kind: str = "rectanglelabels", **more: Any) -> dict[str, Any]:
    """Return a task of one region in a picture of 200 x 120."""
    return ls_task(1, KITCHEN, {**ls_result(KITCHEN, kind, "cup", value, "r0"), **more})


def region(root: Path, given: dict[str, Any]) -> tuple[list[float], Any, Any]:
    _, (record,) = imported(root, "label-studio", put(root, given))
    (box,) = record["bboxes"]
    (mask,) = record.get("segmentations", [None])
    (mark,) = record.get("visual_prompts", [None])
    return box, mask, mark


def test_a_turned_rectangle_keeps_its_upper_left_corner(tmp_path: Path):
    """In pixels: 40 wide, 20 high, turned clockwise by a right angle about 100, 60."""
    value = {"x": 50, "y": 50, "width": 20, "height": 100 * 20 / 120, "rotation": 90}
    box, mask, _ = region(tmp_path, task(value))
    assert box == [80, 60, 100, 100]
    assert mask == [[100, 60, 100, 100, 80, 100, 80, 60]]


def test_an_ellipse_and_a_polygon_and_a_key_point(tmp_path: Path):
    ellipse = {"x": 50, "y": 50, "radiusX": 20, "radiusY": 100 * 20 / 120, "rotation": 0}
    box, _, _ = region(tmp_path, task(ellipse, "ellipselabels"))
    assert box == [60, 40, 140, 80]
    polygon = {"points": [[10, 50], [30, 50], [20, 75]], "closed": True}
    box, mask, _ = region(tmp_path / "b", task(polygon, "polygonlabels"))
    assert (box, mask) == ([20, 60, 60, 90], [[20, 60, 60, 60, 40, 90]])
    point = {"x": 50, "y": 50, "width": 0.5}
    box, _, mark = region(tmp_path / "c", task(point, "keypointlabels"))
    assert (box, mark) == ([99.5, 59.5, 100.5, 60.5], {"shape": "point"})


def test_a_brush_keeps_its_hole(tmp_path: Path):
    mask = ring_mask(KITCHEN.size, (20, 30, 60, 80))
    given = task({"format": "rle", "rle": brush_of_mask(mask)}, "brushlabels")
    box, rle, _ = region(tmp_path, given)
    assert box == [20, 30, 60, 80]
    assert np.array_equal(mask_of_rle(check_rle(rle, "mask")), mask)


def test_labels_and_answers_of_a_region_belong_to_it(tmp_path: Path):
    """A rectangle, labels and a text of one id, as tags without labels of their own give."""
    value = ls_value(KITCHEN.size, (20, 30, 60, 80))
    parts = [
        {"id": "r0", "type": "rectangle", "from_name": "box", "value": value},
        {"id": "r0", "type": "labels", "from_name": "label", "value": {**value, "labels": ["cup"]}},
        {
            "id": "r0",
            "type": "textarea",
            "from_name": "about",
            "value": {**value, "text": ["blue"]},
        },
        {
            "id": "r0",
            "type": "choices",
            "from_name": "state",
            "value": {**value, "choices": ["full"]},
        },
        {"id": "c", "type": "choices", "from_name": "scene", "value": {"choices": ["indoors"]}},
    ]
    source = put(tmp_path, ls_task(1, KITCHEN, *parts))
    answer = "{category}, {about}, {state}"
    _, (record,) = imported(tmp_path, "label-studio", source, answer=answer)
    assert record["bboxes"] == [[20, 30, 60, 80]]
    assert record["conversations"][1]["value"] == "cup, blue, full"


def test_of_several_annotations_the_newest_counts(tmp_path: Path):
    given = ls_task(1, KITCHEN)
    (old,) = given["annotations"]
    value = ls_value(KITCHEN.size, (20, 30, 60, 80))
    new = ls_result(KITCHEN, "rectanglelabels", "fork", value, "r9")
    dates = [{"created_at": "2026-03-01", "result": [new]}, {"created_at": "2026-04-01"}]
    given["annotations"] = [
        {**old, **dates[0]}, old, {**old, **dates[1], "was_cancelled": True},
    ]  # fmt: skip
    summary, (record,) = imported(tmp_path, "label-studio", put(tmp_path, given))
    assert record["bboxes"] == [[20, 30, 60, 80]]
    (found,) = summary.report.findings
    assert (found.code, found.place) == ("annotations-several", "project.json, task 1")
    given["annotations"][1] = {**old, "ground_truth": True}
    _, (record,) = imported(tmp_path / "b", "label-studio", put(tmp_path / "b", given))
    assert len(record["bboxes"]) == 2


def test_rows_of_one_task_are_its_annotations(tmp_path: Path):
    rows = label_studio_min()[:1] * 2
    summary, records = imported(tmp_path, "label-studio", put(tmp_path, *rows))
    assert len(records) == 1
    assert [found.code for found in summary.report.findings] == ["annotations-several"]


def test_predictions_are_left_out_and_that_is_said(tmp_path: Path):
    other = ls_task(2, KITCHEN) | {"predictions": [{"result": []}], "annotations": []}
    summary, _ = imported(tmp_path, "label-studio", put(tmp_path, ls_task(1, KITCHEN), other))
    assert summary.facts["predictions"] == "1 tasks have nothing else; they are left out"
    assert summary.num_empty == 1


BOX = ls_value(KITCHEN.size, (20, 30, 60, 80))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (task(BOX, image_rotation=90), "the picture was turned by 90 degrees in Label Studio"),
        (task({"format": "png", "rle": [1]}, "brushlabels"), "its mask has the format 'png'"),
        (task({"vertices": []}, "vectorlabels"), "it is a vector path"),
        (task(BOX | {"x": 640}), "it has 640; Label Studio's are per cent"),
        (
            task({"rle": brush_of_mask(np.zeros((12, 20), bool))}, "brushlabels"),
            "its rle holds 960 values; a picture of 200 x 120 has 96000",
        ),
        (
            task({"rle": brush_of_mask(np.zeros((120, 200), bool))}, "brushlabels"),
            "its mask has no pixel",
        ),
        (ls_task(1, KITCHEN, {"id": "r0", "type": "rectangle", "value": BOX}), "it has no label"),
    ],
)
def test_what_is_refused_has_task_and_region(tmp_path: Path, given: Any, message: str):
    why = refused(tmp_path, "label-studio", put(tmp_path, given))
    assert f"- project.json, task 1, region r0: {message}" in why


def test_fractions_are_recognised(tmp_path: Path):
    value = {"x": 0.1, "y": 0.25, "width": 0.2, "height": 0.4, "rotation": 0}
    why = refused(tmp_path, "label-studio", put(tmp_path, task(value)))
    assert "all 4 coordinates lie within 0..1: they look like fractions" in why


def test_a_task_without_a_picture(tmp_path: Path):
    given = ls_task(1, KITCHEN) | {"data": {"text": "no picture"}}
    why = refused(tmp_path, "label-studio", put(tmp_path, given))
    assert "- project.json, task 1: no field names a picture" in why


# Its run lengths, of bytes that the published encoder makes.

RING = [
    0, 0, 0, 80, 57, 27, 254, 23, 0, 183, 255, 56, 4, 127, 241, 128, 71, 255, 56, 5, 191, 248, 192,
    0,
]  # fmt: skip
"""``mask2rle`` of five by four pixels with a ring of three by three."""
COLOURED = [
    0, 0, 0, 24, 57, 27, 252, 96, 0, 5, 0, 40, 0, 240, 31, 246, 192, 0, 10, 0, 80, 1, 224, 63, 192,
]  # fmt: skip
"""``encode_rle`` of three by two pixels, of which 1, 0 and 2, 1 are (10, 20, 30, 255)."""


def test_what_the_published_encoder_writes_is_read():
    mask = mask_of_brush(RING, 5, 4)
    assert mask.astype(int).tolist() == [
        [0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0],
    ]  # fmt: skip
    assert mask_of_brush(COLOURED, 3, 2).astype(int).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_values_that_are_not_repeated_are_read():
    """As the browser packs them: 1 0 of two pixels in one run of eight values."""
    run = "0" + "00" + "111" + "".join(f"{n:08b}" for n in (9, 9, 9, 255, 0, 0, 0, 0))
    assert mask_of_brush(packed(8, run), 2, 1).tolist() == [[True, False]]


def test_a_run_that_overruns_its_values():
    with pytest.raises(RecordError, match="a run of its rle ends at value 9 of 8"):
        mask_of_brush(packed(8, "1" + "01" + "1000" + "11111111"), 2, 1)


def packed(count: int, runs: str) -> list[int]:
    bits = f"{count:032b}{7:05b}" + "0010" + "0011" + "0111" + "1111" + runs
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


@pytest.mark.parametrize("shape", [(7, 5), (64, 65), (90, 301)])
def test_masks_come_back(shape: tuple[int, int]):
    mask = np.random.default_rng(0).random(shape) < 0.5
    mask[: shape[0] // 2] = False  # a long run
    assert np.array_equal(mask_of_brush(brush_of_mask(mask), shape[1], shape[0]), mask)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RING[:-2], "its rle breaks off: .* bits are wanted, 176 are there"),
        (RING[:3], "its rle breaks off: 32 bits are wanted, 24 are there"),
        ([*RING[:3], 84, *RING[4:]], "its rle holds 84 values; a picture of 5 x 4 has 80"),
        (["a"], "its rle is no list of bytes"),
        ([300], "its rle is no list of bytes"),
        ([-1], "its rle is no list of bytes"),
    ],
)
def test_broken_run_lengths(values: list[Any], message: str):
    with pytest.raises(RecordError, match=message) as caught:
        mask_of_brush(values, 5, 4)
    assert caught.value.fault == ("mask-size" if "of 5 x 4" in message else "mask-invalid")
