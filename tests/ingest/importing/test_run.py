"""What an import writes and where: all or nothing, in the data root or beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.ingest.importing.exports import KITCHEN, SCENE, coco, put_json, put_pictures
from tests.ingest.importing.importing import imported, manifest_of, refused
from vipllava.ingest.importing.pictures import likely_names
from vipllava.ingest.importing.run import import_annotations
from vipllava.ingest.importing.source import ImportingError
from vipllava.shards.manifest import load_manifest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    put_pictures(tmp_path / "there")
    return put_json(tmp_path / "there" / "instances.json", coco())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pictures_out_of_the_data_root_are_linked(tmp_path: Path, source: Path):
    summary, records = imported(tmp_path, "coco", source, name="marks")
    output = tmp_path / "data" / "mine"
    assert names(output) == ["images", "lint.json", "marks.yaml", "records.jsonl"]
    assert (output / "images").readlink() == tmp_path / "there"
    assert records[0]["image"] == "kitchen.jpg"
    manifest = load_manifest(summary.manifest, tmp_path)
    assert manifest.image_roots == ("mine/images",)
    assert manifest.annotation_file == "mine/records.jsonl"
    assert manifest.shards == ("mine/shards/*.tar",)
    assert manifest.name == summary.dataset == "marks"


def test_pictures_in_the_data_root_stay_there(tmp_path: Path):
    put_pictures(tmp_path / "data" / "photos" / "a", (KITCHEN,))
    put_pictures(tmp_path / "data" / "photos" / "b", SCENE[1:])
    given = coco()
    for image, folder in zip(given["images"], "ab", strict=True):
        image["file_name"] = f"{folder}/{image['file_name']}"
    source = put_json(tmp_path / "instances.json", given)
    summary, records = imported(tmp_path, "coco", source, images=tmp_path / "data" / "photos")
    assert manifest_of(summary)["image_roots"] == ["photos"]
    assert [record["image"] for record in records] == ["a/kitchen.jpg", "b/street.png"]
    assert "images" not in names(tmp_path / "data" / "mine")


def test_an_output_out_of_the_data_root_makes_its_parent_one(tmp_path: Path, source: Path):
    summary = import_annotations("coco", source, tmp_path / "out", data_root=tmp_path / "data")
    assert summary.data_root == tmp_path
    assert manifest_of(summary)["annotation_file"] == "out/records.jsonl"


def test_relative_paths_are_those_of_the_folder(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    summary = import_annotations(
        "coco", Path("there/instances.json"), Path("data/../data/mine"), data_root=Path("data")
    )
    assert summary.manifest == tmp_path / "data" / "mine" / "mine.yaml"
    assert (tmp_path / "data" / "mine" / "images" / "kitchen.jpg").is_file()


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("there", {}, "there is there already; remove it, or pass another"),
        ("data", {}, "is the data root itself; pass a folder in it"),
        ("data/a*", {}, "has one of * ? [ { in its path"),
        ("data/mine", {"name": "a/b"}, "name=a/b; expected letters, digits"),
        ("data/mine", {"max_regions": 10}, "max_regions=10; expected 1 to 9"),
        ("data/mine", {"max_bad_rate": 2.0}, "max_bad_rate=2.0; a rate lies in 0..1"),
    ],
)
def test_arguments_that_mean_nothing(
    tmp_path: Path, source: Path, output: str, more: dict[str, Any], message: str
):
    with pytest.raises(ImportingError) as caught:
        import_annotations("coco", source, tmp_path / output, data_root=tmp_path / "data", **more)
    assert message in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"split": "val"}, "split=val means nothing for COCO; it is for yolo"),
        ({"category": "kind"}, "category=kind means nothing for COCO; it is for via"),
        ({"images": Path("/nowhere")}, "images=/nowhere is no folder"),
    ],
)
def test_options_of_other_formats(tmp_path: Path, source: Path, more: Any, message: str):
    assert message in refused(tmp_path, "coco", source, **more)


def test_sources_that_are_none(tmp_path: Path, source: Path):
    assert "nowhere.json does not exist" in refused(tmp_path, "coco", tmp_path / "nowhere.json")
    assert "is a folder; expected the COCO file itself" in refused(tmp_path, "coco", source.parent)


def test_a_disk_that_fails_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(path: Path, values: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(f"{import_annotations.__module__}.write_json", fail)
    why = refused(tmp_path, "coco", source)
    assert "cannot be written: [Errno 28] No space left" in why
    assert names(tmp_path / "data") == []


def test_a_stated_share_may_be_left_out_and_is_listed(tmp_path: Path, source: Path):
    given = coco()
    given["annotations"][0]["category_id"] = None
    given["images"][1]["file_name"] = "lost.png"
    put_json(source, given)
    why = refused(tmp_path, "coco", source)
    assert "2 of 3 regions cannot be imported (image-missing 1, category-missing 1)" in why
    assert "Correct them in the export, or pass max_bad_rate (a share, now 0)" in why
    refused(tmp_path, "coco", source, max_bad_rate=0.6)
    summary, (record,) = imported(tmp_path, "coco", source, max_bad_rate=0.7)
    assert record["conversations"][1]["value"] == "fork"
    assert (summary.num_left_out, summary.num_images) == (2, 1)
    report = json.loads((tmp_path / "data" / "mine" / "lint.json").read_text())
    assert report["counts"] == {"image-missing": 1, "category-missing": 1}
    assert report["findings"][1] == {
        "code": "category-missing",
        "severity": "error",
        "place": "instances.json, image 11, annotation 100",
        "message": "it has no category_id",
    }


def test_where_nothing_is_left_no_share_helps(tmp_path: Path, source: Path):
    given = coco()
    given["categories"] = []
    put_json(source, given)
    why = refused(tmp_path, "coco", source, max_bad_rate=1.0)
    assert "no region can be imported:" in why
    assert "annotation 102: its category_id is 1, of which `categories` has no name" in why


def test_a_message_lists_ten_and_counts_the_rest(tmp_path: Path, source: Path):
    given = coco()
    given["annotations"] = [{**given["annotations"][0], "image_id": n, "id": n} for n in range(50)]
    given["annotations"].append({**given["annotations"][0], "image_id": 11})
    put_json(source, given)
    lines = refused(tmp_path, "coco", source).splitlines()
    assert len([line for line in lines if line.startswith("- ")]) == 11
    assert "- and 38 more" in lines


def test_many_regions_of_a_picture_are_several_records(tmp_path: Path, source: Path):
    given = coco()
    given["annotations"] = [{**given["annotations"][0], "id": n} for n in range(5)]
    put_json(source, given)
    _, records = imported(tmp_path, "coco", source, max_regions=2)
    assert [len(record["bboxes"]) for record in records] == [2, 2, 1]
    assert [record["id"] for record in records] == [
        "image 11, part 1", "image 11, part 2", "image 11, part 3",
    ]  # fmt: skip
    assert all(record["conversations"][0]["value"].startswith("<image>\n") for record in records)
    _, records = imported(tmp_path / "b", "coco", source, max_regions=1)
    assert records[4]["id"] == "image 11, annotation 4"


# Finding pictures.


@pytest.mark.parametrize(
    ("name", "names", "is_path"),
    [
        ("a/b.jpg", ["a/b.jpg", "b.jpg"], True),
        ("..\\a\\b.jpg", ["../a/b.jpg", "a/b.jpg", "b.jpg"], True),
        ("/home/me/b.jpg", ["/home/me/b.jpg", "home/me/b.jpg", "me/b.jpg", "b.jpg"], False),
        ("C:\\me\\b.jpg", ["C:/me/b.jpg", "me/b.jpg", "b.jpg"], False),
        ("https://x.org/a/b%20c.jpg?z=1", ["/a/b c.jpg", "a/b c.jpg", "b c.jpg"], False),
        ("s3://bucket/a/b.jpg", ["/a/b.jpg", "a/b.jpg", "b.jpg"], False),
        ("/data/local-files/?d=a/b.jpg", ["a/b.jpg", "b.jpg"], False),
        (
            "/data/upload/3/1a2b3c4d-b.jpg",
            ["/data/upload/3/1a2b3c4d-b.jpg", "data/upload/3/1a2b3c4d-b.jpg",
             "upload/3/1a2b3c4d-b.jpg", "3/1a2b3c4d-b.jpg", "1a2b3c4d-b.jpg", "b.jpg"],
            False,
        ),
    ],
)  # fmt: skip
def test_what_a_name_may_mean(name: str, names: list[str], is_path: bool):
    assert likely_names(name) == (names, is_path)


def test_a_picture_found_by_the_end_of_its_path_is_said(tmp_path: Path, source: Path):
    given = coco()
    given["images"][0]["file_name"] = "train/kitchen.jpg"
    put_json(source, given)
    summary, _ = imported(tmp_path, "coco", source)
    (found,) = summary.report.findings
    assert (found.code, found.place) == ("image-by-name", "instances.json, image 11")


def test_two_names_of_one_file_are_refused(tmp_path: Path, source: Path):
    given = coco()
    given["images"][0]["file_name"] = "train/kitchen.jpg"
    given["images"][1] |= {"file_name": "val/kitchen.jpg", "width": 200, "height": 120}
    put_json(source, given)
    why = refused(tmp_path, "coco", source)
    assert "was found for train/kitchen.jpg and for val/kitchen.jpg, too" in why


def test_a_picture_that_is_none(tmp_path: Path, source: Path):
    (tmp_path / "there" / "kitchen.jpg").write_bytes(b"no picture")
    why = refused(tmp_path, "coco", source)
    assert "2 of 3 regions cannot be imported (image-corrupt 1)" in why
    assert "kitchen.jpg: 10 bytes starting with b'no pictu' are no image" in why


def test_pictures_with_nothing_in_common(tmp_path: Path, source: Path, monkeypatch):
    monkeypatch.setattr(os.path, "commonpath", lambda paths: "/")
    assert "lie in folders that have nothing in common" in refused(tmp_path, "coco", source)
