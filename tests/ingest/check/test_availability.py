from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.toy_data import encode_picture, said, toy_samples
from vipllava.ingest.check.availability import Availability, Finding, check_data
from vipllava.shards.manifest import Manifest, parse_manifest
from vipllava.shards.tars import write_shards
from vipllava.types import ConfigError


def make_manifest(**changes: Any) -> Manifest:
    raw = {
        "schema_version": 2,
        "name": "toy",
        "stage": "finetune",
        "licence": "none",
        "shards": "toy/*.tar",
        "annotation_file": "toy.json",
        "image_roots": ["coco/train2017", "vg"],
        "sources": [{"name": "COCO", "what": "images"}],
        **changes,
    }
    return parse_manifest(raw, where="test")


def write_data(root: Path, count: int = 20) -> list[dict[str, Any]]:
    """Records over two image roots, one in five text only, all pictures present."""
    records: list[dict[str, Any]] = []
    for number in range(count):
        record: dict[str, Any] = {"id": f"r{number}", "conversations": said("Hi", "yes")}
        if number % 5:
            record["image"] = f"{('coco/train2017', 'vg')[number % 2]}/{number}.jpg"
            path = root / record["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_picture(16, 12, seed=number))
        records.append(record)
    (root / "toy.json").write_text(json.dumps(records))
    return records


def statuses(found: Availability) -> dict[str, str]:
    return {f"{finding.part} {finding.name}": finding.status for finding in found.findings}


def one(found: Availability, part: str, name: str | None = None) -> Finding:
    return next(f for f in found.findings if f.part == part and name in (None, f.name))


def test_everything_is_there(tmp_path: Path) -> None:
    write_data(tmp_path)
    write_shards(toy_samples(10), tmp_path / "toy", max_samples=4)
    found = check_data(make_manifest(num_samples=10), tmp_path)
    assert found.ok
    assert found.findings == (
        Finding("annotations", "toy.json", "ok", "20 records (16 image_level, 4 text_only)"),
        Finding("images", "coco/train2017", "ok", "8 of 8 files looked at are whole"),
        Finding("images", "vg", "ok", "8 of 8 files looked at are whole"),
        Finding("shards", "toy/*.tar", "ok", "10 samples in 3 tars"),
    )


def test_an_image_root_that_no_record_uses(tmp_path: Path) -> None:
    records = write_data(tmp_path)
    for record in records:
        if "image" in record:
            record["image_path"] = record.pop("image")
    (tmp_path / "toy.json").write_text(json.dumps(records))
    found = check_data(make_manifest(), tmp_path, parts=["annotations", "images"])
    assert statuses(found)["images vg"] == "unused"
    assert found.ok
    assert one(found, "images").remedy.startswith("see that the records name their files")
    write_data(tmp_path)
    found = check_data(make_manifest(), tmp_path, parts=["images"], num_images=0)
    assert statuses(found)["images vg"] == "ok"  # nobody looked


def test_nothing_is_there(tmp_path: Path) -> None:
    found = check_data(make_manifest(), tmp_path)
    assert not found.ok
    assert set(statuses(found).values()) == {"missing"}
    assert one(found, "annotations").detail == "no such file"
    assert one(found, "annotations").remedy == "vipllava data fetch toy"
    assert one(found, "images").detail == "no such folder"
    assert one(found, "shards").remedy == "vipllava shards build toy"
    nowhere = check_data(make_manifest(), tmp_path / "nowhere")
    assert statuses(nowhere) == {f"data root {tmp_path / 'nowhere'}": "missing"}


def test_missing_and_unreadable_pictures_are_counted_and_named(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "coco/train2017/2.jpg").unlink()
    (tmp_path / "vg/3.jpg").write_bytes(b"<html>")
    whole = (tmp_path / "vg/7.jpg").read_bytes()
    (tmp_path / "vg/7.jpg").write_bytes(whole[: len(whole) // 2])
    found = check_data(make_manifest(), tmp_path, num_images=None, parts=["images"])
    coco = one(found, "images", "coco/train2017")
    assert (coco.status, coco.detail) == (
        "missing",
        "7 of 8 files looked at are whole, 1 missing",
    )
    assert coco.examples == ("coco/train2017/2.jpg: missing",)
    assert coco.remedy == "vipllava data fetch toy"
    vg = one(found, "images", "vg")
    assert (vg.status, vg.detail) == (
        "damaged",
        "6 of 8 files looked at are whole, 2 unreadable",
    )
    assert "vg/3.jpg" in vg.examples[0]
    assert "are no image" in vg.examples[0]
    assert "vg/7.jpg" in vg.examples[1]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_a_sample_of_pictures_is_the_same_each_time(tmp_path: Path, num_workers: int) -> None:
    write_data(tmp_path, 200)
    for path in (tmp_path / "coco/train2017").iterdir():
        path.unlink()
    found = check_data(make_manifest(), tmp_path, num_images=40, num_workers=num_workers)
    looked = [one(found, "images", root).detail for root in ("coco/train2017", "vg")]
    assert looked == [
        "0 of 18 files looked at are whole, 18 missing",
        "22 of 22 files looked at are whole",
    ]
    names = [name.removesuffix(".jpg: missing") for name in found.findings[1].examples]
    numbers = [int(name.rpartition("/")[2]) for name in names]
    assert numbers == sorted(numbers)
    assert numbers[0] < 50 < 150 < numbers[-1]  # from the whole list


def test_pictures_named_within_their_root(tmp_path: Path) -> None:
    (tmp_path / "images/00453").mkdir(parents=True)
    (tmp_path / "images/00453/1.jpg").write_bytes(encode_picture())
    records = [{"id": "1", "image": "00453/1.jpg"}, {"id": "2", "image": "00453/2.jpg"}]
    (tmp_path / "toy.json").write_text(json.dumps(records))
    found = check_data(make_manifest(image_roots=["images"]), tmp_path)
    assert one(found, "images", "images").detail == ("1 of 2 files looked at are whole, 1 missing")
    assert one(found, "images", "images").examples == ("00453/2.jpg: missing",)


def test_metadata_files_of_vcr(tmp_path: Path) -> None:
    records = [
        {
            "id": f"vcr-{n}",
            "image": f"vcr1images/{n}.jpg",
            "meta_dir": f"./dataset/vcr1images/{n}.json",
        }
        for n in range(3)
    ]
    (tmp_path / "toy.json").write_text(json.dumps(records))
    (tmp_path / "vcr1images").mkdir()
    for n in range(3):
        (tmp_path / f"vcr1images/{n}.jpg").write_bytes(encode_picture())
    (tmp_path / "vcr1images/0.json").write_text("{}")
    (tmp_path / "vcr1images/1.json").write_text("{")
    found = check_data(make_manifest(image_roots=["vcr1images"]), tmp_path)
    assert one(found, "images").status == "ok"
    meta = one(found, "metadata", "vcr1images")
    assert meta.detail == "1 of 3 files looked at are whole, 1 missing, 1 unreadable"


def test_only_records_of_the_manifests_kinds_count(tmp_path: Path) -> None:
    records = [{"id": "vcr-1"}, {"id": "refcocog-1", "image": "vg/none.jpg"}, {"id": "vcr-2"}]
    (tmp_path / "toy.json").write_text(json.dumps(records))
    (tmp_path / "vg").mkdir()
    manifest = make_manifest(annotation_kinds=["vcr"], image_roots=["vg"])
    found = check_data(manifest, tmp_path, parts=["annotations", "images"])
    assert found.ok
    assert found.findings[0].detail == "2 records (2 vcr); 1 others belong to other data sets"
    assert found.findings[1].detail == "there; no record that was looked at names a file in it"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{", "is not JSON"),
        ("{}", "expected a JSON list"),
        ("", "is empty"),
        ('[{"id": 1}', "break"),
    ],
)
def test_a_damaged_list(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "toy.json").write_text(text)
    finding = one(check_data(make_manifest(), tmp_path), "annotations")
    assert finding.status == "damaged"
    assert words in finding.detail


def test_items_that_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text('[{"id": 1}, 5, {"id": 2}, []]')
    finding = one(check_data(make_manifest(), tmp_path), "annotations")
    assert (finding.status, finding.detail) == (
        "damaged",
        "2 records (2 text_only); 2 items are no records",
    )
    assert finding.examples[0] == "item 1 is int; a record is a JSON object"


@pytest.mark.parametrize(("expected", "status"), [(20, "ok"), (21, "ok"), (25, "differs")])
def test_a_list_of_another_length_than_published(
    tmp_path: Path, expected: int, status: str
) -> None:
    write_data(tmp_path)
    found = check_data(make_manifest(approximate_samples=expected), tmp_path, num_images=0)
    assert one(found, "annotations").status == status


@pytest.mark.parametrize(
    "image", ["../secret.jpg", "/etc/passwd", "", "a" * 300, "/9j/" + "A" * 9999]
)
def test_a_picture_outside_the_data_root(tmp_path: Path, image: str) -> None:
    (tmp_path / "vg").mkdir()
    (tmp_path / "toy.json").write_text(json.dumps([{"id": "1", "image": image}]))
    finding = one(check_data(make_manifest(image_roots=["vg"]), tmp_path), "images")
    assert finding.status == "damaged"
    assert "inside the data root" in finding.examples[0]


def test_missing_tars_are_named(tmp_path: Path) -> None:
    write_shards(toy_samples(10), tmp_path / "toy", max_samples=4)
    manifest = make_manifest(shards="toy/shard-{000000..000004}.tar", annotation_file=None)
    finding = one(check_data(manifest, tmp_path), "shards")
    assert (finding.status, finding.detail) == ("missing", "3 of 5 tars are there")
    assert finding.examples == (
        "toy/shard-000003.tar: missing",
        "toy/shard-000004.tar: missing",
    )


def test_a_damaged_tar(tmp_path: Path) -> None:
    paths = write_shards(toy_samples(10), tmp_path / "toy", max_samples=4)
    paths[1].write_bytes(paths[1].read_bytes()[:-5000])
    finding = one(check_data(make_manifest(), tmp_path, parts=["shards"]), "shards")
    assert finding.status == "damaged"
    assert paths[1].stem in finding.detail


def test_another_number_of_samples(tmp_path: Path) -> None:
    write_shards(toy_samples(10), tmp_path / "toy", max_samples=4)
    finding = one(check_data(make_manifest(num_samples=11), tmp_path), "shards")
    assert (finding.status, finding.detail) == (
        "differs",
        "10 samples in 3 tars; the manifest says 11",
    )


def test_addresses_are_left_to_verify(tmp_path: Path) -> None:
    manifest = make_manifest(shards="s3://bucket/{0..3}.tar", annotation_file=None)
    found = check_data(manifest, tmp_path)
    assert found.ok
    assert one(found, "shards").status == "unchecked"
    assert one(found, "shards").remedy == "vipllava shards verify toy"
    remote = check_data(manifest, "s3://bucket")
    assert statuses(remote) == {"data root s3://bucket": "unchecked"}


def write_vip_bench(root: Path, count: int = 3) -> None:
    for split in ("bbox", "human"):
        (root / split / "images").mkdir(parents=True)
        lines = [
            json.dumps({"question_id": n, "image": f"{n}.png", "text": "?"}) for n in range(count)
        ]
        (root / split / "questions.jsonl").write_text("\n".join(lines))
        for n in range(count):
            (root / split / "images" / f"{n}.png").write_bytes(encode_picture(fmt="PNG"))
    (root / "vip-bench-meta-data.json").write_text(
        json.dumps({f"v1_{n}": {} for n in range(count)})
    )


VIP_BENCH = {
    "format": "vip_bench",
    "folder": "ViP-Bench",
    "shards": [],
    "annotation_file": None,
    "num_samples": 3,
}


def test_the_layout_of_vip_bench(tmp_path: Path) -> None:
    manifest = make_manifest(**VIP_BENCH)
    assert statuses(check_data(manifest, tmp_path)) == {"layout ViP-Bench": "missing"}
    folder = tmp_path / "ViP-Bench"
    write_vip_bench(folder)
    assert statuses(check_data(manifest, tmp_path)) == {
        "layout ViP-Bench/vip-bench-meta-data.json": "ok",
        "layout ViP-Bench/bbox/questions.jsonl": "ok",
        "images ViP-Bench/bbox/images": "ok",
        "layout ViP-Bench/human/questions.jsonl": "ok",
        "images ViP-Bench/human/images": "ok",
    }
    (folder / "bbox/images/1.png").write_bytes(b"")
    (folder / "human/images/2.png").unlink()
    (folder / "human/questions.jsonl").write_text('{"image": "0.png"}\n')
    (folder / "vip-bench-meta-data.json").write_text("[")
    assert statuses(check_data(manifest, tmp_path)) == {
        "layout ViP-Bench/vip-bench-meta-data.json": "damaged",
        "layout ViP-Bench/bbox/questions.jsonl": "ok",
        "images ViP-Bench/bbox/images": "damaged",
        "layout ViP-Bench/human/questions.jsonl": "differs",
        "images ViP-Bench/human/images": "ok",
    }
    (folder / "bbox/questions.jsonl").write_text('{"image": "0.png"}\n\n{"image": 3}')
    (folder / "human/questions.jsonl").unlink()
    found = check_data(manifest, tmp_path)
    assert "line 3: TypeError" in found.findings[1].detail
    assert statuses(found) == {
        "layout ViP-Bench/vip-bench-meta-data.json": "damaged",
        "layout ViP-Bench/bbox/questions.jsonl": "damaged",
        "layout ViP-Bench/human/questions.jsonl": "missing",
    }


def test_json(tmp_path: Path) -> None:
    write_data(tmp_path)
    found = check_data(make_manifest(), tmp_path, parts=["annotations"])
    assert json.loads(json.dumps(found.to_json())) == {
        "schema_version": 1,
        "manifest": "toy",
        "data_root": str(tmp_path),
        "findings": [
            {
                "part": "annotations",
                "name": "toy.json",
                "status": "ok",
                "detail": "20 records (16 image_level, 4 text_only)",
                "remedy": "",
                "examples": [],
            }
        ],
        "ok": True,
    }


def test_progress_is_told(tmp_path: Path) -> None:
    write_data(tmp_path)
    told: list[tuple[str, str, int, int | None]] = []
    check_data(make_manifest(), tmp_path, tell=lambda *now: told.append(now))
    size = (tmp_path / "toy.json").stat().st_size
    assert ("reading toy.json", "bytes", size, size) in told
    assert told[-1] == ("looking at pictures", "files", 16, 16)


@pytest.mark.parametrize("bad", [{"parts": ["shard"]}, {"num_images": -1}])
def test_arguments_that_make_no_sense(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        check_data(make_manifest(), tmp_path, **bad)
