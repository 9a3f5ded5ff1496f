"""Whole data sets fetched from servers on loopback."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import preloaded
from tests.files.file_server import FileServer, Reply, run_server
from tests.ingest.fetch.fake_hub import REPO, run_hub
from vipllava.files.download import DiskError
from vipllava.files.retries import Patience
from vipllava.ingest.fetch import fetching
from vipllava.ingest.fetch.fetching import FetchOptions, Outcome, count_files, fetch_data
from vipllava.shards.manifest import Manifest, parse_manifest
from vipllava.types import ConfigError

QUICK = Patience(max_attempts=2, timeout_s=5, backoff_s=0)
OPTIONS = FetchOptions(num_workers=2, patience=QUICK)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with run_server() as running:
        yield running


def make_manifest(*sources: dict[str, Any]) -> Manifest:
    raw = {
        "schema_version": 2,
        "name": "toy",
        "stage": "finetune",
        "licence": "none",
        "shards": "toy/*.tar",
        "sources": [{"what": "images", **source} for source in sources],
    }
    return parse_manifest(raw, where="test")


def make_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return buffer.getvalue()


IMAGES = make_zip({"train/1.jpg": b"1" * 5000, "train/2.jpg": b"2" * 5000, "readme": b"hi"})


def archive(url: str, **more: object) -> dict[str, Any]:
    files = [{"url": url, "into": "coco/train", "unpack": "train", **more}]
    return {"name": "COCO train", "files": files}


def tree(root: Path) -> set[str]:
    """The files that a person sees."""
    files = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {name for name in files if not name.startswith(".vipllava/")}


def test_an_archive_ends_in_its_image_root(server: FileServer, tmp_path: Path) -> None:
    manifest = make_manifest(archive(server.serve("train.zip", IMAGES)))
    told: list[tuple[str, str, int, int | None]] = []
    outcomes = fetch_data(manifest, tmp_path, OPTIONS, tell=lambda *now: told.append(now))
    assert outcomes == [Outcome("COCO train", "train.zip", "coco/train", "fetched", "2 files")]
    assert tree(tmp_path) == {"coco/train/1.jpg", "coco/train/2.jpg"}
    assert told[-1] == ("unpack train.zip", "files", 2, 3)
    assert ("train.zip", "bytes", len(IMAGES), len(IMAGES)) in told
    again = fetch_data(manifest, tmp_path, OPTIONS)
    assert [(outcome.status, outcome.detail) for outcome in again] == [("present", "2 files")]
    assert len(server.requests) == 1


def test_archives_can_be_kept_and_fetched_again(server: FileServer, tmp_path: Path) -> None:
    manifest = make_manifest(archive(server.serve("train.zip", IMAGES)))
    fetch_data(manifest, tmp_path, FetchOptions(keep_archives=True, patience=QUICK))
    kept = tmp_path / "downloads" / "coco-train" / "train.zip"
    assert kept.read_bytes() == IMAGES
    newer = make_zip({"train/1.jpg": b"9" * 5000})
    server.serve("train.zip", newer)
    outcomes = fetch_data(manifest, tmp_path, FetchOptions(again=True, patience=QUICK))
    assert outcomes[0].status == "fetched"
    assert (tmp_path / "coco/train/1.jpg").read_bytes() == b"9" * 5000
    assert not kept.exists()


def test_one_failure_does_not_stop_the_rest(server: FileServer, tmp_path: Path) -> None:
    bad = {"name": "bad", "files": [{"url": server.url("gone.json"), "into": "."}]}
    manifest = make_manifest(bad, archive(server.serve("train.zip", IMAGES)))
    outcomes = fetch_data(manifest, tmp_path, OPTIONS)
    assert [outcome.status for outcome in outcomes] == ["failed", "fetched"]
    assert not outcomes[0].ok
    assert server.url("gone.json") in outcomes[0].detail
    assert "has moved" in outcomes[0].detail


def test_a_broken_download_is_continued_by_the_next_call(
    server: FileServer, tmp_path: Path
) -> None:
    url = server.serve("train.zip", IMAGES, Reply(send=4000), Reply(send=2000), Reply(500))
    manifest = make_manifest(archive(url))
    first = fetch_data(manifest, tmp_path, FetchOptions(patience=Patience(2, 5, 0)))
    assert first[0].status == "failed"
    assert "6000 of" in first[0].detail
    assert not (tmp_path / "coco").exists()
    second = fetch_data(manifest, tmp_path, OPTIONS)
    assert second[0].status == "fetched"
    assert server.asked("train.zip") == [None, "bytes=4000-", "bytes=6000-", "bytes=6000-"]


def test_a_damaged_archive_is_discarded(server: FileServer, tmp_path: Path) -> None:
    bad = bytearray(IMAGES)
    bad[bad.index(b"2222")] ^= 1
    url = server.serve("train.zip", bytes(bad))
    manifest = make_manifest(archive(url))
    outcome = fetch_data(manifest, tmp_path, OPTIONS)[0]
    assert outcome.status == "failed"
    assert "is damaged" in outcome.detail
    assert "run the same command again to download it anew" in outcome.detail
    assert tree(tmp_path) == {"coco/train/1.jpg"}
    server.serve("train.zip", IMAGES)
    assert fetch_data(manifest, tmp_path, OPTIONS)[0].status == "fetched"
    assert (tmp_path / "coco/train/2.jpg").read_bytes() == b"2" * 5000


def test_an_unpacking_that_was_killed_is_finished(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("train.zip", make_zip({f"train/{n}.jpg": b"x" * 999 for n in range(400)}))
    script = (
        "import sys, time\nfrom tests.ingest.fetch.test_fetching import archive, make_manifest\n"
        "from vipllava.ingest.fetch.fetching import fetch_data\n"
        "def tell(task, unit, done, total):\n"
        "    if unit == 'files' and done == 100:\n"
        "        print('half', flush=True)\n"
        "        time.sleep(60)\n"
        "fetch_data(make_manifest(archive(sys.argv[1])), sys.argv[2], tell=tell)\n"
    )
    command = [sys.executable, "-c", script, url, str(tmp_path)]
    root = Path(__file__).parents[3]
    with preloaded.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.kill()
    assert count_files(tmp_path / "coco/train") == 100
    outcome = fetch_data(make_manifest(archive(url)), tmp_path, OPTIONS)[0]
    assert (outcome.status, outcome.detail) == ("fetched", "400 files")
    assert len(server.asked("train.zip")) == 1  # the archive was whole
    assert len(tree(tmp_path)) == 400


def test_pictures_that_somebody_else_put_there(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "coco/train").mkdir(parents=True)
    (tmp_path / "coco/train/1.jpg").write_bytes(b"1")
    url = server.serve("train.zip", IMAGES)
    outcome = fetch_data(make_manifest(archive(url)), tmp_path, OPTIONS)[0]
    assert outcome.status == "present"
    assert "1 files, put there by somebody else" in outcome.detail
    assert server.requests == []
    outcome = fetch_data(make_manifest(archive(url, num_files=2)), tmp_path, OPTIONS)[0]
    assert (outcome.status, outcome.detail) == ("fetched", "2 files")


def test_a_count_that_is_too_low_is_told(server: FileServer, tmp_path: Path) -> None:
    manifest = make_manifest(archive(server.serve("train.zip", IMAGES), num_files=5))
    assert fetch_data(manifest, tmp_path, OPTIONS)[0].detail == "2 files; 5 were expected"


def test_what_needs_a_form_says_where_to_put_it(tmp_path: Path) -> None:
    source = {
        "name": "VCR",
        "access": "form",
        "address": "https://vcr.example/form",
        "files": [{"file": "vcr1images.zip", "into": "vcr1images", "unpack": "vcr1images"}],
    }
    manifest = make_manifest(source)
    outcome = fetch_data(manifest, tmp_path, OPTIONS)[0]
    place = tmp_path / "downloads/vcr/vcr1images.zip"
    assert (outcome.status, outcome.place) == ("missing", "vcr1images")
    assert outcome.detail == (
        f"ask for it by the form at https://vcr.example/form and put it at {place}, then run this "
        f"command again; or unpack it yourself into {tmp_path / 'vcr1images'}"
    )
    place.parent.mkdir(parents=True)
    place.write_bytes(make_zip({"vcr1images/clip/1.jpg": b"1", "vcr1images/clip/1.json": b"{}"}))
    outcome = fetch_data(manifest, tmp_path, OPTIONS)[0]
    assert (outcome.status, outcome.detail) == ("fetched", "2 files")
    assert place.exists()  # it is not ours to delete
    place.write_bytes(b"<html>")
    outcome = fetch_data(manifest, tmp_path, FetchOptions(again=True))[0]
    assert outcome.status == "failed"
    assert place.exists()


def test_files_to_place_by_hand(tmp_path: Path) -> None:
    source = {
        "name": "RefCOCOg",
        "access": "by_hand",
        "address": "https://refer.example",
        "files": [{"file": "val.json", "into": "refs"}],
    }
    outcome = fetch_data(make_manifest(source), tmp_path, OPTIONS)[0]
    assert (outcome.status, outcome.place) == ("missing", "refs/val.json")
    assert "get it with a browser from https://refer.example" in outcome.detail
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs/val.json").write_text("[]")
    assert fetch_data(make_manifest(source), tmp_path, OPTIONS)[0].status == "present"


def test_sources_without_files(tmp_path: Path) -> None:
    raw = {
        "schema_version": 2,
        "name": "toy",
        "stage": "finetune",
        "licence": "none",
        "shards": "toy/*.tar",
        "sources": [{"name": "VCR", "what": "images", "access": "form", "address": "request form"}],
    }
    outcome = fetch_data(parse_manifest(raw, where="test"), tmp_path, OPTIONS)[0]
    assert (outcome.source, outcome.part, outcome.status) == ("VCR", "images", "missing")
    assert "get it by hand at request form" in outcome.detail


def test_plain_files(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("list%20v1.json", b"[]")
    source = {"name": "lists", "files": [{"url": url, "into": "deep", "size": 2}]}
    outcome = fetch_data(make_manifest(source), tmp_path, OPTIONS)[0]
    assert outcome == Outcome("lists", "list v1.json", "deep/list v1.json", "fetched", "2 bytes")
    assert fetch_data(make_manifest(source), tmp_path, OPTIONS)[0].status == "present"
    (tmp_path / "deep/list v1.json").write_text("[")
    outcome = fetch_data(make_manifest(source), tmp_path, OPTIONS)[0]
    assert outcome.status == "failed"
    assert "has 1 bytes, the manifest says 2" in outcome.detail
    again = FetchOptions(again=True, patience=QUICK)
    assert fetch_data(make_manifest(source), tmp_path, again)[0].status == "fetched"


def test_hub_files_archives_and_patterns(tmp_path: Path) -> None:
    files = [
        {"file": "list.json", "into": "."},
        {"file": "images.zip", "into": "pre/images", "unpack": "."},
        {"file": "bbox/*", "into": "ViP-Bench"},
    ]
    manifest = make_manifest({"name": "org/set", "hub": REPO, "files": files})
    with run_hub() as hub:
        hub.add("list.json", b"[]", large=True)
        hub.add("images.zip", make_zip({"0/1.jpg": b"1"}), large=True)
        hub.add("bbox/questions.jsonl", b"{}")
        hub.add("bbox/images/1.png", b"png")
        outcomes = fetch_data(manifest, tmp_path, OPTIONS)
        hub.server.requests.clear()
        assert all(o.status == "present" for o in fetch_data(manifest, tmp_path, OPTIONS))
        assert hub.server.requests == []
    assert [(outcome.part, outcome.place, outcome.detail) for outcome in outcomes] == [
        ("list.json", "list.json", "2 bytes"),
        ("images.zip", "pre/images", "1 files"),
        ("bbox/*", "ViP-Bench", "2 files"),
    ]
    assert tree(tmp_path) == {
        "list.json",
        "pre/images/0/1.jpg",
        "ViP-Bench/bbox/questions.jsonl",
        "ViP-Bench/bbox/images/1.png",
    }


def picture(fmt: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (250, 0, 0)).save(buffer, fmt)
    return buffer.getvalue()


OCR = {
    "name": "OCR-VQA",
    "access": "by_hand",
    "address": "https://ocr.example",
    "files": [{"file": "dataset.json", "into": "ocr"}],
    "image_list": {"file": "ocr/dataset.json", "url_field": "imageURL", "into": "ocr/images"},
}


def test_pictures_one_by_one_end_as_jpeg(server: FileServer, tmp_path: Path) -> None:
    manifest = make_manifest(OCR)
    outcomes = fetch_data(manifest, tmp_path, OPTIONS)
    assert [outcome.status for outcome in outcomes] == ["missing"]
    listed = tmp_path / "ocr/dataset.json"
    assert outcomes[0].detail == (
        f"get it with a browser from https://ocr.example and put it at {listed}, then run this "
        "command again"
    )
    entries = {
        "1": {"imageURL": server.serve("1.jpg", picture("JPEG"))},
        "2": {"imageURL": server.serve("2.gif", picture("GIF"))},
        "3": {"imageURL": server.url("3.jpg")},
    }
    listed.parent.mkdir()
    listed.write_text(json.dumps(entries))
    outcome = fetch_data(manifest, tmp_path, OPTIONS)[0]
    failures = tmp_path / "downloads/ocr-vqa/failures.jsonl"
    assert (outcome.status, outcome.detail) == (
        "fetched",
        f"2 of 3 pictures, 1 of them made JPEG; 1 could not be had (see {failures}; again=true "
        "retries)",
    )
    failure = json.loads(failures.read_text())
    assert (failure["name"], failure["address"]) == ("3", server.url("3.jpg"))
    for name in ("1.jpg", "2.jpg"):
        with Image.open(tmp_path / "ocr/images" / name) as image:
            assert image.format == "JPEG"
    assert fetch_data(manifest, tmp_path, OPTIONS)[0].status == "present"
    server.serve("3.jpg", picture("PNG"))
    again = FetchOptions(again=True, patience=QUICK)
    assert fetch_data(manifest, tmp_path, again)[0].detail == "3 of 3 pictures, 1 of them made JPEG"
    assert not failures.exists()


def test_pictures_that_came_another_way_are_made_jpeg(tmp_path: Path) -> None:
    folder = tmp_path / "ocr/images"
    folder.mkdir(parents=True)
    (folder / "1.gif").write_bytes(picture("GIF"))
    (folder / "2.jpg").write_bytes(picture("PNG"))
    outcome = fetch_data(make_manifest(OCR), tmp_path, OPTIONS)[0]
    assert outcome.status == "present"
    assert outcome.detail.startswith("2 files, 2 of them made JPEG, 0 not readable; without")
    assert {path.name for path in folder.iterdir()} == {"1.jpg", "2.jpg"}


def _fetch(url: str, root: str, queue: Any) -> None:
    queue.put(fetch_data(make_manifest(archive(url)), root)[0].status)


def test_two_processes_on_one_data_root(server: FileServer, tmp_path: Path) -> None:
    url = server.serve("train.zip", IMAGES, Reply(wait_s=0.5))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_fetch, args=(url, str(tmp_path), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    statuses = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    queue.close()
    assert statuses == {"fetched", "present"}
    assert len(server.requests) == 1
    assert tree(tmp_path) == {"coco/train/1.jpg", "coco/train/2.jpg"}


def test_a_full_disk_stops_all(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching, "unpack", full)
    url = server.serve("train.zip", IMAGES)
    with pytest.raises(DiskError, match="COCO train: no space left"):
        fetch_data(make_manifest(archive(url), archive(url)), tmp_path, OPTIONS)


def test_a_data_root_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data_root=s3://bucket is an address"):
        fetch_data(make_manifest(), "s3://bucket", OPTIONS)
    (tmp_path / "file").write_text("")
    source = {"name": "a", "files": [{"url": "http://127.0.0.1:1/x", "into": "."}]}
    with pytest.raises(DiskError, match="cannot write"):
        fetch_data(make_manifest(source), tmp_path / "file", OPTIONS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 9, "into": "coco/train"}'])
def test_a_damaged_receipt_counts_for_nothing(
    server: FileServer, tmp_path: Path, text: str
) -> None:
    manifest = make_manifest(archive(server.serve("train.zip", IMAGES), num_files=2))
    fetch_data(manifest, tmp_path, OPTIONS)
    receipt = next((tmp_path / ".vipllava/fetched").rglob("*.json"))
    receipt.write_text(text)
    assert fetch_data(manifest, tmp_path, OPTIONS)[0].status == "present"
    (tmp_path / "coco/train/2.jpg").unlink()
    assert fetch_data(manifest, tmp_path, OPTIONS)[0].status == "fetched"
    assert count_files(tmp_path / "coco/train") == 2
