"""YOLO: layouts, splits, polygons, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ingest.importing.exports import KITCHEN, SCENE, put_pictures, put_yolo
from tests.ingest.importing.importing import imported, refused, seen, things
from vipllava.ingest.importing.yolo import labels_of


def with_line(root: Path, line: str) -> Path:
    """Put a data set of one picture, 200 x 120, and one line."""
    path = put_yolo(root / "there", (KITCHEN,))
    (root / "there" / "labels" / "train" / "kitchen.txt").write_text(line)
    return path


def test_polygons_of_any_count_and_turned_boxes(tmp_path: Path):
    line = "0 0.1 0.5 0.3 0.5 0.2 0.75\n\n1.0 0.5 0.5 0.6 0.5 0.6 0.6 0.5 0.6\n"
    _, (record,) = imported(tmp_path, "yolo", with_line(tmp_path, line))
    assert record["bboxes"] == [[20, 60, 60, 90], [100, 60, 120, 72]]
    assert record["segmentations"] == [
        [[20, 60, 60, 60, 40, 90]], [[100, 60, 120, 60, 120, 72, 100, 72]],
    ]  # fmt: skip
    assert [record["conversations"][n]["value"] for n in (1, 3)] == ["cup", "fork"]


def test_key_points_behind_a_box(tmp_path: Path):
    source = with_line(tmp_path, "0 0.5 0.5 0.2 0.5 0.45 0.5 2 0.55 0.5 2")
    source.write_text(source.read_text() + "kpt_shape: [2, 3]\n")
    _, (record,) = imported(tmp_path, "yolo", source)
    assert record["bboxes"] == [[80, 30, 120, 90]]
    assert "segmentations" not in record


def test_parts_of_a_data_set(tmp_path: Path):
    source = put_yolo(tmp_path / "there")
    put_pictures(tmp_path / "there" / "images" / "val", (KITCHEN,))
    labels = tmp_path / "there" / "labels"
    (labels / "val").mkdir()
    (labels / "val" / "kitchen.txt").write_text("1 0.5 0.5 0.2 0.5")
    source.write_text(source.read_text().replace("val:", "val: images/val"))
    summary, records = imported(tmp_path, "yolo", source)
    assert summary.facts["split"] == "train (left out: val)"
    assert things(records) == seen(SCENE)
    _, (record,) = imported(tmp_path / "b", "yolo", source, split="val")
    assert record["bboxes"] == [[80, 30, 120, 90]]
    summary, records = imported(tmp_path / "c", "yolo", source, split="all")
    assert (summary.num_images, summary.facts["split"]) == (3, "train, val")
    assert [record["image"] for record in records] == [
        "train/kitchen.jpg", "train/street.png", "val/kitchen.jpg",
    ]  # fmt: skip
    why = refused(tmp_path / "d", "yolo", source, split="test")
    assert "has train, val, and `all` for all" in why


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ("../images/train", "[cup, fork]"),  # as Roboflow writes it, beside the folder
        ("[images/train]", "{0: cup, 1: fork}"),
        ("train.txt", "[cup, fork]"),
    ],
)
def test_how_pictures_are_named(tmp_path: Path, train: str, names: str):
    root = tmp_path / "there"
    put_yolo(root)
    (root / "train.txt").write_text("./images/train/kitchen.jpg\nimages/train/street.png\n\n")
    (root / "data.yaml").write_text(f"train: {train}\nnc: 2\nnames: {names}\n")
    _, records = imported(tmp_path, "yolo", root)  # the folder, too, is one
    assert things(records) == seen(SCENE)


def test_a_folder_with_classes_as_other_tools_export_it(tmp_path: Path):
    root = tmp_path / "there"
    put_yolo(root).unlink()
    (root / "classes.txt").write_text("cup\nfork\n")
    _, records = imported(tmp_path, "yolo", root)
    assert things(records) == seen(SCENE)


def test_where_labels_are():
    assert labels_of(Path("images/a/images/b.c.jpg")) == Path("images/a/labels/b.c.txt")
    assert labels_of(Path("photos/b.jpg")) == Path("photos/b.txt")


def test_a_picture_without_labels_has_no_region(tmp_path: Path):
    source = put_yolo(tmp_path / "there")
    (tmp_path / "there" / "labels" / "train" / "street.txt").unlink()
    summary, _ = imported(tmp_path, "yolo", source)
    assert (summary.num_images, summary.num_empty) == (1, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 150 20 40 50", "it has 150; coordinates are fractions, 0 to 1: these look like pixels"),
        ("0 0.5 0.5 1.5 0.5", "it has 1.5; coordinates are fractions, 0 to 1"),
        ("7 0.5 0.5 0.2 0.5", "its class is '7'; there are 2 names"),
        ("cup 0.5 0.5 0.2 0.5", "its class is 'cup'; there are 2 names"),
        ("0 0.5 0.5 0.2 0.5 0.9", "it has 5 numbers behind the class; expected x y width height, "),
        ("0 0.5 x 0.2 0.5", "it has something that is no number"),
        ("0 0.5 0.5 0 0.5", "a box with an area: this one is empty"),
        ("0 nan 0.5 0.2 0.5", "it has nan; coordinates are fractions"),
    ],
)
def test_what_is_refused_has_file_and_line(tmp_path: Path, line: str, message: str):
    why = refused(tmp_path, "yolo", with_line(tmp_path, f"1 0.5 0.5 0.2 0.5\n{line}\n"))
    assert "- labels/train/kitchen.txt, picture kitchen.jpg, line 2: " in why
    assert message in why


def test_data_sets_that_are_none(tmp_path: Path):
    source = put_yolo(tmp_path / "there")
    text = source.read_text()
    for changed, message in (
        (text.replace("images/train", "images/nowhere"), "which does not exist"),
        ("train: images/train\n", "names is None; expected the classes"),
        ("names: [cup]\n", "has none of train, val, test"),
        ("names: [\n", "is not YAML"),
    ):
        source.write_text(changed)
        assert message in refused(tmp_path, "yolo", source)
    source.unlink()
    assert "has neither data.yaml nor classes.txt" in refused(tmp_path, "yolo", source.parent)
