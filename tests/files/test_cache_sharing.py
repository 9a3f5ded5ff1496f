"""One shard cache for several real processes, some of which get killed."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.files.cached_files import (
    QUICK,
    ROOMY,
    SIZE,
    body,
    fetch,
    names,
    parts,
    read,
    until,
)
from tests.files.file_server import FileServer, Reply, run_server
from vipllava.files import cache as shard_cache
from vipllava.files.cache import ShardCache, cache_name
from vipllava.files.locks import locked

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def server() -> Iterator[FileServer]:
    with run_server() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(folder: Path) -> ShardCache:
    return ShardCache(folder, ROOMY, QUICK)


def _read_one(cache: ShardCache, url: str) -> None:
    read(cache, url)


def _read_files(cache: ShardCache, urls: list[str], answer: Any) -> None:
    answer.put([hashlib.sha256(read(cache, url)).hexdigest() for url in urls])


def _prefetch_and_read(cache: ShardCache, urls: list[str], answer: Any) -> None:
    cache.prefetch(urls)
    _read_files(cache, urls, answer)


def run_all(target: Callable[..., None], jobs: list[tuple[Any, ...]]) -> list[list[str]]:
    answer = SPAWN.Queue()
    processes: list[BaseProcess] = [
        SPAWN.Process(target=target, args=(*job, answer)) for job in jobs
    ]
    for process in processes:
        process.start()
    answers = [answer.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return answers


def test_two_jobs_fetch_each_file_once(server: FileServer, cache: ShardCache, folder: Path) -> None:
    urls = [server.serve(f"{n}.tar", body(n), Reply(wait_s=0.02)) for n in range(6)]
    jobs = [(cache, urls), (cache, urls), (cache, urls[3:] + urls[:3])]
    answers = run_all(_prefetch_and_read, jobs)
    expected = Counter(hashlib.sha256(body(n)).hexdigest() for n in range(6))
    assert [Counter(answer) for answer in answers] == [expected] * 3
    assert Counter(path for path, _ in server.requests) == {f"{n}.tar": 1 for n in range(6)}
    assert (len(names(folder)), parts(folder)) == (6, [])


def test_two_jobs_in_a_small_cache(server: FileServer, folder: Path) -> None:
    """They drive each other's files out all the time; none is lost, and the bound holds."""
    cache = ShardCache(folder, SIZE, QUICK)
    urls = [server.serve(f"{n}.tar", body(n), Reply(status=503)) for n in range(6)]
    fetch(cache, urls[0])
    ended = threading.Event()
    largest = 0

    def watch() -> None:
        nonlocal largest
        while not ended.wait(0.002):
            with locked(folder / ".lock"):
                largest = max(largest, sum(s.st_size for *_, s in shard_cache._held(folder)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        answers = run_all(_read_files, [(cache, urls * 4), (cache, urls[::-1] * 4)])
    finally:
        ended.set()
        watcher.join()
    digests = [hashlib.sha256(body(n)).hexdigest() for n in range(6)]
    assert sorted(answers) == sorted([digests * 4, digests[::-1] * 4])
    assert 0 < largest <= SIZE
    assert parts(folder) == []


@pytest.fixture
def killed(server: FileServer, cache: ShardCache, folder: Path) -> str:
    """The address of a file whose download died with its process."""
    url = server.serve("1.tar", body(1), Reply(wait_s=60))
    process = SPAWN.Process(target=_read_one, args=(cache, url))
    process.start()
    part = folder / ".incoming" / f".{cache_name(url)}.part"
    until(lambda: part.exists() and part.stat().st_size == SIZE // 2)
    process.kill()
    process.join(30)
    assert process.exitcode == -9
    assert names(folder) == []
    return url


def test_a_killed_download_goes_on(
    server: FileServer, cache: ShardCache, folder: Path, killed: str
) -> None:
    assert read(cache, killed, SIZE) == body(1)
    assert server.asked("1.tar") == [None, f"bytes={SIZE // 2}-"]
    assert parts(folder) == []


def test_what_a_killed_download_left_is_removed(
    server: FileServer, cache: ShardCache, folder: Path, killed: str
) -> None:
    left = parts(folder)
    fetch(cache, server.serve("2.tar", body(2)))
    assert parts(folder) == left  # it may still go on
    for part in left:
        os.utime(part, (1, 1))
    fetch(cache, server.serve("3.tar", body(3)))
    assert parts(folder) == []
    assert read(cache, killed) == body(1)


def test_what_a_killed_download_left_makes_room(
    server: FileServer, folder: Path, killed: str
) -> None:
    cache = ShardCache(folder, SIZE, QUICK)
    fetch(cache, server.serve("2.tar", body(2)))
    assert (names(folder), parts(folder)) == (["2.tar"], [])


def test_no_sample_is_lost_or_doubled(server: FileServer, folder: Path) -> None:
    """Tars of samples through all faults at once, in a cache that holds two of them."""
    faults = [
        [Reply(status=500)],
        [Reply(send=700)],
        [Reply(send=700, claim=700)],
        [Reply(send=5120, claim=-1), Reply(status=503)],
        [Reply(pieces=5, wait_s=0.02)],
        [],
    ]
    sizes: dict[str, int] = {}
    for number, replies in enumerate(faults):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for row in range(5):
                data = json.dumps({"id": f"{number}-{row}"}).encode()
                member = tarfile.TarInfo(f"{number}-{row}.json")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        sizes[server.serve(f"{number}.tar", buffer.getvalue(), *replies)] = buffer.tell()
    cache = ShardCache(folder, 2 * max(sizes.values()), QUICK)
    found: Counter[str] = Counter()
    cache.prefetch(list(sizes))
    for url, size in sizes.items():
        with cache.open(url, size=size) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                found[json.load(content)["id"]] += 1
    assert found == {f"{number}-{row}": 1 for number in range(6) for row in range(5)}
