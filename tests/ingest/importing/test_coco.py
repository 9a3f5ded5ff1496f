"""COCO and LVIS: forms of boxes, crowds, run lengths, orientation, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ingest.importing.exports import (
    KITCHEN,
    SCENE,
    coco,
    lvis,
    put_json,
    put_pictures,
    ring_mask,
    turned,
)
from tests.ingest.importing.importing import imported, manifest_of, refused, seen, things
from vipllava.visual_prompts.rle import check_rle, mask_of_rle, rle_of_mask

Change = Callable[[dict[str, Any]], None]


def put(root: Path, given: dict[str, Any], scene=SCENE) -> Path:
    put_pictures(root / "there", scene)
    return put_json(root / "there" / "instances.json", given)


def changed(root: Path, change: Change, scene=SCENE) -> Path:
    given = coco(scene)
    change(given)
    return put(root, given, scene)


def set_boxes(form: Callable[[Any, Any], list[float]]) -> Change:
    """Write all boxes in another form, given box and picture."""

    def change(given: dict[str, Any]) -> None:
        images = {image["id"]: image for image in given["images"]}
        for item in given["annotations"]:
            item["bbox"] = form(item["bbox"], images[item["image_id"]])
            item["segmentation"] = []

    return change


def to_corners(box: list[float], image: dict[str, Any]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y + height]


def to_fractions(box: list[float], image: dict[str, Any]) -> list[float]:
    return [n / image["height" if at % 2 else "width"] for at, n in enumerate(box)]


def test_what_speaks_for_the_form_of_boxes_is_said(tmp_path: Path):
    summary, _ = imported(tmp_path, "coco", put(tmp_path, coco()))
    assert summary.facts["boxes"] == (
        "read as x, y, width, height. As x, y, width, height 3 of 3 lie in their pictures, as x1, "
        "y1, x2, y2 0; of 3 with polygons 3 and 0 are the box around them"
    )


def test_boxes_of_corners_are_recognised(tmp_path: Path):
    source = changed(tmp_path, set_boxes(to_corners))
    why = refused(tmp_path, "coco", source)
    assert "the boxes look like x1, y1, x2, y2" in why
    assert "1 of 3 lie in their pictures, as x1, y1, x2, y2 3" in why
    assert "Pass box_form=xyxy" in why
    _, records = imported(tmp_path, "coco", source, box_form="xyxy")
    assert things(records) == seen(SCENE)


def test_polygons_tell_corners_where_boxes_fit_both_ways(tmp_path: Path):
    def change(given: dict[str, Any]) -> None:
        (given["annotations"],) = [[given["annotations"][1]]]
        given["annotations"][0]["bbox"] = [8, 16, 48, 32]  # as x, y, width, height it fits, too

    why = refused(tmp_path, "coco", changed(tmp_path, change))
    assert "of 1 with polygons 0 and 1 are the box around them" in why


def test_fractions_are_recognised(tmp_path: Path):
    why = refused(tmp_path, "coco", changed(tmp_path, set_boxes(to_fractions)))
    assert "all 3 boxes lie within 0..1: they look like fractions of the picture" in why


def test_per_cent_is_recognised_in_many_boxes(tmp_path: Path):
    def change(given: dict[str, Any]) -> None:
        set_boxes(lambda box, image: [100 * n for n in to_fractions(box, image)])(given)
        given["images"][0] |= {"width": 400, "height": 240}
        given["annotations"] *= 10
        given["annotations"][0] = {**given["annotations"][0], "bbox": [82, 10, 15, 5]}

    assert "all 30 boxes lie within 0..100" in refused(tmp_path, "coco", changed(tmp_path, change))


def test_a_box_out_of_its_picture_is_named_one_at_its_edge_cut_off(tmp_path: Path):
    def change(given: dict[str, Any]) -> None:
        given["annotations"] = given["annotations"] * 6
        for item in given["annotations"]:
            item["segmentation"] = []
        given["annotations"][0] = {**given["annotations"][0], "bbox": [150, 20, 60, 50]}

    summary, records = imported(tmp_path, "coco", changed(tmp_path, change))
    assert records[0]["bboxes"][0] == [150, 20, 200, 70]
    (found,) = summary.report.findings
    assert found.code == "box-clipped"
    assert found.place == "instances.json, image 11, annotation 100"
    assert found.message.startswith("its box reaches 10 pixels out of its 200 x 120 picture")

    def outside(given: dict[str, Any]) -> None:
        change(given)
        given["annotations"][0]["bbox"] = [300, 20, 60, 50]

    (tmp_path / "two").mkdir()
    why = refused(tmp_path / "two", "coco", changed(tmp_path / "two", outside))
    assert "1 of 18 regions cannot be imported (box-outside 1), and nothing was written" in why
    assert "annotation 100: field `bboxes[0]` is [300.0, 20.0, 360.0, 70.0]; expected a box" in why


def test_crowds_and_masks_stay_run_lengths(tmp_path: Path):
    mask = ring_mask(KITCHEN.size, (150, 20, 190, 70))
    packed = rle_of_mask(mask)
    lengths = [int(n) for n in np.diff(np.flatnonzero(np.diff(mask.ravel("F"), prepend=False)))]
    lengths = [20 + 150 * 120, *lengths]
    lengths.append(mask.size - sum(lengths))

    def change(given: dict[str, Any]) -> None:
        first, second, third = given["annotations"]
        first |= {"segmentation": packed}
        second |= {"iscrowd": 1, "segmentation": {"size": [120, 200], "counts": lengths}}
        second |= {"bbox": [150, 20, 40, 50]}
        third |= {
            "bbox": [],
            "segmentation": rle_of_mask(ring_mask((160, 200), (24, 104, 104, 184))),
        }

    source = changed(tmp_path, change)
    summary, records = imported(tmp_path, "coco", source)
    kept = [each for record in records for each in record["segmentations"]]
    assert kept[:2] == [packed, {"size": [120, 200], "counts": lengths}]  # as they came
    for each in kept[:2]:
        assert np.array_equal(mask_of_rle(check_rle(each, "mask")), mask)
    assert records[1]["bboxes"] == [[24, 104, 104, 184]]
    assert summary.facts["crowds"] == "1: they are regions like others"
    (tmp_path / "two").mkdir()
    _, records = imported(tmp_path / "two", "coco", source, crowds=False)
    assert [len(record["bboxes"]) for record in records] == [1, 1]


def test_run_lengths_are_those_of_pycocotools(tmp_path: Path):
    coco_mask = pytest.importorskip("pycocotools.mask")
    mask = ring_mask(KITCHEN.size, (150, 20, 190, 70))
    with warnings.catch_warnings(action="ignore"):  # of its own use of numpy
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    rle = {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode()}
    source = changed(tmp_path, lambda given: given["annotations"][0].update(segmentation=rle))
    _, records = imported(tmp_path, "coco", source)
    stored = records[0]["segmentations"][0]
    with warnings.catch_warnings(action="ignore"):
        back = coco_mask.decode({**stored, "counts": stored["counts"].encode()})
    assert np.array_equal(back.astype(bool), mask)


def _set(number: int, **fields: Any) -> Change:
    return lambda given: given["annotations"][number].update(fields)


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (
            _set(0, segmentation={"size": [200, 120], "counts": [24000]}), "annotation 100",
            "its run lengths are of 120 x 200 pixels, its picture has 200 x 120",
        ),
        (
            _set(0, segmentation={"size": [120, 200], "counts": [20000, 5000]}), "annotation 100",
            "its segmentation.counts is 2 lengths of 25000 pixels in all; expected 120 x 200",
        ),
        (
            _set(0, segmentation={"size": [120, 200], "counts": "~~"}), "annotation 100",
            "COCO's letters from `0` to `o`",
        ),
        (_set(1, category_id=None), "annotation 101", "it has no category_id"),
        (
            _set(1, category_id=9), "annotation 101",
            "its category_id is 9, of which `categories` has no name",
        ),
        (
            _set(2, image_id=99), "annotation 102",
            "its image_id is 99, which `images` does not list",
        ),
        (_set(0, bbox=[150, 20, -40, 50]), "annotation 100", "a width or height below 0"),
        (_set(0, bbox=[150, 20, 0, 50]), "annotation 100", "a box with an area: this one is empty"),
        (_set(0, bbox=[150, 20, 1e-7, 50]), "annotation 100", "this one is empty"),
        (_set(0, bbox=[150, 20, 40]), "annotation 100", "expected a list of 4 numbers"),
        (_set(0, segmentation=[[1, 2, 3, 4]]), "annotation 100", "of 3 points or more"),
        (
            lambda given: given["images"][0].update(file_name="lost.jpg"), "image 11",
            "its picture lost.jpg is missing: looked in",
        ),
        (
            lambda given: given["images"][0].update(width=400, height=240), "image 11",
            "the export says 400 x 240, the picture",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_named_and_nothing_written(
    tmp_path: Path, change: Change, place: str, message: str
):
    why = refused(tmp_path, "coco", changed(tmp_path, change))
    assert "\n- instances.json, " in why
    assert place in why
    assert message in why
    assert "nothing was written" in why


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": [], "annotations": [{"caption": "a"}]}, "captions, for example, have neither"),
        (
            {"images": [], "categories": [], "annotations": [{"segments_info": []}]},
            "is a panoptic file",
        ),
        ({"images": []}, "has no list `annotations`"),
        ([], "is no JSON object"),
        ({"images": [], "annotations": [], "categories": []}, "has no region"),
    ],
)
def test_files_that_are_none(tmp_path: Path, given: Any, message: str):
    assert message in refused(tmp_path, "coco", put(tmp_path, given))


def test_a_broken_file_and_one_of_another_format(tmp_path: Path):
    path = tmp_path / "instances.json"
    path.write_text('{"images": [')
    assert "instances.json is not JSON (" in refused(tmp_path, "coco", path)
    why = refused(tmp_path, "coco", put(tmp_path, lvis()))
    assert f"is of LVIS, not of COCO: `vipllava import lvis {tmp_path}" in why


# Which pixels are counted, where an EXIF block turns a picture.


def test_stated_sizes_tell_upright_pixels(tmp_path: Path):
    scene = turned(6)
    summary, records = imported(tmp_path, "coco", put(tmp_path, coco(scene), scene))
    assert manifest_of(summary)["apply_exif_orientation"] is True
    assert things(records) == seen(scene)


def test_stated_sizes_tell_stored_pixels(tmp_path: Path):
    scene = turned(6)
    given = coco(scene, stored=True)
    stored = (100, 20, 110, 60)  # in the 120 x 200 pixels of the file
    for item in given["annotations"][:2]:
        item |= {"bbox": [100, 20, 10, 40], "segmentation": []}
    summary, records = imported(tmp_path, "coco", put(tmp_path, given, scene))
    assert manifest_of(summary)["apply_exif_orientation"] is False
    assert (records[0]["width"], records[0]["height"]) == (120, 200)
    assert records[0]["bboxes"] == [list(stored)] * 2


def test_where_nothing_tells_the_user_is_asked(tmp_path: Path):
    scene = turned(3)
    source = put(tmp_path, coco(scene), scene)
    why = refused(tmp_path, "coco", source)
    assert "1 pictures have an EXIF orientation (the first: instances.json, image 11)" in why
    assert "pass exif=upright or exif=stored" in why
    summary, records = imported(tmp_path, "coco", source, exif="upright")
    assert manifest_of(summary)["apply_exif_orientation"] is True
    assert things(records) == seen(scene)


def test_label_studios_coco_states_stored_sizes_of_upright_boxes(tmp_path: Path):
    """Its issue 6608: boxes out of their pictures show it, and the user says which it is."""
    scene = turned(6)
    source = put(tmp_path, coco(scene, stored=True), scene)
    why = refused(tmp_path, "coco", source, box_form="xywh")
    assert "expected a box inside the 120 x 200 image" in why
    _, records = imported(tmp_path, "coco", source, box_form="xywh", exif="upright")
    assert things(records) == seen(scene)


def test_pictures_that_disagree_are_refused(tmp_path: Path):
    scene = (*turned(6), *(turned(6)[:1]))
    given = coco(scene)
    given["images"][2] |= {"width": 120, "height": 200, "file_name": "other.jpg"}
    put_pictures(tmp_path / "there", scene)
    (tmp_path / "there" / "other.jpg").write_bytes(scene[0].encoded())
    source = put_json(tmp_path / "there" / "instances.json", given)
    why = refused(tmp_path, "coco", source, box_form="xywh")
    assert "upright pixels in instances.json, image 11, and pixels as stored in" in why
    assert "instances.json, image 13" in why


def test_lvis_counts_stored_pixels_and_knows_more_of_a_category(tmp_path: Path):
    scene = turned(3)
    put_pictures(tmp_path / "there" / "val2017", scene)
    source = put_json(tmp_path / "there" / "lvis_v1_val.json", lvis(scene))
    summary, records = imported(
        tmp_path, "lvis", source, spaces=True,
        question=("What is {region}, in other words {synonyms}?",),
        answer="{category}: {definition}",
    )  # fmt: skip
    assert manifest_of(summary)["apply_exif_orientation"] is False
    said = records[0]["conversations"]
    assert said[0]["value"] == "<image>\nWhat is <bbox0>, in other words cup, cup_2?"
    assert said[1]["value"] == "cup (thing): a cup to use"
