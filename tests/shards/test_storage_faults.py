"""Storage that fails is no bad sample: it is tried again, and then the run ends."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from tests.files.cached_files import fetch
from tests.files.file_server import FileServer, Reply, run_server
from tests.toy_data import SIDE, make_manifest, toy_samples
from vipllava.conversation.encode import ConversationEncoder
from vipllava.files.cache import ShardCache, cache_name
from vipllava.files.locks import locked
from vipllava.files.openers import CacheError
from vipllava.files.retries import Patience
from vipllava.models.towers import CLIP
from vipllava.shards import tars as shard_tars
from vipllava.shards.tar_index import index_path
from vipllava.shards.tars import UnreadableError, write_shards
from vipllava.stream.batching import SampleBatches
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.loader import StepLoader, StepSampler
from vipllava.stream.order import Part, SampleOrder
from vipllava.stream.quarantine import BadSamplePolicy, QuarantineLog, read_quarantine
from vipllava.stream.sample_encoder import SampleEncoder, SampleSource
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import StorageError
from vipllava.visual_prompts.policies import VisualPromptPolicy

NUM_SAMPLES = 20
BRIEF = Patience(max_attempts=None, timeout_s=0.3, backoff_s=0.05, total_s=1.0)
"""Tries a second long, as a run tries ten minutes."""
LONG = Patience(max_attempts=None, timeout_s=0.3, backoff_s=0.05, total_s=60.0)
TAR = "toy/shard-000001.tar"

Stream = list[tuple[tuple[str, ...], int]]


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    return write_shards(toy_samples(NUM_SAMPLES), tmp_path / "toy", max_samples=8)


@pytest.fixture
def server(tars: list[Path]) -> Iterator[FileServer]:
    with run_server() as running:
        for tar in tars:
            for path in (tar, index_path(tar)):
                running.serve(f"toy/{path.name}", path.read_bytes())
        yield running


def open_dataset(
    encoder: ConversationEncoder, place: Path | str, patience: Patience, cache: Path | None = None
) -> VisualPromptDataset:
    pattern = {"shards": "toy/shard-{000000..000002}.tar"} if isinstance(place, str) else {}
    source = SampleSource.open(
        make_manifest(**pattern),
        place,
        seed=7,
        cache=None if cache is None else ShardCache(cache, 10**9, patience),
        patience=patience,
    )
    policies = {"regions": VisualPromptPolicy()}
    samples = SampleEncoder(
        policies, encoder, ImageTransform(SIDE, "pad", CLIP.preprocessing), seed=7
    )
    # Whatever may be substituted is.
    return VisualPromptDataset([source], samples, BadSamplePolicy("quarantine", 1.0))


def train(dataset: VisualPromptDataset, quarantine: Path, num_workers: int = 0) -> Stream:
    """Run through an epoch; what was quarantined lies in the file afterwards."""
    sizes = dataset.sources[0].shards.shard_sizes
    plan = SampleBatches(SampleOrder([Part("toy", sizes, NUM_SAMPLES)], 7), 4)
    log = QuarantineLog(quarantine, dataset.policy)
    loader = StepLoader(
        dataset,
        StepSampler(plan),
        dataset.sample_encoder.collator(),
        num_workers=num_workers,
        quarantine_log=log,
    )
    try:
        return [(batch.keys, batch.num_supervised_global) for batch in loader]
    finally:
        loader.close()


def fail(dataset: VisualPromptDataset, tmp_path: Path, num_workers: int = 0) -> StorageError:
    """Train into the fault; returns the error that ends it, within the time that is stated."""
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        train(dataset, tmp_path / "quarantine.jsonl", num_workers)
    # Far from the substitutes' 64 times the patience, and far enough for a loaded machine.
    assert time.monotonic() - began < 30
    assert not (tmp_path / "quarantine.jsonl").exists()
    return caught.value


@pytest.fixture
def whole(encoder: ConversationEncoder, tars: list[Path], tmp_path: Path) -> Stream:
    """What is consumed when nothing fails."""
    stream = train(open_dataset(encoder, tmp_path, BRIEF), tmp_path / "none.jsonl")
    assert sorted(key for keys, _ in stream for key in keys) == [
        f"toy/s{n:03d}" for n in range(NUM_SAMPLES)
    ]
    return stream


# A server.

FAULTS = {
    "the server answered 503": Reply(503),
    "no byte came within the time limit": Reply(hold_s=60),
    "no byte came within the time limit .after": Reply(wait_s=60),
    "the connection ended after": Reply(send=500),
}


@pytest.mark.parametrize("cause", FAULTS)
def test_a_server_that_fails_ends_the_run(
    encoder: ConversationEncoder, server: FileServer, tmp_path: Path, cause: str
) -> None:
    server.ranges = False
    dataset = open_dataset(encoder, server.address, BRIEF, tmp_path / "cache")
    server.always[TAR] = FAULTS[cause]
    error = fail(dataset, tmp_path)
    assert isinstance(error, CacheError)
    assert re.match(
        rf"{server.url(TAR)}: given up after \d+ attempts? in \d+ s; the last one: {cause}",
        str(error),
    )


def test_a_refused_connection_ends_the_run(
    encoder: ConversationEncoder, tars: list[Path], server: FileServer, tmp_path: Path
) -> None:
    with run_server() as gone:
        gone.files.update(server.files)
        dataset = open_dataset(encoder, gone.address, BRIEF, tmp_path / "cache")
    error = fail(dataset, tmp_path, num_workers=1)
    assert "Connection refused" in str(error)
    assert f"{gone.address}/toy/shard-" in str(error)


def test_a_command_that_fails_ends_the_run(
    encoder: ConversationEncoder, tars: list[Path], tmp_path: Path
) -> None:
    shards = [f"pipe:cat {tar.with_suffix('')}.tar" for tar in tars]
    source = SampleSource.open(
        make_manifest(shards=shards), tmp_path, 7, cache=ShardCache(tmp_path / "c", 10**9, BRIEF)
    )
    for copy in (tmp_path / "c").glob("*.tar"):
        copy.unlink()
    tars[1].rename(tmp_path / "away.tar")
    dataset = open_dataset(encoder, tmp_path, BRIEF)
    dataset = VisualPromptDataset([source], dataset.sample_encoder, dataset.policy)
    error = fail(dataset, tmp_path)
    assert re.match(rf"{shards[1]}: given up after .*the command ended with status 1", str(error))


class SilentStorage(fsspec.AbstractFileSystem):
    """Opens everything and never sends a byte."""

    protocol = "silent"
    cachable = False

    def _open(self, path: str, mode: str = "rb", **kwargs: object) -> Any:
        return SimpleNamespace(read=lambda size: threading.Event().wait(), close=lambda: None)


def test_a_storage_that_is_silent_is_given_up(tmp_path: Path) -> None:
    fsspec.register_implementation("silent", SilentStorage, clobber=True)
    cache = ShardCache(tmp_path, 10**9, BRIEF)
    with pytest.raises(CacheError, match=r"^silent://b/1\.tar: given up .* sent nothing for"):
        fetch(cache, "silent://b/1.tar")


def test_waiting_for_another_process_is_bounded(server: FileServer, tmp_path: Path) -> None:
    """It holds the lock of the file and does nothing, e.g. because it was stopped."""
    cache = ShardCache(tmp_path, 10**9, BRIEF)
    url = server.url(TAR)
    (tmp_path / ".locks").mkdir()
    with (
        locked(tmp_path / ".locks" / cache_name(url)),
        pytest.raises(CacheError, match=r"given up after 1 s of waiting for another process that"),
    ):
        fetch(cache, url)
    assert fetch(cache, url).read_bytes() == server.files[TAR]


def test_a_full_cache_disk_ends_the_run(
    encoder: ConversationEncoder,
    server: FileServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = open_dataset(encoder, server.address, BRIEF, tmp_path / "cache")
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = fail(dataset, tmp_path)
    assert re.search(r"no space left for it in the shard cache .* \(\d+ attempts? in", str(error))


@pytest.mark.parametrize(
    "replies", [[Reply(503)] * 6, [Reply(hold_s=1)] * 2, [Reply(send=500)] * 7]
)
def test_a_server_that_comes_back_changes_nothing(
    encoder: ConversationEncoder,
    server: FileServer,
    tmp_path: Path,
    whole: Stream,
    replies: list[Reply],
) -> None:
    dataset = open_dataset(encoder, server.address, LONG, tmp_path / "cache")
    server.replies[TAR] = list(replies)
    assert train(dataset, tmp_path / "q.jsonl", num_workers=1) == whole
    assert not (tmp_path / "q.jsonl").exists()
    assert len(server.asked(TAR)) == len(replies) + 1


# A disk.


def test_a_tar_that_is_gone_ends_the_run(
    encoder: ConversationEncoder, tars: list[Path], tmp_path: Path
) -> None:
    dataset = open_dataset(encoder, tmp_path, BRIEF)
    tars[1].unlink()
    error = fail(dataset, tmp_path, num_workers=1)
    assert re.match(
        rf"{tars[1]} cannot be read: .*No such file.*\(\d+ attempts in \d+ s\)\. Check the disk or",
        str(error),
    )


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_tar_that_cannot_be_read_ends_the_run(
    encoder: ConversationEncoder,
    tars: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    dataset = open_dataset(encoder, tmp_path, BRIEF)
    damage_reads(monkeypatch, dataset, code)
    error = fail(dataset, tmp_path)
    assert isinstance(error, UnreadableError)
    assert f"{tars[1]} cannot be read: [Errno {code}] {os.strerror(code)}" in str(error)


def damage_reads(monkeypatch: pytest.MonkeyPatch, dataset: VisualPromptDataset, code: int) -> None:
    """Let the kernel answer reads of one tar with an error, as a failing disk does."""
    shards = dataset.sources[0].shards
    inode = Path(shards.paths[1]).stat().st_ino
    pread = os.pread

    def fail_on_one(descriptor: int, size: int, offset: int) -> bytes:
        if os.fstat(descriptor).st_ino == inode:
            raise OSError(code, os.strerror(code))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(shard_tars.os, "pread", fail_on_one)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mount_that_comes_back_changes_nothing(
    encoder: ConversationEncoder,
    tars: list[Path],
    tmp_path: Path,
    whole: Stream,
    num_workers: int,
) -> None:
    dataset = open_dataset(encoder, tmp_path, LONG)
    (tmp_path / "toy").rename(tmp_path / "away")
    back = threading.Timer(0.5, (tmp_path / "away").rename, (tmp_path / "toy",))
    back.start()
    assert train(dataset, tmp_path / "q.jsonl", num_workers) == whole
    back.join()
    assert not (tmp_path / "q.jsonl").exists()


def test_a_damaged_tar_is_still_a_fault_of_the_data(
    encoder: ConversationEncoder, tars: list[Path], tmp_path: Path, whole: Stream
) -> None:
    """Cut short, and a byte changed: the same substitutes in every run."""
    dataset = open_dataset(encoder, tmp_path, BRIEF)
    shards = dataset.sources[0].shards
    os.truncate(tars[2], shards.record_offset(19))
    with tars[0].open("r+b") as file:
        file.seek(shards.record_offset(3))
        file.write(b"?")
    first = train(dataset, tmp_path / "a.jsonl")
    assert train(dataset, tmp_path / "b.jsonl") == first
    entries = read_quarantine(tmp_path / "a.jsonl")
    assert sorted((entry["key"], entry["fault"]) for entry in entries) == [
        ("s003", "shard-broken"), ("s019", "shard-broken"),
    ]  # fmt: skip
    good = [key for keys, _ in whole for key in keys]
    put = {f"toy/{entry['key']}": f"toy/{entry['substitute']}" for entry in entries}
    assert [key for keys, _ in first for key in keys] == [put.get(key, key) for key in good]
