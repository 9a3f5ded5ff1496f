"""The shard cache against a real server on loopback: faults, room, and fetching ahead."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
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
from vipllava.files import openers
from vipllava.files.cache import CacheError, MissingError, ShardCache, cache_name
from vipllava.files.retries import Patience
from vipllava.types import ConfigError


@pytest.fixture
def server() -> Iterator[FileServer]:
    with run_server() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(folder: Path) -> Iterator[ShardCache]:
    yield ShardCache(folder, ROOMY, QUICK)
    until(lambda: not prefetching())


# One file.


def test_a_file_is_fetched_once(server: FileServer, cache: ShardCache, folder: Path) -> None:
    url = server.serve("set/0001.tar", body(1))
    path = fetch(cache, url, size=SIZE)
    assert path == folder / cache_name(url)
    assert path.read_bytes() == body(1)
    assert read(cache, url) == read(cache, url, SIZE) == body(1)
    assert len(server.requests) == 1
    assert parts(folder) == []


def test_names_tell_addresses_apart() -> None:
    urls = [
        "https://h/a/0001.tar",
        "https://h/a/0001.index.npz",
        "https://h/b/0001.tar",
        "https://h/a/0001.tar?v=2",
        "https://h/a/0001.tar?v=2/x",
        "s3://h/a/0001.tar",
        "https://h/a/%30001.tar",
        "https://h/a/0_01.tar",
        "https://h/a/0@01.tar",
        "pipe:aws s3 cp s3://h/a/0001.tar -",
        "pipe:gzip -cd /a/0001.tar",
        "pipe:make-shard 1",
        "https://h",
    ]
    made = [cache_name(url) for url in urls]
    assert len(set(made)) == len(urls)
    assert [name[17:] for name in made[-4:]] == ["0001.tar", "0001.tar", "pipe", "h"]
    assert len(cache_name(f"https://h/{'x' * 3000}.tar")) < 200


def test_nothing_under_the_address(server: FileServer, cache: ShardCache, folder: Path) -> None:
    with pytest.raises(MissingError) as caught:
        cache.open(server.url("0001.index.npz"))
    assert str(caught.value) == (
        f"{server.url('0001.index.npz')}: the server answered 404 Not Found at attempt 1 and was "
        "not asked again; correct `shards` in the manifest, or the data root"
    )
    assert len(server.requests) == 1
    assert (names(folder), parts(folder)) == ([], [])


def test_access_denied_is_not_missing(server: FileServer, cache: ShardCache) -> None:
    url = server.serve("a.tar", body(1), always=Reply(status=403))
    with pytest.raises(CacheError, match=r"answered 403 .*wants a login") as caught:
        fetch(cache, url)
    assert not isinstance(caught.value, MissingError)


def test_a_failing_server_that_recovers(server: FileServer, cache: ShardCache) -> None:
    url = server.serve("a.tar", body(1), Reply(status=500), Reply(status=503))
    assert read(cache, url, SIZE) == body(1)
    assert len(server.requests) == 3


def test_a_server_that_keeps_failing(server: FileServer, cache: ShardCache, folder: Path) -> None:
    url = server.serve("a.tar", body(1), always=Reply(status=500))
    with pytest.raises(CacheError) as caught:
        fetch(cache, url)
    assert re.match(
        rf"{url}: given up after 3 attempts in \d+ s; the last one: the server answered 500",
        str(caught.value),
    )
    assert str(folder) in str(caught.value)
    assert len(server.requests) == 3
    assert (names(folder), parts(folder)) == ([], [])


def test_a_dribbling_server_is_waited_for(server: FileServer, folder: Path) -> None:
    url = server.serve("a.tar", body(1), Reply(pieces=8, wait_s=0.05))
    assert read(ShardCache(folder, ROOMY, Patience(1, timeout_s=2)), url) == body(1)


def test_a_silent_server_is_not(server: FileServer, folder: Path) -> None:
    url = server.serve("a.tar", body(1), always=Reply(wait_s=30))
    server.ranges = False
    cache = ShardCache(folder, ROOMY, Patience(max_attempts=2, timeout_s=0.2, backoff_s=0))
    with pytest.raises(CacheError, match=r"after 2 attempts.*no byte came within the time limit"):
        fetch(cache, url)
    assert names(folder) == []


def test_cut_off_with_the_right_length(server: FileServer, cache: ShardCache) -> None:
    url = server.serve("a.tar", body(1), Reply(send=1000), Reply(send=SIZE // 2))
    assert read(cache, url) == body(1)
    assert server.asked("a.tar") == [None, "bytes=1000-", f"bytes={1000 + SIZE // 2}-"]


@pytest.mark.parametrize(("claim", "verb"), [(1000, "were announced"), (-1, "came")])
def test_cut_off_with_a_wrong_length(
    server: FileServer, cache: ShardCache, folder: Path, claim: int, verb: str
) -> None:
    """The announced length says nothing; only what the index says of the tar does."""
    url = server.serve("a.tar", body(1), Reply(send=1000, claim=claim))
    assert read(cache, url, SIZE) == body(1)
    server.always["b.tar"] = Reply(send=1000, claim=claim)
    url = server.serve("b.tar", body(2))
    with pytest.raises(CacheError) as caught:
        fetch(cache, url, size=SIZE)
    assert re.match(
        rf"{url}: given up after 3 attempts in \d+ s; the last one: 1000 bytes {verb} where {SIZE} "
        r"were expected\. Check address and network",
        str(caught.value),
    )
    assert len(server.asked("b.tar")) == 3
    assert (names(folder), parts(folder)) == (["a.tar"], [])


def test_an_empty_answer_is_not_kept(server: FileServer, cache: ShardCache, folder: Path) -> None:
    with pytest.raises(CacheError, match=r"after 3 attempts .* the last one: nothing came"):
        fetch(cache, server.serve("a.tar", b""))
    assert names(folder) == []


def test_another_size_than_before(server: FileServer, cache: ShardCache) -> None:
    url = server.serve("a.tar", body(1)[:100])
    fetch(cache, url)
    server.serve("a.tar", body(2))
    assert read(cache, url, SIZE) == body(2)


def test_it_travels_to_workers(server: FileServer, cache: ShardCache) -> None:
    url = server.serve("a.tar", body(1))
    cache.prefetch([url])
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.directory, copy.max_bytes, copy.patience) == (cache.directory, ROOMY, QUICK)
    assert read(copy, url) == body(1)


def test_a_cache_without_room() -> None:
    with pytest.raises(ConfigError, match="0 bytes holds nothing"):
        ShardCache(Path("cache"), 0)


# Other openers.


def test_the_output_of_a_command(cache: ShardCache, tmp_path: Path) -> None:
    source = tmp_path / "0001.tar"
    source.write_bytes(body(1) * 200)  # more than a pipe holds
    assert read(cache, f"pipe:cat {source}") == body(1) * 200


@pytest.mark.parametrize(
    ("ending", "cause"),
    [("; exit 3", "status 3"), ("; kill -PIPE $$", "status -13"), ("; exit 141", "status 141")],
)
def test_a_command_that_fails(
    cache: ShardCache, folder: Path, tmp_path: Path, ending: str, cause: str
) -> None:
    (tmp_path / "0001.tar").write_bytes(body(1))
    log_file = tmp_path / "runs"
    url = f"pipe:echo run >> {log_file}; cat {tmp_path}/0001.tar{ending}"
    with pytest.raises(CacheError) as caught:
        fetch(cache, url)
    assert re.match(
        rf"{re.escape(url)}: given up after 3 attempts in \d+ s; the last one: the command "
        rf"ended with {cause}",
        str(caught.value),
    )
    assert log_file.read_text() == "run\n" * 3
    assert (names(folder), parts(folder)) == ([], [])


def test_a_command_that_says_nothing(folder: Path) -> None:
    cache = ShardCache(folder, ROOMY, Patience(max_attempts=1, timeout_s=0.1))
    with pytest.raises(CacheError, match=r"printed nothing for 0\.1 seconds"):
        fetch(cache, "pipe:echo 1; exec sleep 30")


def test_a_command_that_does_not_end(folder: Path) -> None:
    cache = ShardCache(folder, ROOMY, Patience(max_attempts=1, timeout_s=0.1))
    with pytest.raises(CacheError, match=r"does not end 0\.1 seconds after"):
        fetch(cache, "pipe:echo 1; exec sleep 30 >&-")


class FlakyStorage(fsspec.AbstractFileSystem):
    """Breaks off in the middle of the first reads; what it was asked is in ``opened``."""

    protocol = "flaky"
    opened: list[str]
    breaks: int
    cachable = False

    def _open(self, path: str, mode: str = "rb", **kwargs: object) -> io.BufferedIOBase:
        type(self).opened.append(path)
        if "absent" in path:
            raise FileNotFoundError(path)
        if len(type(self).opened) > type(self).breaks:
            return io.BytesIO(body(1))
        broken = io.BytesIO(body(1)[:100])
        reads = iter([broken.getvalue()])

        def read_once(_: int = -1) -> bytes:
            for chunk in reads:
                return chunk
            raise TimeoutError("the storage is silent")

        broken.read = read_once  # type: ignore[method-assign]
        return broken


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> type[FlakyStorage]:
    fsspec.register_implementation("flaky", FlakyStorage, clobber=True)
    FlakyStorage.opened, FlakyStorage.breaks = [], 0
    return FlakyStorage


def test_other_storages(cache: ShardCache, storage: type[FlakyStorage], folder: Path) -> None:
    storage.breaks = 2
    assert read(cache, "flaky://b/0001.tar", SIZE) == body(1)
    assert len(storage.opened) == 3
    storage.breaks = 99
    with pytest.raises(
        CacheError, match=r"^flaky://b/2.tar: given up after 3 .*the storage is silent"
    ):
        fetch(cache, "flaky://b/2.tar")
    with pytest.raises(MissingError, match=r"^flaky://b/absent.tar: there is nothing"):
        fetch(cache, "flaky://b/absent.tar")
    assert (names(folder), parts(folder)) == (["0001.tar"], [])


def test_a_storage_that_is_not_installed(
    cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(CacheError, match=r"^s3://b/1.tar: .*pip install 'vipllava-lightning\[s3\]"):
        fetch(cache, "s3://b/1.tar")
    with pytest.raises(CacheError, match=r"^nosuch://b/1.tar: Protocol not known: nosuch"):
        fetch(cache, "nosuch://b/1.tar")


# Room.


def test_what_was_used_longest_ago_goes(server: FileServer, folder: Path) -> None:
    cache = ShardCache(folder, 3 * SIZE, QUICK)
    urls = [server.serve(f"{n}.tar", body(n)) for n in range(5)]
    (folder / "sub").mkdir(parents=True)
    (folder / "somebody's").write_bytes(bytes(10 * SIZE))
    for url in urls[:3]:
        fetch(cache, url)
    read(cache, urls[0])
    fetch(cache, urls[3])
    assert names(folder) == ["0.tar", "2.tar", "3.tar"]
    fetch(cache, urls[4])
    assert names(folder) == ["0.tar", "3.tar", "4.tar"]
    assert (folder / "somebody's").exists()
    assert {path.name[17:] for path in (folder / ".locks").iterdir()} == {"0.tar", "3.tar", "4.tar"}


def test_a_reader_keeps_its_file(server: FileServer, folder: Path) -> None:
    cache = ShardCache(folder, SIZE, QUICK)
    with cache.open(server.serve("1.tar", body(1))) as file:
        half = file.read(SIZE // 2)
        fetch(cache, server.serve("2.tar", body(2)))
        assert names(folder) == ["2.tar"]
        assert half + file.read() == body(1)


@pytest.mark.parametrize("size", [None, SIZE])
def test_a_file_larger_than_the_cache(server: FileServer, folder: Path, size: int | None) -> None:
    cache = ShardCache(folder, SIZE - 1, QUICK)
    url = server.serve("1.tar", body(1))
    with pytest.raises(CacheError, match=f"^{url} has {SIZE} bytes or more, the shard cache .* ma"):
        fetch(cache, url, size=size)
    assert len(server.requests) == (0 if size else 1)
    assert names(folder) == []
    assert size or parts(folder) == []


def test_a_full_disk(
    server: FileServer, cache: ShardCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(cache, server.serve("0.tar", body(0)))
    url = server.serve("1.tar", body(1))
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(folder)._replace(free=1234)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CacheError) as caught:
            fetch(cache, url)
    assert re.fullmatch(
        rf"{url}: no space left for it in the shard cache {folder} \(3 attempts in \d+ s\): 1234 "
        rf"bytes are free, the cache holds {SIZE} of at most {ROOMY}\. Free some space there, "
        r"allow the cache less, or put it on another disk\. Nothing partial was left",
        str(caught.value),
    )
    assert (names(folder), parts(folder)) == (["0.tar"], [])
    assert read(cache, url) == body(1)


def test_a_disk_that_fills_up(
    cache: ShardCache, folder: Path, storage: type[FlakyStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(openers.os, "fsync", full)
    with pytest.raises(CacheError, match=r"^flaky://b/1.tar: no space left for it"):
        fetch(cache, "flaky://b/1.tar")
    assert (names(folder), parts(folder)) == ([], [])


def test_a_folder_that_cannot_be(cache: ShardCache, folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(CacheError, match=f"^https://h/1.tar: the shard cache {folder} cannot be u"):
        fetch(cache, "https://h/1.tar")


# Ahead.


def test_prefetched_files_are_there(server: FileServer, cache: ShardCache, folder: Path) -> None:
    urls = [server.serve(f"{n}.tar", body(n)) for n in range(4)]
    cache.prefetch(urls)
    until(lambda: folder.exists() and len(names(folder)) == 4)
    assert [read(cache, url) for url in urls] == [body(n) for n in range(4)]
    assert len(server.requests) == 4


def test_get_waits_for_the_file_under_way(server: FileServer, cache: ShardCache) -> None:
    url = server.serve("1.tar", body(1), Reply(wait_s=0.2))
    cache.prefetch([url])
    until(lambda: server.requests)
    assert read(cache, url) == body(1)
    assert len(server.requests) == 1


def test_what_could_not_be_prefetched_is_tried_again(
    server: FileServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    bad = server.serve("1.tar", body(1), *[Reply(status=500)] * 4)
    good = server.serve("2.tar", body(2))
    with caplog.at_level(logging.WARNING):
        cache.prefetch([bad, good])
        until(lambda: server.asked("2.tar"))
    failures = [line for line in caplog.messages if "trying again" not in line]
    assert [line.split(": given")[0] for line in failures] == [f"prefetch: {bad}"]
    assert read(cache, bad) == body(1)
    assert len(server.asked("1.tar")) == 5
    missing = server.url("3.tar")
    with caplog.at_level(logging.CRITICAL):
        cache.prefetch([missing])
        with pytest.raises(MissingError):
            cache.open(missing)


def test_a_newer_list_replaces_the_rest(
    server: FileServer, cache: ShardCache, folder: Path
) -> None:
    first = server.serve("1.tar", body(1), Reply(wait_s=0.2))
    cache.prefetch([first, server.serve("2.tar", body(2))])
    until(lambda: server.requests)
    cache.prefetch([server.serve("3.tar", body(3))])
    until(lambda: names(folder) == ["1.tar", "3.tar"])
    assert server.asked("2.tar") == []


def test_prefetching_leaves_room(server: FileServer, folder: Path) -> None:
    cache = ShardCache(folder, 4 * SIZE, QUICK)
    urls = [server.serve(f"{n}.tar", body(n)) for n in range(6)]
    cache.prefetch(urls)
    until(lambda: len(server.requests) == 2 and not prefetching())
    assert names(folder) == ["0.tar", "1.tar"]
    cache.prefetch(urls[1:])
    until(lambda: len(server.requests) == 3 and not prefetching())
    assert names(folder) == ["0.tar", "1.tar", "2.tar"]


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shard-prefetch"]
