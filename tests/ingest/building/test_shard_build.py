"""Building shards: what lands in the tars, what is rejected, and builds that are interrupted."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.toy_data import encode_picture, make_manifest, said
from vipllava.ingest.building import shard_build
from vipllava.ingest.building.annotations import AnnotationError
from vipllava.ingest.building.shard_build import (
    BuildError,
    BuildProgress,
    BuildSummary,
    build_shards,
    manifest_lines,
)
from vipllava.shards.manifest import Manifest
from vipllava.shards.tar_index import build_index
from vipllava.shards.tars import open_shards

ROOT = Path(__file__).resolve().parents[3]
NUM = 13


def toy_manifest(**changes: Any) -> Manifest:
    return make_manifest(**{"annotation_file": "list.json", "image_roots": ["pictures"], **changes})


def toy_records() -> list[dict[str, Any]]:
    """Return image-level, region and (each fifth) text-only records."""
    records: list[dict[str, Any]] = []
    for number in range(NUM):
        record: dict[str, Any] = {"id": f"r{number:02d}", "conversations": said("Q?", "A.")}
        if number % 5 != 4:
            record["image"] = f"pictures/{number}.jpg"
        if number % 5 == 2:
            record |= {"bboxes": [[4, 4, 30, 30]], "conversations": said("<bbox0>?", "A.")}
        records.append(record)
    return records


def write_list(root: Path, records: list[Any]) -> None:
    root.mkdir(exist_ok=True)
    (root / "list.json").write_text(json.dumps(records))


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """The toy records with their pictures."""
    root = tmp_path / "data"
    write_list(root, toy_records())
    (root / "pictures").mkdir()
    for number in range(NUM):
        (root / "pictures" / f"{number}.jpg").write_bytes(encode_picture(seed=number))
    return root


def build(root: Path, manifest: Manifest | None = None, **options: Any) -> BuildSummary:
    options = {"num_workers": 0, "max_samples": 5, **options}
    return build_shards(manifest or toy_manifest(), root, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
    told: list[BuildProgress] = []
    build(data_root, on_progress=told.append)
    size = (data_root / "list.json").stat().st_size
    assert told == [
        BuildProgress("list", size, size),
        BuildProgress("shards", 5, NUM),
        BuildProgress("shards", 10, NUM),
        BuildProgress("shards", NUM, NUM),
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
    assert "toy/r01-1: picture pictures/1.jpg is missing" in rows[0]["reason"]
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


# Interrupted builds.


@pytest.fixture
def half_built(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build that was stopped after two of three shards."""
    original = shard_build.build_shard

    def stopping(job: shard_build.ShardJob) -> Any:
        if job.name == "shard-000002":
            raise KeyboardInterrupt
        return original(job)

    with monkeypatch.context() as patch:
        patch.setattr(shard_build, "build_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            build(data_root)
    return data_root


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def test_an_unfinished_build_is_no_data_set(half_built: Path):
    assert not (half_built / "toy").exists()
    assert len(times(half_built / "toy.building")) == 2


def test_finished_shards_are_kept(half_built: Path, tmp_path: Path):
    before = times(half_built / "toy.building")
    (half_built / "toy.building" / ".part-left").mkdir()
    (half_built / "toy.building" / "shard-000009.tar").write_bytes(b"of other settings")
    build(half_built)
    after = times(half_built / "toy")
    assert {name: after[name] for name in before} == before
    build(half_built, output=tmp_path / "fresh")
    assert contents(half_built / "toy") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["tar", "shorter tar", "index", "report", "old report"])
def test_unfinished_shards_are_made_again(half_built: Path, tmp_path: Path, damage: str):
    work = half_built / "toy.building"
    tar, index = work / "shard-000001.tar", work / "shard-000001.index.npz"
    report = work / ".reports/shard-000001.json"
    if damage == "tar":
        tar.unlink()
    elif damage == "shorter tar":
        tar.write_bytes(tar.read_bytes()[:-1024])
    elif damage == "index":
        index.write_bytes(b"not an index")
    elif damage == "report":
        report.write_text(report.read_text()[:50])
    else:
        report.write_text(report.read_text().replace('"inputs": "', '"inputs": "0', 1))
    build(half_built)
    build(half_built, output=tmp_path / "fresh")
    assert contents(half_built / "toy") == contents(tmp_path / "fresh")


def test_another_list_makes_its_stretches_again(half_built: Path):
    before = times(half_built / "toy.building")
    records = toy_records()
    records[7]["conversations"] = said("<bbox0>!", "B.")
    write_list(half_built, records)
    build(half_built)
    after = times(half_built / "toy")
    assert after["shard-000000.tar"] == before["shard-000000.tar"]
    assert after["shard-000001.tar"] > before["shard-000001.tar"]
    assert open_shards(toy_manifest(), half_built).read(7).record["conversations"][1] == {
        "from": "gpt", "value": "B.",
    }  # fmt: skip


def test_other_settings_make_everything_again(half_built: Path):
    summary = build(half_built, max_samples=7)
    assert [shard["num_samples"] for shard in summary.shards] == [7, 6]
    assert len(open_shards(toy_manifest(), half_built)) == NUM


