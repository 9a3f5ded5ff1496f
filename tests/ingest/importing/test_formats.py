"""The same scene exported by every tool: the boxes are where the tools showed them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ingest.importing.exports import (
    SCENE,
    Picture,
    coco,
    label_studio,
    label_studio_min,
    labelme,
    lvis,
    put_json,
    put_pictures,
    put_via_csv,
    put_yolo,
    turned,
    via_2,
    via_3,
)
from tests.ingest.importing.importing import imported, manifest_of, seen, things
from vipllava.ingest.importing import FORMATS, find_format, recognise
from vipllava.ingest.importing.source import ImportingError

Put = Callable[[Path, tuple[Picture, ...]], Path]
Scene = tuple[Picture, ...]


def put_coco(root: Path, scene: Scene) -> Path:
    put_pictures(root / "images", scene)
    return put_json(root / "annotations" / "instances_default.json", coco(scene))


def put_lvis(root: Path, scene: Scene) -> Path:
    put_pictures(root / "val2017", scene)
    return put_json(root / "annotations" / "lvis_v1_val.json", lvis(scene))


def put_labelme(root: Path, scene: Scene) -> Path:
    put_pictures(root, scene)
    for picture in scene:
        put_json(root / f"{Path(picture.name).stem}.json", labelme(picture))
    return root


def put_via_2(root: Path, scene: Scene) -> Path:
    put_pictures(root, scene)
    return put_json(root / "via_project.json", via_2(scene))


def put_via_2_annotations(root: Path, scene: Scene) -> Path:
    put_pictures(root, scene)
    return put_json(root / "via_region_data.json", via_2(scene)["_via_img_metadata"])


def put_via_table(root: Path, scene: Scene) -> Path:
    put_pictures(root, scene)
    return put_via_csv(root / "via_region_data.csv", scene)


def put_via_3(root: Path, scene: Scene) -> Path:
    put_pictures(root, scene)
    return put_json(root / "via_project_3.json", via_3(scene))


def put_label_studio(root: Path, scene: Scene) -> Path:
    put_pictures(root / "images", scene)
    return put_json(root / "project-1-at-2026.json", label_studio(scene))


def put_label_studio_min(root: Path, scene: Scene) -> Path:
    put_pictures(root / "images", scene)
    return put_json(root / "project-1-at-2026-min.json", label_studio_min(scene))


EXPORTS: dict[str, tuple[str, Put]] = {
    "coco": ("coco", put_coco),
    "lvis": ("lvis", put_lvis),
    "labelme": ("labelme", put_labelme),
    "via-2": ("via", put_via_2),
    "via-2-annotations": ("via", put_via_2_annotations),
    "via-csv": ("via", put_via_table),
    "via-3": ("via", put_via_3),
    "label-studio": ("label-studio", put_label_studio),
    "label-studio-min": ("label-studio", put_label_studio_min),
    "yolo": ("yolo", put_yolo),
}


def answer(form: str) -> str:
    return "{synset}" if form == "lvis" else "{category}"


def plain(found: dict[str, list]) -> dict[str, list]:
    """Return things of LVIS as of others."""
    return {
        name: [(said.removesuffix(".n.01"), box) for said, box in boxes]
        for name, boxes in found.items()
    }


@pytest.mark.parametrize("export", EXPORTS)
def test_boxes_are_where_the_tool_showed_them(tmp_path: Path, export: str):
    form, put = EXPORTS[export]
    (tmp_path / "there").mkdir()
    source = put(tmp_path / "there", SCENE)
    summary, records = imported(tmp_path, form, source, answer=answer(form))
    assert plain(things(records)) == seen(SCENE)
    assert (summary.num_images, summary.num_regions, summary.num_records) == (2, 3, 2)
    assert summary.report.num_errors == summary.num_left_out == 0
    assert [record["conversations"][0]["value"] for record in records] == [
        "<image>\nWhat is <bbox0>?", "<image>\nWhat is <bbox0>?",
    ]  # fmt: skip
    assert records[0]["conversations"][2]["value"] == "What is <bbox1>?"
    assert (records[0]["width"], records[0]["height"]) == SCENE[0].size
    manifest = manifest_of(summary)
    assert manifest["apply_exif_orientation"] is True
    assert manifest["record_kind"] == "regions"
    (folder,) = manifest["image_roots"]
    for record in records:
        assert (tmp_path / "data" / folder / record["image"]).is_file()
    report = json.loads((tmp_path / "data/mine/lint.json").read_text())
    assert (report["num_errors"], report["format"]) == (0, form)


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize(
    "export", ["labelme", "via-2", "via-3", "label-studio", "label-studio-min", "yolo"]
)
def test_tools_that_turn_a_picture_first_count_upright_pixels(
    tmp_path: Path, export: str, orientation: int
):
    form, put = EXPORTS[export]
    (tmp_path / "there").mkdir()
    scene = turned(orientation)
    summary, records = imported(tmp_path, form, put(tmp_path / "there", scene))
    assert things(records) == seen(scene)
    assert manifest_of(summary)["apply_exif_orientation"] is True
    assert summary.frame == "upright"
    states_sizes = form in ("labelme", "label-studio") and orientation != 3
    why = "the sizes that the export states" if states_sizes else FORMATS[form].why
    assert summary.why_frame.startswith(why)


@pytest.mark.parametrize("export", EXPORTS)
def test_exports_are_recognised(tmp_path: Path, export: str):
    form, put = EXPORTS[export]
    (tmp_path / "there").mkdir()
    source = put(tmp_path / "there", SCENE)
    assert recognise(source) is FORMATS[form]


def test_records_are_not_taken_for_exports(tmp_path: Path):
    texts = ['"data" "annotations" "result"', '{"images": "file_name"}']
    records = [{"id": text, "conversations": [{"from": "human", "value": text}]} for text in texts]
    assert recognise(put_json(tmp_path / "records.json", records)) is None
    assert recognise(tmp_path / "nowhere") is None
    assert recognise(tmp_path) is None


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(ImportingError, match=r"format labelmee: unknown \(did you mean labelme\?"):
        find_format("labelmee")
    with pytest.raises(ImportingError, match="known: coco, labelme, via, label-studio, yolo, lvis"):
        find_format("voc")
