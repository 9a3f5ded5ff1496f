"""Building shards: what lands in the tars, what is rejected, and what is refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ingest.building.toy_build import (
    NUM,
    build,
    contents,
    toy_manifest,
    toy_records,
    write_list,
)
from tests.toy_data import encode_picture
from vipllava.files.locks import locked
from vipllava.ingest.building import shard_build
from vipllava.ingest.building.annotations import AnnotationError
from vipllava.ingest.building.shard_build import (
    BuildError,
    BuildSummary,
    build_shards,
    manifest_lines,
)
from vipllava.shards.tars import open_shards


def rejected(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What a build makes.


def test_every_record_lands_in_its_shard(data_root: Path):
    summary = build(data_root)
    folder = data_root / "toy"
    assert sorted(contents(folder)) == [
        "build.json",
        "rejected.jsonl",
        *(f"shard-00000{n}.{end}" for n in range(3) for end in ("index.npz", "tar")),
    ]
    assert not (data_root / "toy.building").exists()
    assert (folder / "rejected.jsonl").read_bytes() == b""
    shards = open_shards(toy_manifest(num_samples=NUM), data_root)
    assert list(shards.keys()) == [f"r{n:02d}-{n}" for n in range(NUM)]
    assert [shards.locate(position) for position in (4, 5, 12)] == [(0, 4), (1, 0), (2, 2)]
    for position, record in enumerate(toy_records()):
        entry = shards.read(position)
        assert entry.record == {**record, "schema_version": 1}
        picture = encode_picture(seed=position) if "image" in record else None
        assert entry.image == picture
    assert summary.kinds == {"image_level": 8, "regions": 3, "text_only": 2}
    assert (summary.num_records, summary.num_samples, summary.num_text_only) == (NUM, NUM, 2)
    assert summary.num_bytes == sum(p.stat().st_size for p in folder.glob("*.tar"))
    assert [(s["name"], s["first"], s["num_samples"]) for s in summary.shards] == [
        ("shard-000000", 0, 5), ("shard-000001", 5, 5), ("shard-000002", 10, 3),
    ]  # fmt: skip
    assert BuildSummary.load(folder) == summary


def test_the_number_of_processes_changes_nothing(data_root: Path, tmp_path: Path):
    build(data_root, output=tmp_path / "alone")
    build(data_root, output=tmp_path / "together", num_workers=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_names_follow_the_pattern(data_root: Path):
    build(data_root, toy_manifest(shards="sets/mine/train-*.tar"))
    names = sorted(path.name for path in (data_root / "sets/mine").glob("*.tar"))
    assert names == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]


def test_only_the_data_sets_kinds(data_root: Path):
    summary = build(data_root, toy_manifest(annotation_kinds=["regions"]), max_samples=2)
    shards = open_shards(toy_manifest(), data_root)
    assert list(shards.keys()) == ["r02-2", "r07-7", "r12-12"]
    assert (summary.num_records, summary.num_selected) == (NUM, 3)


def test_pictures_are_named_after_their_content(data_root: Path):
    (data_root / "pictures/0.jpg").write_bytes(encode_picture(fmt="PNG"))
    (data_root / "pictures/1.jpg").write_bytes(encode_picture(fmt="GIF"))
    summary = build(data_root)
    shards = open_shards(toy_manifest(), data_root)
    assert [shards.read(n).image_extension for n in range(3)] == ["png", "png", "jpg"]
    assert summary.changes == {"gif stored as png": 1, "jpg is png": 1}


def test_progress_is_told(data_root: Path):
    told: list[tuple[Any, ...]] = []
    build(data_root, tell=lambda *progress: told.append(progress))
    size = (data_root / "list.json").stat().st_size
    assert told == [
        ("reading the annotation list", "bytes", size, size),
        ("building shards", "records", 5, NUM),
        ("building shards", "records", 10, NUM),
        ("building shards", "records", NUM, NUM),
    ]


@pytest.mark.parametrize(
    ("changes", "output", "lines"),
    [
        ({"num_samples": NUM}, None, []),
        ({}, None, ["num_samples: 13"]),
        ({"num_samples": 14}, "data/toy", ["num_samples: 13"]),
        ({"num_samples": NUM}, "data/sets/x", ["shards: sets/x/shard-*.tar"]),
        ({"num_samples": NUM, "shards": "a/x-{0..9}.tar"}, "data/a", ["shards: a/shard-*.tar"]),
        ({"num_samples": NUM, "shards": "toy/t-*.tar"}, "data/toy", ["shards: toy/shard-*.tar"]),
    ],
)
def test_what_the_manifest_has_to_say(
    data_root: Path, changes: dict[str, Any], output: str | None, lines: list[str]
):
    manifest = toy_manifest(**changes)
    where = None if output is None else data_root.parent / output
    summary = build(data_root, manifest, output=where)
    assert manifest_lines(manifest, data_root, summary, where) == lines
    new = {**changes, **yaml.safe_load("\n".join(lines) or "{}")}
    assert len(open_shards(toy_manifest(**new), data_root)) == NUM


def test_tars_beside_the_data_root(data_root: Path, tmp_path: Path):
    summary = build(data_root, output=tmp_path / "fast" / "toys")
    lines = manifest_lines(toy_manifest(), data_root, summary, tmp_path / "fast" / "toys")
    assert lines == [
        f"shards: toys/shard-*.tar # with data_root={tmp_path}/fast", "num_samples: 13",
    ]  # fmt: skip
    new = yaml.safe_load("\n".join(lines))
    assert len(open_shards(toy_manifest(**new), tmp_path / "fast")) == NUM


def test_what_to_look_at_is_told_once(data_root: Path):
    records = toy_records()
    for record in records[:4]:
        record |= {"boxes": [[1, 2, 3, 4]], "note": record["id"]}
    records[2]["segmentation"] = []
    write_list(data_root, records)
    (data_root / "more").mkdir()
    manifest = toy_manifest(image_roots=["pictures", "more"])
    boxes, masks = (f"`{name}` is probably meant" for name in ("bboxes", "segmentations"))
    talks = "it reads conversations"
    regions = "it reads bboxes, segmentations, visual_prompts, conversations"
    expected = [
        f"field `boxes` is not read by record kind `image_level`: {boxes} (records with it: 3)",
        f"field `note` is not read by record kind `image_level`: {talks} (records with it: 3)",
        f"field `boxes` is not read by record kind `regions`: {boxes} (records with it: 1)",
        f"field `note` is not read by record kind `regions`: {regions} (records with it: 1)",
        f"field `segmentation` is not read by record kind `regions`: {masks} (records with it: 1)",
        "image root more: no record has an image in it",
    ]
    for _ in range(2):  # a finished build says it again
        assert build(data_root, manifest).remarks == expected


def test_boxes_in_another_form_are_told(data_root: Path):
    records = toy_records()
    coco = ([30, 20, 9, 8], [9, 9, 9, 9], [50, 40, 10, 8])
    for record, box in zip(records[2::5], coco, strict=True):
        record["bboxes"] = [box]
    write_list(data_root, records)
    with pytest.raises(BuildError, match=r"\(box-reversed 1\).* records\. Such as: toy/r02-2: "):
        build(data_root)
    assert "they look like COCO's boxes" in build(data_root, max_bad_rate=1).remarks[0]


# Rejected records.


def test_above_the_rate_the_build_fails_and_lists_everything(data_root: Path):
    (data_root / "pictures/1.jpg").unlink()
    (data_root / "pictures/7.jpg").write_bytes(b"<html>")
    message = (
        r"`toy`: 2 of 13 records read cannot be used \(image-(missing|corrupt) 1, "
        r"image-(missing|corrupt) 1\), more than max_bad_rate=0.1 of 13 allows. "
        r"They are listed in .*toy\.building/rejected\.jsonl"
    )
    with pytest.raises(BuildError, match=message):
        build(data_root, max_bad_rate=0.1, max_samples=13)
    assert not (data_root / "toy").exists()
    rows = rejected(data_root / "toy.building/rejected.jsonl")
    assert [(row["position"], row["key"], row["image"], row["fault"]) for row in rows] == [
        (1, "r01-1", "pictures/1.jpg", "image-missing"),
        (7, "r07-7", "pictures/7.jpg", "image-corrupt"),
    ]
    assert "toy/r01-1: image pictures/1.jpg is missing" in rows[0]["reason"]
    assert set(rows[0]) == {"position", "key", "image", "fault", "reason"}


def test_told_otherwise_the_build_goes_on(data_root: Path):
    (data_root / "pictures/1.jpg").unlink()
    with pytest.raises(BuildError, match="1 of 5 records read"):
        build(data_root)
    summary = build(data_root, max_bad_rate=1)
    assert (summary.num_samples, summary.num_rejected) == (12, 1)
    assert summary.rejected_by_fault == {"image-missing": 1}
    assert "r01-1" not in list(open_shards(toy_manifest(), data_root).keys())
    assert [row["key"] for row in rejected(data_root / "toy/rejected.jsonl")] == ["r01-1"]


def test_it_fails_as_soon_as_it_is_certain(data_root: Path, monkeypatch: pytest.MonkeyPatch):
    (data_root / "pictures/1.jpg").unlink()
    made: list[str] = []
    original = shard_build.build_shard

    def counting(job: shard_build.ShardJob) -> Any:
        made.append(job.name)
        return original(job)

    monkeypatch.setattr(shard_build, "build_shard", counting)
    with pytest.raises(BuildError):
        build(data_root)
    assert made == ["shard-000000"]


def test_a_stretch_without_a_good_record_makes_no_tar(data_root: Path):
    for number in range(5, 10):
        (data_root / f"pictures/{number}.jpg").unlink()
    records: list[Any] = toy_records()
    records[9] = "no record"
    write_list(data_root, records)
    summary = build(data_root, max_bad_rate=1)
    assert sorted(p.name for p in (data_root / "toy").glob("*.tar")) == [
        "shard-000000.tar", "shard-000002.tar",
    ]  # fmt: skip
    assert (summary.num_samples, summary.num_rejected) == (8, 5)
    assert summary.rejected_by_fault == {"image-missing": 4, "record-invalid": 1}
    assert len(open_shards(toy_manifest(), data_root)) == 8


def test_nothing_is_left(data_root: Path):
    for path in (data_root / "pictures").iterdir():
        path.unlink()
    write_list(data_root, [record for record in toy_records() if "image" in record])
    with pytest.raises(BuildError, match=r"11 of 11 .* \(image-missing 11\), no sample is left"):
        build(data_root, max_bad_rate=1)
    assert not (data_root / "toy").exists()


# What can be wrong around it.


def test_two_builds_on_one_output(data_root: Path):
    work = data_root / "toy.building"
    work.mkdir()
    refused = pytest.raises(BuildError, match=r"another build is at work in .*toy\.building")
    with locked(work / ".lock"), refused:
        build(data_root)
    assert build(data_root).num_samples == NUM


def test_a_full_disk(data_root: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: Any, **options: Any) -> Any:
        next(iter(arguments[0]))
        (arguments[1] / "shard-000000.tar").write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_build, "write_shards", full)
        with pytest.raises(BuildError, match=r"no space left for .*toy\.building .*finished tars"):
            build(data_root)
    assert sorted(contents_of_work(data_root)) == [".lock", "rejected.jsonl"]
    assert build(data_root).num_samples == NUM


def contents_of_work(root: Path) -> list[str]:
    return [path.name for path in (root / "toy.building").iterdir() if path.is_file()]


def test_an_output_that_is_something_else(data_root: Path):
    (data_root / "toy").mkdir()
    build(data_root, max_samples=100, output=data_root / "toy")  # an empty folder is taken
    (data_root / "other").mkdir()
    (data_root / "other/x.tar").write_bytes(b"")
    with pytest.raises(BuildError, match="other holds files that no build made"):
        build(data_root, output=data_root / "other")
    with pytest.raises(BuildError, match=r"list\.json is no folder"):
        build(data_root, output=data_root / "list.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": ["a/*.tar", "b/*.tar"]}, r"has shards a/\*\.tar, b/\*\.tar; a build needs one"),
        ({"shards": "a/x-{000..009}.tar"}, "pass output=FOLDER"),
        ({"shards": "*.tar"}, "pass output=FOLDER"),
        ({"shards": "*/x.tar"}, "pass output=FOLDER"),
        ({"shards": "https://example.org/{0..9}.tar"}, "pass output=FOLDER"),
        ({"annotation_file": None}, "`toy` has no annotation_file"),
    ],
)
def test_manifests_that_cannot_be_built(data_root: Path, changes: dict[str, Any], message: str):
    with pytest.raises(BuildError, match=message):
        build(data_root, toy_manifest(**changes))


def test_values_that_make_no_sense(data_root: Path):
    for options, message in (
        ({"max_bad_rate": 2}, "max_bad_rate is 2"),
        ({"max_samples": 0}, "max_samples is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
    ):
        with pytest.raises(Exception, match=message):
            build(data_root, **options)
    with pytest.raises(BuildError, match="built in a local folder"):
        build_shards(toy_manifest(), "s3://bucket/data")


def test_a_damaged_list_builds_nothing(data_root: Path):
    text = (data_root / "list.json").read_text()
    (data_root / "list.json").write_text(text[: len(text) // 2])
    with pytest.raises(AnnotationError, match=r"list\.json: record 6"):
        build(data_root)
    assert not (data_root / "toy.building").exists()


def test_a_list_that_changes_meanwhile(data_root: Path, monkeypatch: pytest.MonkeyPatch):
    original = shard_build.build_shard

    def changing(job: shard_build.ShardJob) -> Any:
        text = (data_root / "list.json").read_text()
        (data_root / "list.json").write_text(text.replace("r00", "x00"))
        return original(job)

    monkeypatch.setattr(shard_build, "build_shard", changing)
    with pytest.raises(AnnotationError, match="was changed while it was being read"):
        build(data_root)
    assert not (data_root / "toy").exists()


def test_what_is_rejected_is_listed_in_short(data_root: Path):
    records = toy_records()
    records[1]["image"] = "/9j/" + "4AAQ" * 500_000
    records[2]["image"] = ["x" * 2_000_000]
    records[3]["bboxes"] = "y" * 2_000_000
    records[4] |= {"z" * 2_000_000: 1, "conversations": None}
    records[5]["image"] = "\ud83d.jpg"
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    records[6]["more"] = deep
    write_list(data_root, records)
    build(data_root, max_bad_rate=1)
    listed = rejected(data_root / "toy" / "rejected.jsonl")
    assert [row["position"] for row in listed] == [1, 2, 3, 4, 5, 6]
    assert "base64" in listed[0]["reason"]
    assert "half of a character" in listed[4]["reason"]
    assert "more than 64 levels" in listed[5]["reason"]
    assert (data_root / "toy" / "rejected.jsonl").stat().st_size < 10_000
