"""Tars at an address: what is fetched, how often, and what is said when it is not there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.files.file_server import FileServer, Reply, run_server
from tests.toy_data import make_manifest, toy_samples
from vipllava.files.cache import CacheError, MissingError, ShardCache, cache_name
from vipllava.files.retries import Patience
from vipllava.shards.remote import expand_address, index_address
from vipllava.shards.tar_index import index_path
from vipllava.shards.tars import ShardError, ShardSet, open_shards, write_shards

PATTERN = "toy/shard-{000000..000002}.tar"
KEYS = [f"s{n:03d}" for n in range(20)]


@pytest.fixture(scope="module")
def server() -> Iterator[FileServer]:
    with run_server() as state:
        yield state


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**9, Patience(2, 5.0, 0.0))


@pytest.fixture
def tars(tmp_path: Path, server: FileServer) -> list[Path]:
    """The tars of a data set, served under ``toy/`` with their indices."""
    paths = write_shards(toy_samples(20), tmp_path / "here" / "toy", max_samples=8)
    for served in (server.files, server.replies, server.always, server.requests):
        served.clear()
    for path in (*paths, *map(index_path, paths)):
        server.serve(f"toy/{path.name}", path.read_bytes())
    return paths


def open_remote(server: FileServer, cache: ShardCache | None, **changes: Any) -> ShardSet:
    return open_shards(make_manifest(**{"shards": PATTERN, **changes}), server.address, cache=cache)


def fetched(server: FileServer) -> list[str]:
    return sorted(name.removeprefix("toy/shard-00000") for name, _ in server.requests)


def test_a_remote_data_set_is_the_local_one(
    server: FileServer, cache: ShardCache, tars: list[Path], tmp_path: Path
):
    local = open_shards(make_manifest(), tmp_path / "here")
    remote = open_remote(server, cache, num_samples=20)
    assert fetched(server) == ["0.index.npz", "1.index.npz", "2.index.npz"]  # and no tar
    assert remote.fingerprint == local.fingerprint
    assert list(remote.keys()) == KEYS
    assert (remote.index.samples == local.index.samples).all()
    for position in (19, 0, 9, 1):
        ours, theirs = remote.read(position), local.read(position)
        assert (ours.key, ours.record, ours.image) == (theirs.key, theirs.record, theirs.image)
    assert ours.shard == f"{server.address}/toy/shard-000000.tar"
    assert fetched(server)[1::2] == ["0.tar", "1.tar", "2.tar"]  # each once


def test_opened_again_nothing_is_asked(server: FileServer, cache: ShardCache, tars: list[Path]):
    first = open_remote(server, cache)
    for path in (cache.directory).glob("*.index.npz"):
        path.unlink()  # made room for others
    server.requests.clear()
    again = open_remote(server, cache)
    assert fetched(server) == []
    assert again.index.folder == first.index.folder
    assert again.index.folder is not None
    assert again.index.folder.parent == cache.directory / "index"


def test_an_address_in_the_manifest(server: FileServer, cache: ShardCache, tars: list[Path]):
    here = tars[0].parent.parent
    address = f"{server.address}/toy/shard-00000{{0..1}}.tar?key=1"
    manifest = make_manifest(shards=[address, "toy/shard-000002.tar"])
    shards = open_shards(manifest, here, cache=cache)
    assert list(shards.keys()) == KEYS
    assert shards.read(19).shard == tars[2]
    assert shards.fingerprint == open_shards(make_manifest(), here).fingerprint


def test_without_published_indices(server: FileServer, cache: ShardCache, tars: list[Path]):
    for path in map(index_path, tars):
        del server.files[f"toy/{path.name}"]
    shards = open_remote(server, cache)
    assert fetched(server) == [
        "0.index.npz", "0.tar", "1.index.npz", "1.tar", "2.index.npz", "2.tar",
    ]  # fmt: skip
    assert [shards.read(n).key for n in range(20)] == KEYS
    assert shards.index.folder is not None
    shutil.rmtree(shards.index.folder)  # as if the process had been killed before the end
    server.requests.clear()
    assert list(open_remote(server, cache).keys()) == KEYS
    assert fetched(server) == []  # what was made of each tar is kept


def test_storages_that_forbid_what_is_not_there(
    server: FileServer, cache: ShardCache, tars: list[Path]
):
    server.always["toy/shard-000001.index.npz"] = Reply(403)
    assert list(open_remote(server, cache).keys()) == KEYS


@pytest.mark.parametrize(
    "command", ["pipe:cat {here}/toy/shard-00000{{0..2}}.tar", "pipe:head -c-0 {here}/{x} | cat"]
)
@pytest.mark.parametrize("indexed", [True, False])
def test_commands(cache: ShardCache, tars: list[Path], command: str, indexed: bool):
    here = tars[0].parent.parent
    pattern = command.format(here=here, x="toy/shard-00000{0..2}.tar")
    if not indexed:
        for path in map(index_path, tars):
            path.unlink()
    shards = open_shards(make_manifest(shards=pattern), here, cache=cache)
    assert [shards.read(n).key for n in range(20)] == KEYS
    assert shards.fingerprint == open_shards(make_manifest(), here).fingerprint


# What can be wrong.


def test_no_cache(server: FileServer):
    with pytest.raises(ShardError, match="tars at an address and no cache: set cache_dir"):
        open_remote(server, None)


@pytest.mark.parametrize("pattern", ["toy/*.tar", "toy/shard-[0-9].tar"])
def test_wildcards(server: FileServer, cache: ShardCache, pattern: str):
    with pytest.raises(ShardError, match=r"http://.*tar has a wildcard.* with braces"):
        open_remote(server, cache, shards=pattern)


def test_no_tar_there(server: FileServer, cache: ShardCache, tars: list[Path]):
    with pytest.raises(MissingError, match=r"toy/shard-000003\.tar: .*404"):
        open_remote(server, cache, shards=PATTERN.replace("2}", "3}"))


def test_a_server_that_fails(server: FileServer, cache: ShardCache, tars: list[Path]):
    server.always["toy/shard-000001.index.npz"] = Reply(500)
    with pytest.raises(CacheError, match=r"http://.*toy/shard-000001\.index\.npz"):
        open_remote(server, cache)
    del server.always["toy/shard-000001.index.npz"]
    assert list(open_remote(server, cache).keys()) == KEYS


def test_a_published_index_that_is_none(server: FileServer, cache: ShardCache, tars: list[Path]):
    good = server.files["toy/shard-000001.index.npz"]
    server.files["toy/shard-000001.index.npz"] = b"<html>welcome</html>"
    with pytest.raises(
        ShardError, match=r"http://.*000001\.index\.npz is not a shard index .*`vipllava shards in"
    ):
        open_remote(server, cache)
    server.files["toy/shard-000001.index.npz"] = good
    assert list(open_remote(server, cache).keys()) == KEYS  # no copy of the bad one stayed


def test_a_tar_that_is_not_the_indexed_one(server: FileServer, cache: ShardCache, tars: list[Path]):
    shards = open_remote(server, cache)
    body = server.files["toy/shard-000001.tar"]
    server.files["toy/shard-000001.tar"] = body[:-512]
    with pytest.raises(CacheError, match=rf"000001\.tar: .*{len(body)} were expected.*its index"):
        shards.read(8)
    assert shards.read(7).key == "s007"
    server.files["toy/shard-000001.tar"] = body
    assert shards.read(8).key == "s008"


def test_a_copy_that_was_damaged(server: FileServer, cache: ShardCache, tars: list[Path]):
    shards = open_remote(server, cache)
    shards.read(0)
    copy = cache.directory / cache_name(str(shards.paths[0]))
    data = bytearray(copy.read_bytes())
    data[shards.record_offset(2) + 5] ^= 1
    copy.write_bytes(data)
    with pytest.raises(
        ShardError, match=rf"http://.*record of sample `s002`.*Delete .*{copy.name}"
    ):
        open_remote(server, cache).read(2)


def test_one_key_in_two_addresses(server: FileServer, cache: ShardCache, tars: list[Path]):
    for end in (".tar", ".index.npz"):
        server.serve(f"toy/again{end}", server.files[f"toy/shard-000000{end}"])
    with pytest.raises(
        ShardError, match=r"`s000` is in http://.*000000\.tar and in http://.*again"
    ):
        open_remote(server, cache, shards=[PATTERN, "toy/again.tar"])


def test_a_cache_that_is_too_small_for_all(server: FileServer, tars: list[Path], tmp_path: Path):
    """Copies make room for each other between any two reads."""
    largest = max(path.stat().st_size for path in tars)
    small = ShardCache(tmp_path / "small", largest + 100, Patience(2, 5.0, 0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vipllava.shards.tars._OPEN_CACHED", 1)
        shards = open_remote(server, small)
        order = np.random.default_rng(0).permutation(20).tolist()
        assert [shards.read(n).key for n in order] == [KEYS[n] for n in order]


def test_prefetching(server: FileServer, cache: ShardCache, tars: list[Path]):
    shards = open_remote(server, cache)
    shards.prefetch([1])
    copy = cache.directory / cache_name(str(shards.paths[1]))
    for _ in range(500):
        if copy.exists():
            break
        time.sleep(0.01)
    server.requests.clear()
    assert shards.read(8).key == "s008"
    assert fetched(server) == []


def test_addresses():
    assert expand_address("s3://b/x-{0..1}.tar", "toy") == ["s3://b/x-0.tar", "s3://b/x-1.tar"]
    assert index_address("https://h/a.tar?k=1") == "https://h/a.index.npz?k=1"
    assert index_address("pipe:cat /a.tar | tee") == "pipe:cat /a.index.npz | tee"
    assert index_address("pipe:cat /a.tar.gz") == "pipe:cat /a.index.npz.gz"
    assert index_address("pipe:cat /b.tar/a.tar") is None
    assert index_address("pipe:make-tar 7") is None
