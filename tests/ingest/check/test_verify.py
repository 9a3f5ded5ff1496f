"""Looking at every sample: all damage is found, and nothing in a whole set."""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.toy_data import encode_picture, make_manifest, toy_samples
from vipllava.ingest.check.verify import Verdict, index_shards, verify_shards
from vipllava.shards.tar_index import build_index, index_path, save_index
from vipllava.shards.tars import write_shards


def make(root: Path, count: int = 20, **options: Any) -> list[Path]:
    return write_shards(toy_samples(count), root / "toy", max_samples=8, **options)


def verify(root: Path, **options: Any) -> Verdict:
    changes = options.pop("changes", {})
    return verify_shards(make_manifest(**changes), root, **{"num_workers": 0, **options})


def flip(tar: Path, member: str) -> None:
    """Change one byte of a member."""
    with tarfile.open(tar) as file:
        offset = file.getmember(member).offset_data
    data = bytearray(tar.read_bytes())
    data[offset + 5] ^= 1
    tar.write_bytes(data)


def found(verdict: Verdict) -> list[tuple[str, str | None]]:
    return [(Path(damage.shard).name, damage.key) for damage in verdict.damages]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_whole_set(tmp_path: Path, num_workers: int):
    make(tmp_path)
    told: list[tuple[int, int]] = []
    verdict = verify(
        tmp_path,
        num_workers=num_workers,
        decode=True,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert verdict == Verdict("toy", 3, 20, 0, ())
    assert verdict.ok
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_all_damage_is_listed(tmp_path: Path):
    tars = make(tmp_path)
    flip(tars[0], "s001.json")
    flip(tars[0], "s003.jpg")
    flip(tars[2], "s018.json")
    verdict = verify(tmp_path)
    assert found(verdict) == [
        ("shard-000000.tar", "s001"), ("shard-000000.tar", "s003"), ("shard-000002.tar", "s018"),
    ]  # fmt: skip
    assert verdict.num_samples == 17
    assert "record of sample `s001`" in verdict.damages[0].reason
    assert "image of sample `s003`" in verdict.damages[1].reason
    assert not verdict.ok
    content = verdict.to_json()
    assert content["ok"] is False
    assert content["damages"][1]["key"] == "s003"


def test_damage_of_whole_tars(tmp_path: Path):
    tars = make(tmp_path)
    tars[0].write_bytes(tars[0].read_bytes()[:9000])
    index_path(tars[1]).write_bytes(b"none")
    flip(tars[2], "s018.json")
    verdict = verify(tmp_path)
    assert found(verdict) == [
        ("shard-000000.tar", None), ("shard-000001.tar", None), ("shard-000002.tar", "s018"),
    ]  # fmt: skip
    reasons = [damage.reason for damage in verdict.damages]
    assert "not a whole tar" in reasons[0]  # which explains that its index does not fit
    assert "is not a shard index" in reasons[1]  # and its tar is whole
    assert 8 + 3 < verdict.num_samples < 19  # what is whole in the first counts, too


def test_the_index_of_another_tar(tmp_path: Path):
    tars = make(tmp_path)
    index_path(tars[0]).write_bytes(index_path(tars[1]).read_bytes())
    verdict = verify(tmp_path)
    assert found(verdict) == [("shard-000000.tar", None)]
    assert "index of another tar" in verdict.damages[0].reason


def test_tars_without_an_index(tmp_path: Path):
    tars = make(tmp_path)
    index_path(tars[0]).unlink()
    index_path(tars[1]).unlink()
    tars[1].write_bytes(tars[1].read_bytes()[:9000])
    verdict = verify(tmp_path)
    assert verdict.num_unindexed == 2
    assert found(verdict) == [("shard-000001.tar", None)]
    assert not index_path(tars[0]).exists()  # with damage about, nothing is made


def test_pictures_are_decoded_if_asked(tmp_path: Path):
    samples = toy_samples(3)
    key, record, _, extension = samples[1]
    samples[1] = (key, record, encode_picture()[:-300], extension)
    write_shards(samples, tmp_path / "toy")
    assert verify(tmp_path).ok
    verdict = verify(tmp_path, decode=True)
    assert found(verdict) == [("shard-000000.tar", "s001")]
    assert "cannot be decoded" in verdict.damages[0].reason


def test_what_concerns_all_tars(tmp_path: Path):
    make(tmp_path)
    verdict = verify(tmp_path, changes={"num_samples": 21})
    assert found(verdict) == [("toy", None)]
    assert "has 20 samples" in verdict.damages[0].reason
    write_shards(toy_samples(2), tmp_path / "toy", prefix="more")
    verdict = verify(tmp_path)
    assert found(verdict) == [("toy", None)]
    assert "`s000`" in verdict.damages[0].reason


def test_tars_that_are_not_there(tmp_path: Path):
    make(tmp_path)
    pattern = "toy/shard-{000001..000004}.tar"
    verdict = verify(tmp_path, changes={"shards": pattern})
    assert found(verdict) == [("shard-000003.tar", None), ("shard-000004.tar", None)]
    assert (verdict.num_shards, verdict.num_samples) == (2, 12)
    verdict = verify(tmp_path / "nowhere")
    assert found(verdict) == [("*.tar", None)]
    assert "does not exist" in verdict.damages[0].reason


def test_what_an_index_does_not_know_is_found_and_counted(tmp_path: Path):
    (tar,) = make(tmp_path, 3)
    index = build_index(tar)
    with tarfile.open(tar, "a") as file:  # and an index that an earlier release would have made
        for name in ("s000.txt", "s001.txt", "22.05.json", "22.05.jpg"):
            file.addfile(tarfile.TarInfo(name))
    size, head = tar.stat().st_size, zlib.crc32(tar.read_bytes()[:4096])
    save_index(replace(index, tar_size=size, head_crc=head), index_path(tar))
    verdict = verify(tmp_path)
    assert (verdict.num_samples, len(verdict.damages)) == (3, 1)
    assert "has 2 members such as `22.05.json`" in verdict.damages[0].reason
    assert verdict.to_json()["ignored"] == {"txt": 2, "05.json": 1, "05.jpg": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_indices_are_made_and_faults_listed(tmp_path: Path, num_workers: int):
    tars = make(tmp_path)
    before = index_path(tars[0]).read_bytes()
    for tar in tars:
        index_path(tar).unlink()
    tars[1].write_bytes(tars[1].read_bytes()[:9000])
    tars.append(tmp_path / "nowhere.tar")
    made = {result.path.name: result for result in index_shards(tars, num_workers)}
    assert {name: result.num_samples for name, result in made.items()} == {
        "shard-000000.tar": 8, "shard-000001.tar": 0, "shard-000002.tar": 4, "nowhere.tar": 0,
    }  # fmt: skip
    assert index_path(tars[0]).read_bytes() == before
    assert not index_path(tars[1]).exists()
    reasons = {name: result.reason for name, result in made.items() if result.reason}
    assert set(reasons) == {"shard-000001.tar", "nowhere.tar"}
    assert "is not a whole tar" in reasons["shard-000001.tar"]
