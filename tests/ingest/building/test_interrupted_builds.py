"""Builds that are interrupted, killed, or done again."""

from __future__ import annotations

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

from tests import preloaded
from tests.ingest.building.toy_build import (
    NUM,
    build,
    contents,
    times,
    toy_manifest,
    toy_records,
    write_list,
)
from tests.toy_data import said
from vipllava.ingest.building import shard_build
from vipllava.ingest.building.shard_build import BuildError
from vipllava.shards.tar_index import build_index
from vipllava.shards.tars import open_shards

ROOT = Path(__file__).resolve().parents[3]


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
    assert "1 records were rejected; if they are corrected, remove the folder" in caplog.text


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
        return preloaded.Popen(
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
    preloaded.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
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
        job = preloaded.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
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
    preloaded.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
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
