"""Machines with copies of the data of their own: they train on the same packs, or end together."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.files.file_server import FileServer, Reply, run_server
from tests.stream.stream_job import Job, consumed, error_of, start
from tests.toy_data import make_manifest, toy_samples
from vipllava.shards.tar_index import index_path
from vipllava.shards.tars import open_shards, write_shards
from vipllava.stream.quarantine import read_quarantine

NUM_SAMPLES = 22
PACKED = {
    "batching": "packed",
    "pack_length": 1024,
    "max_images_per_pack": 3,
    "seed": 3,
    "on_fault": "quarantine",
    "max_fault_rate": 1.0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("copies")
    write_shards(toy_samples(NUM_SAMPLES), path / "toy", max_samples=7)
    return path


def two_machines(root: Path, name: str, *roots: Path | str, **data: Any) -> Job:
    """One process on each of two machines; seconds of patience, as a run has minutes."""
    data = {"storage_patience_minutes": 0.05, **data}
    return Job(root, name, 2, 0, 1, epochs=1, data=data, roots=tuple(map(str, roots)))


@pytest.fixture(scope="module")
def damaged(root: Path) -> Path:
    """A copy in which a byte of a record has changed since its tar was indexed."""
    copy = root / "copy"
    shutil.copytree(root / "toy", copy / "toy")
    offset = open_shards(make_manifest(), copy).record_offset(9)
    with (copy / "toy" / "shard-000001.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"?")
    return copy


def test_all_train_on_the_packs_that_rank_0_plans(root: Path, damaged: Path) -> None:
    alone = Job(root, "alone", epochs=1, data=PACKED, roots=(str(damaged),))
    assert start(alone) == [0]
    job = two_machines(root, "planned", damaged, root, **PACKED)
    assert start(job) == [0, 0]
    assert consumed(root, "planned") == consumed(root, "alone")
    (fault,) = read_quarantine(root / "planned" / "quarantine.jsonl")
    assert (fault["key"], fault["fault"]) == ("s009", "shard-broken")


def test_a_copy_that_lacks_what_was_planned_ends_both(root: Path, damaged: Path) -> None:
    job = two_machines(root, "lacks", root, damaged, num_proved=0, **PACKED)
    assert start(job) == [1, 1]
    told = (
        rf"VipLlavaError: {damaged}/toy/shard-000001\.tar: record of sample `s009` .*\n"
        r"It was read when the packs were planned, .* this machine's copy of the data is damaged"
    )
    assert re.match(told, error_of(job, 1))
    assert re.match(rf"VipLlavaError: the data of other .*:\nrank 1: {told}", error_of(job, 0))


def test_other_data_on_one_machine_are_refused_on_both(root: Path) -> None:
    samples = toy_samples(NUM_SAMPLES)
    samples[4][1]["conversations"][1]["value"] = "another answer"
    write_shards(samples, root / "other" / "toy", max_samples=7)
    job = two_machines(root, "refused", root, root / "other", **PACKED)
    assert start(job) == [1, 1]
    for rank in range(2):
        assert re.match(
            r"VipLlavaError: the ranks do not have the same data: copy it .*\n"
            r"- rank 1 has data \{'toy': '\w+'\}, rank 0 \{'toy': '\w+'\}$",
            error_of(job, rank),
        )


@pytest.fixture
def server(root: Path) -> Iterator[FileServer]:
    """Has the indices, and no tar for anyone who asks."""
    with run_server() as running:
        for tar in sorted((root / "toy").glob("*.tar")):
            for path in (tar, index_path(tar)):
                running.serve(f"toy/{path.name}", path.read_bytes())
            running.always[f"toy/{tar.name}"] = Reply(503)
        yield running


CAUSE = r"http://\S+toy/shard-00000\d\.tar: given up after \d+ attempts? in \d+ s; .* 503"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param("setup", {"num_proved": 4}, marks=pytest.mark.slow),
        ("step", {"num_proved": 0}),
    ],
)
def test_storage_that_fails_one_machine_ends_both(
    root: Path, server: FileServer, name: str, data: dict[str, Any]
) -> None:
    braces = root / "manifests-braces"
    job = two_machines(
        root, f"fails-{name}", root, server.address,
        manifest=str(manifest(braces)), on_fault="quarantine", **data,
    )  # fmt: skip
    assert start(job) == [1, 1]
    assert re.match(rf"CacheError: {CAUSE}", error_of(job, 1))
    assert re.match(
        rf"VipLlavaError: the data of other ranks cannot be used:\nrank 1: CacheError: {CAUSE}",
        error_of(job, 0),
    )
    assert not (root / job.name / "quarantine.jsonl").exists()


def test_storage_that_fails_the_planning_machine_ends_both(root: Path, server: FileServer) -> None:
    job = two_machines(
        root, "fails-plan", server.address, root,
        manifest=str(manifest(root / "manifests-braces")), num_proved=0, **PACKED,
    )  # fmt: skip
    assert start(job) == [1, 1]
    assert re.match(rf"CacheError: {CAUSE}", error_of(job, 0))
    assert re.match(
        rf"VipLlavaError: rank 0 could not plan the packs: CacheError: {CAUSE}", error_of(job, 1)
    )


def manifest(folder: Path) -> Path:
    """A manifest for folder and address alike: an address cannot be searched."""
    folder.mkdir(exist_ok=True)
    path = folder / "toy.yaml"
    path.write_text(
        "schema_version: 2\nname: toy\nstage: finetune\nlicence: none\n"
        "shards: toy/shard-{000000..000003}.tar\n"
    )
    return path