def test_a_mended_picture_is_taken_in(data_root: Path):
    picture = data_root / "pictures/1.jpg"
    data = picture.read_bytes()
    picture.unlink()
    (data_root / "pictures/12.jpg").unlink()
    with pytest.raises(BuildError, match="2 of 13 records"):
        build(data_root, max_bad_rate=0.1)
    before = times(data_root / "toy.building")
    picture.write_bytes(data)
    summary = build(data_root, max_bad_rate=0.1)
    after = times(data_root / "toy")
    assert (summary.num_samples, summary.num_rejected) == (12, 1)
    assert {name for name in after if after[name] == before[name]} == {
        "shard-000001.tar", "shard-000002.tar",
    }  # fmt: skip


def test_a_picture_that_could_not_be_read_is_tried_anew(data_root: Path):
    """A failing disk leaves size and time of the file as they are."""
    picture = data_root / "pictures/1.jpg"
    data = picture.read_bytes()
    picture.unlink()
    picture.mkdir()
    with pytest.raises(BuildError, match=r"1 of 5 records .* \(input-unreadable 1\)"):
        build(data_root)
    report = data_root / "toy.building/.reports/shard-000000.json"
    picture.rmdir()
    picture.write_bytes(data)
    stat = picture.stat()
    state = json.loads(report.read_text())
    state["rejected"][0]["inputs"]["pictures/pictures/1.jpg"] = None
    state["rejected"][0]["inputs"]["pictures/1.jpg"] = [stat.st_size, stat.st_mtime_ns]
    report.write_text(json.dumps(state))
    assert build(data_root).num_samples == NUM


@pytest.mark.parametrize("cut", [None, 1024])
def test_a_finished_build_that_lost_a_tar_says_so(data_root: Path, cut: int | None):
    build(data_root)
    tar = data_root / "toy/shard-000001.tar"
    data = tar.read_bytes()
    tar.unlink()
    if cut is not None:
        tar.write_bytes(data[:-cut])
    with pytest.raises(BuildError, match=r"shard-000001\.tar is gone or has another size"):
        build(data_root)
    tar.write_bytes(data)
    assert build(data_root).num_samples == NUM


def test_mended_records_of_a_finished_build(data_root: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    picture = data_root / "pictures/1.jpg"
    data = picture.read_bytes()
    picture.unlink()
    build(data_root, max_bad_rate=1)
    picture.write_bytes(data)
    assert build(data_root, max_bad_rate=1).num_rejected == 1
    assert "1 records were rejected; if they are mended, remove the folder" in caplog.text


def test_a_finished_build_is_not_repeated(data_root: Path):
    summary = build(data_root)
    before = times(data_root / "toy")
    (data_root / "toy/.reports").mkdir()  # a build killed between its last two acts
    assert build(data_root) == summary
    assert times(data_root / "toy") == before
    assert not (data_root / "toy/.reports").exists()
    assert not (data_root / "toy.building").exists()


def test_a_finished_build_of_something_else_stays(data_root: Path):
    build(data_root)
    before = contents(data_root / "toy")
    with pytest.raises(BuildError, match=r"from another annotation list or with other settings"):
        build(data_root, max_samples=6)
    write_list(data_root, toy_records()[:-1])
    with pytest.raises(BuildError, match=r"toy was built from another .*; remove it"):
        build(data_root)
    assert contents(data_root / "toy") == before


def test_killed_at_any_time_it_ends_the_same(data_root: Path, tmp_path: Path):
    """Real processes, SIGKILL to the parent; its workers must end by themselves."""
    command = [sys.executable, "-m", "tests.ingest.building.build_job", str(data_root), "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )

    job = start()
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("shards"):
            break
    workers = children(job.pid)
    assert workers
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    assert not (data_root / "toy").exists()
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers outlive the build"
        time.sleep(0.05)
    building = data_root / "toy.building"
    done = {report.stem for report in (building / ".reports").glob("*.json")}
    # A tar whose report was not written yet is not kept.
    kept = {name: when for name, when in times(building).items() if Path(name).stem in done}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = times(data_root / "toy")
    assert kept
    assert all(after[name] == when for name, when in kept.items())
    build(data_root, output=tmp_path / "fresh")
    assert contents(data_root / "toy") == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(data_root: Path, tmp_path: Path):
    """SIGKILL at random times, each build going on where the one before was killed."""
    write_list(data_root, [{**r, "id": n} for n, r in enumerate(toy_records() * 80)])
    build(data_root, output=tmp_path / "unbroken")
    command = [sys.executable, "-m", "tests.ingest.building.build_job", str(data_root), "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    times_of_death = random.Random(0)
    work = data_root / "toy.building"
    num_kept = [0]
    while len(num_kept) < 6:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert job.stdout is not None
        for line in job.stdout:
            phase, done = line.split()
            if phase == "shards" and int(done) > 5 * num_kept[-1] + 20:
                break
        time.sleep(times_of_death.uniform(0, 0.05))
        workers = children(job.pid)
        job.send_signal(signal.SIGKILL)
        job.wait()
        job.stdout.close()
        while any(map(is_running, workers)):
            time.sleep(0.02)
        if (data_root / "toy").exists():  # it was done before the kill
            break
        tars = sorted(work.glob("*.tar"))
        for tar in tars:
            build_index(tar)  # raises if it is not whole
        num_kept.append(len(tars))
    assert len(num_kept) > 3
    assert num_kept == sorted(set(num_kept))
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert contents(data_root / "toy") == contents(tmp_path / "unbroken")


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# What can be wrong around it.


def test_two_builds_on_one_output(data_root: Path):
    work = data_root / "toy.building"
    work.mkdir()
    with (work / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match=r"another build is at work in .*toy\.building"):
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
