"""One published record and its files: found, checked, completed."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.toy_data import encode_picture, lying_sample, make_manifest, said
from vipllava.ingest.building.annotations import Annotation
from vipllava.ingest.building.incoming import (
    Ingested,
    ingest,
    input_names,
    input_paths,
    input_states,
    make_key,
)
from vipllava.shards.manifest import Manifest
from vipllava.types import RecordError

ROOTS = ("coco/train2017", "LLaVA-Pretrain/images")


def manifest_of(**changes: Any) -> Manifest:
    return make_manifest(annotation_file="list.json", image_roots=list(ROOTS), **changes)


def put(root: Path, name: str, data: bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def take(record: Any, root: Path, position: int = 7, **changes: Any) -> Ingested:
    text = json.dumps(record).encode()
    item = Annotation(position, 0, text, record)
    return ingest(item, manifest_of(**changes), root, Counter())


def image_level(name: str) -> dict[str, Any]:
    return {"id": "000000033471", "image": name, "conversations": said("<image>\nWhat?", "A cat.")}


# Keys.


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"id": "000000033471"}, "000000033471-12"),
        ({"id": 5}, "5-12"),
        ({"id": "refcocog-gpt4v-3"}, "refcocog-gpt4v-3-12"),
        ({"id": "a.b/c d\u00e9"}, "a_b_c_d-12"),
        ({"id": "x" * 200}, "x" * 64 + "-12"),
        ({"id": "..."}, "record-12"),
        ({"id": ["a"]}, "record-12"),
        ({}, "record-12"),
        (None, "record-12"),
    ],
)
def test_keys_are_safe_and_bear_the_position(record: Any, key: str):
    assert make_key(record, 12) == key


# Where files are.


def test_a_picture_is_named_with_its_root_or_within_one(tmp_path: Path):
    places = input_paths("coco/train2017/1.jpg", tmp_path, ROOTS)
    assert places[0] == tmp_path / "coco/train2017/1.jpg"
    places = input_paths("00453/1.jpg", tmp_path, ROOTS)
    assert places == [
        tmp_path / "coco/train2017/00453/1.jpg",
        tmp_path / "LLaVA-Pretrain/images/00453/1.jpg",
        tmp_path / "00453/1.jpg",
    ]
    assert input_paths("a.jpg", tmp_path, ()) == [tmp_path / "a.jpg"]


@pytest.mark.parametrize("name", ["", "/etc/x.jpg", "../x.jpg", "coco/../../x.jpg", "a\0b"])
def test_a_picture_outside_the_data_root_is_refused(tmp_path: Path, name: str):
    with pytest.raises(RecordError, match="expected a path inside the data root"):
        input_paths(name, tmp_path, ROOTS)
    with pytest.raises(RecordError, match="toy/000000033471-7: field `image`"):
        take(image_level(name), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 300 + ".jpg", "^.{0,150}, 304 letters; expected a path .* base64 text, decode it"),
        ("é" * 200, "200 letters; expected a path"),
        ("a/" * 2000 + "b.jpg", "4005 letters"),
        ("/9j/" + "4AAQ" * 50_000, "200004 letters; .* base64"),
        ("iVBORw0KGgo" + "A/b" * 9, "base64"),
        ("data:image/png;base64,AAAA", "base64"),
        ("\ud83d.jpg", r"'\\ud83d\.jpg', with half of a character"),
    ],
)
def test_what_cannot_be_the_name_of_a_file(tmp_path: Path, name: str, message: str):
    with pytest.raises(RecordError, match=message) as caught:
        input_paths(name, tmp_path, ROOTS)
    assert len(str(caught.value)) < 400
    assert input_names({"image": name}, tmp_path, ROOTS) == []
    with pytest.raises(RecordError, match="toy/000000033471-7: field `image`"):
        take(image_level(name), tmp_path)


@pytest.mark.parametrize(
    "name", ["./dataset/vcr1images/m/1.json", "dataset/vcr1images/m/1.json", "vcr1images/m/1.json"]
)
def test_metadata_is_named_from_dataset(tmp_path: Path, name: str):
    places = input_paths(name, tmp_path, ("vcr1images",), "meta_dir")
    assert places[0] == tmp_path / "vcr1images/m/1.json"


def test_metadata_outside_is_refused(tmp_path: Path):
    with pytest.raises(RecordError, match=r"`meta_dir` is './dataset/\.\./x'"):
        input_paths("./dataset/../x", tmp_path, (), "meta_dir")


# Pictures.


def test_a_good_record_is_kept_as_it_is(tmp_path: Path):
    jpeg = encode_picture()
    put(tmp_path, "coco/train2017/1.jpg", jpeg)
    record = image_level("coco/train2017/1.jpg")
    before = json.dumps(record)
    made = take(record, tmp_path)
    assert made.key == "000000033471-7"
    assert made.record == {**record, "schema_version": 1}
    assert (made.image, made.extension, made.change) == (jpeg, "jpg", None)
    assert made.kind == "image_level"
    assert json.dumps(record) == before


def test_null_means_no_picture(tmp_path: Path):
    made = take({"id": "t", "image": None, "conversations": said("Hi", "Hello")}, tmp_path)
    assert (made.image, made.kind) == (None, "text_only")


def test_text_only(tmp_path: Path):
    made = take({"id": "t", "conversations": said("Hi", "Hello")}, tmp_path)
    assert (made.image, made.extension, made.kind) == (None, None, "text_only")


@pytest.mark.parametrize(
    ("name", "fmt", "extension", "change"),
    [
        ("1.jpeg", "JPEG", "jpg", None),
        ("1.JPG", "JPEG", "jpg", None),
        ("1.jpg", "PNG", "png", "jpg is png"),
        ("1.png", "JPEG", "jpg", "png is jpg"),
        ("1.jpg", "WEBP", "webp", "jpg is webp"),
        ("1", "PNG", "png", "no extension is png"),
        ("1.jpg", "GIF", "png", "gif stored as png"),
        ("1.gif", "GIF", "png", "gif stored as png"),
        ("1.bmp", "BMP", "png", "bmp stored as png"),
    ],
)
def test_the_content_names_the_extension(
    tmp_path: Path, name: str, fmt: str, extension: str, change: str | None
):
    data = encode_picture(fmt=fmt)
    put(tmp_path, f"coco/train2017/{name}", data)
    made = take(image_level(f"coco/train2017/{name}"), tmp_path)
    assert (made.extension, made.change) == (extension, change)
    assert made.image is not None
    assert (made.image == data) == (fmt not in ("GIF", "BMP"))
    with Image.open(io.BytesIO(made.image)) as stored:
        assert stored.size == (64, 48)
        assert stored.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]


@pytest.mark.parametrize("upright", [True, False])
def test_boxes_are_looked_at_in_the_frame_of_the_manifest(tmp_path: Path, upright: bool):
    (_, record, image, _), _ = lying_sample(upright)
    assert image is not None
    put(tmp_path, "coco/train2017/1.jpg", image)
    record["image"] = "coco/train2017/1.jpg"
    assert take(record, tmp_path, apply_exif_orientation=upright).image == image
    with pytest.raises(RecordError, match="expected a box inside the"):
        take(record, tmp_path, apply_exif_orientation=not upright)


def test_a_missing_picture(tmp_path: Path):
    with pytest.raises(
        RecordError,
        match=r"toy/0+33471-7: image 1\.jpg is missing: looked for coco/train2017/1\.jpg, "
        r"LLaVA-Pretrain/images/1\.jpg, 1\.jpg under",
    ) as caught:
        take(image_level("1.jpg"), tmp_path)
    assert caught.value.fault == "image-missing"


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", encode_picture()[:-200]])
def test_a_broken_picture(tmp_path: Path, data: bytes):
    put(tmp_path, "coco/train2017/1.jpg", data)
    with pytest.raises(RecordError, match="toy/000000033471-7") as caught:
        take(image_level("coco/train2017/1.jpg"), tmp_path)
    assert caught.value.fault == "image-corrupt"


def test_a_folder_in_the_place_of_a_picture(tmp_path: Path):
    (tmp_path / "coco/train2017/1.jpg").mkdir(parents=True)
    with pytest.raises(RecordError, match=r"image .* cannot be read: .*directory"):
        take(image_level("coco/train2017/1.jpg"), tmp_path)


def test_states_change_when_a_file_is_mended(tmp_path: Path):
    record = {"image": "1.jpg", "meta_dir": "./dataset/m.json"}
    names = input_names(record, tmp_path, ("a",))
    assert names == ["a/1.jpg", "1.jpg", "a/m.json", "m.json"]
    before = input_states(names, tmp_path)
    assert set(before.values()) == {None}
    put(tmp_path, "a/1.jpg", b"123")
    after = input_states(names, tmp_path)
    state = after.pop("a/1.jpg")
    assert state is not None
    assert state[0] == 3
    assert set(after.values()) == {None}
    assert input_names(None, tmp_path, ()) == []
    assert input_names({"image": 3, "meta_dir": "/x"}, tmp_path, ()) == []


# VCR's metadata.


def vcr_record(**changes: Any) -> dict[str, Any]:
    choices = [["it", "is", [0], "."]] * 4
    return {
        "id": "vcr-1",
        "image": "vcr1images/m/1.jpg",
        "meta_dir": "./dataset/vcr1images/m/1.json",
        "class_names": ["person"],
        "question": ["who", "is", [0], "?"],
        "answer_choices": choices,
        "answer_label": 1,
        "rationale_choices": choices,
        "rationale_label": 2,
        **changes,
    }


META = {"boxes": [[2, 3, 30, 40, 0.9]], "segms": [[[[2, 3], [30, 3], [30, 40], [2, 40]]]]}


def test_vcr_metadata_goes_inside(tmp_path: Path):
    put(tmp_path, "vcr1images/m/1.jpg", encode_picture())
    put(tmp_path, "vcr1images/m/1.json", json.dumps(META).encode())
    made = take(vcr_record(), tmp_path)
    assert made.kind == "vcr"
    assert made.record["meta"] == META
    inside = take(vcr_record(meta=META, meta_dir="gone.json"), tmp_path)
    assert inside.record["meta"] == META


@pytest.mark.parametrize(
    ("meta", "fault", "message"),
    [
        (None, "meta-missing", r"metadata \./dataset/vcr1images/m/1\.json is missing: looked for"),
        (b"{", "meta-corrupt", "cannot be used"),
        (b"[]", "meta-corrupt", "holds list; expected an object"),
        (b"{}", "record-invalid", "`boxes` of the clip is missing"),
    ],
)
def test_vcr_without_its_metadata(tmp_path: Path, meta: bytes | None, fault: str, message: str):
    put(tmp_path, "vcr1images/m/1.jpg", encode_picture())
    if meta is not None:
        put(tmp_path, "vcr1images/m/1.json", meta)
    with pytest.raises(RecordError, match=rf"toy/vcr-1-7.*{message}") as caught:
        take(vcr_record(), tmp_path)
    assert caught.value.fault == fault


# Records.


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "x", "image": ["a.jpg"], "conversations": []}, "field `image` is"),
        ({"id": "x", "conversations": []}, "field `conversations`"),
        ({"id": "x", "n": float("nan"), "conversations": said("a", "b")}, "cannot be stored"),
        ({"id": "x", "n": "\ud800", "conversations": said("a", "b")}, "cannot be stored"),
        ({"id": "x", "schema_version": 9}, "schema_version"),
        ({"id": "x", "meta_dir": 3, "conversations": said("a", "b")}, "field `meta_dir` is 3"),
    ],
)
def test_records_that_cannot_be_used(tmp_path: Path, record: Any, message: str):
    with pytest.raises(RecordError, match=rf"toy/x-7.*{message}"):
        take(record, tmp_path)


def test_an_item_that_is_no_record(tmp_path: Path):
    item = Annotation(3, 0, b"1", None, "is int; a record is a JSON object")
    with pytest.raises(RecordError, match="toy/record-3: item 3 of the list is int"):
        ingest(item, manifest_of(), tmp_path, Counter())


def test_a_region_outside_its_picture_is_found(tmp_path: Path):
    put(tmp_path, "coco/train2017/1.jpg", encode_picture())
    record = {**image_level("coco/train2017/1.jpg"), "bboxes": [[100, 100, 120, 120]]}
    with pytest.raises(RecordError, match="inside the 64 x 48 image") as caught:
        take(record, tmp_path)
    assert caught.value.fault == "box-outside"
