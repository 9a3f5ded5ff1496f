"""The index of a whole data set: made once, found again, and made anew when a file changed."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.shards.tar_files import write_tar
from tests.toy_data import make_manifest, toy_samples
from vipllava.files import atomic
from vipllava.shards import dataset_index
from vipllava.shards import tar_index as shard_index
from vipllava.shards.dataset_index import DatasetIndex, open_dataset_index
from vipllava.shards.tar_index import SAMPLE, SampleRow, ShardError, ShardIndex, index_path
from vipllava.shards.tars import ShardSet, open_shards, write_shards


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    return write_shards(toy_samples(20), tmp_path / "toy", max_samples=8)


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vipllava" / "index"


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".vipllava").iterdir() if path.is_dir())


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every index that is joined."""
    builds: list[int] = []
    join = DatasetIndex.join.__func__  # type: ignore[attr-defined]

    def counted(cls: type[DatasetIndex], indices: list[ShardIndex]) -> DatasetIndex:
        builds.append(len(indices))
        return join(cls, indices)

    monkeypatch.setattr(DatasetIndex, "join", classmethod(counted))
    return builds


def test_columns_are_those_of_the_tars(tmp_path: Path, tars: list[Path]):
    index = open_shards(make_manifest(), tmp_path).index
    parts = [shard_index.load_index(index_path(tar), tar) for tar in tars]
    assert (index.samples == np.concatenate([part.samples for part in parts])).all()
    assert index.tars["sample_end"].tolist() == [8, 16, 20]
    assert index.tars["tar_size"].tolist() == [tar.stat().st_size for tar in tars]
    keys = [key for key, *_ in toy_samples(20)]
    assert [index.key(n // 8, n) for n in range(20)] == keys
    assert [key.decode() for tar in range(3) for key in index.tar_keys(tar)] == keys
    assert folders(tmp_path) == [index.folder.name]  # type: ignore[union-attr]


def test_it_is_made_once(tmp_path: Path, tars: list[Path], monkeypatch: pytest.MonkeyPatch):
    builds = count_builds(monkeypatch)
    first = open_shards(make_manifest(), tmp_path)
    second = open_shards(make_manifest(), tmp_path)
    assert builds == [3]
    assert second.index.folder == first.index.folder
    assert second.fingerprint == first.fingerprint


def test_a_data_set_that_moves_keeps_its_index(
    tmp_path: Path, tars: list[Path], monkeypatch: pytest.MonkeyPatch
):
    open_shards(make_manifest(), tmp_path)
    builds = count_builds(monkeypatch)
    (tmp_path / "new").mkdir()
    for name in ("toy", ".vipllava"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    assert open_shards(make_manifest(), tmp_path / "new").read(19).key == "s019"
    assert builds == []


def test_a_changed_index_is_noticed(tmp_path: Path, tars: list[Path]):
    before = open_shards(make_manifest(), tmp_path)
    shutil.rmtree(tmp_path / "toy")
    samples = [(key.replace("s", "t"), *rest) for key, *rest in toy_samples(20)]
    write_shards(samples, tmp_path / "toy", max_samples=8)  # type: ignore[arg-type]
    after = open_shards(make_manifest(), tmp_path)
    assert (before.key(3), after.key(3)) == ("s003", "t003")
    assert before.fingerprint != after.fingerprint


def test_a_tar_that_was_cut_off_later_is_noticed(tmp_path: Path, tars: list[Path]):
    open_shards(make_manifest(), tmp_path)
    tars[1].write_bytes(tars[1].read_bytes()[:-512])
    with pytest.raises(ShardError, match=r"000001\.index\.npz is the index of another tar, or sh"):
        open_shards(make_manifest(), tmp_path)


def test_missing_indices_are_made_first(tmp_path: Path, tars: list[Path]):
    wanted = open_shards(make_manifest(), tmp_path)
    index_path(tars[0]).unlink()
    index_path(tars[2]).unlink()
    shards = open_shards(make_manifest(), tmp_path)
    assert (shards.index.samples == wanted.index.samples).all()
    assert shards.fingerprint == wanted.fingerprint
    assert shard_index.load_index(index_path(tars[2]), tars[2]).samples["text_tokens"].all()
    again = open_shards(make_manifest(), tmp_path)
    assert again.index.folder == shards.index.folder  # of the indices as they are now


def test_tars_that_keep_changing(tmp_path: Path, tars: list[Path]):
    def load(paths: Any) -> list[ShardIndex]:
        index_path(tars[0]).touch()
        return [shard_index.ensure_index(path) for path in paths]

    with pytest.raises(ShardError, match=r"shard-000000\.tar and others keep changing"):
        open_dataset_index("toy", tars, homes=[tmp_path / "home"], load=load)


def test_a_read_only_data_root(
    tmp_path: Path, tars: list[Path], user_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / ".vipllava").write_text("in the way")
    builds = count_builds(monkeypatch)
    shards = open_shards(make_manifest(), tmp_path)
    assert shards.index.folder is not None
    assert shards.index.folder.is_relative_to(user_cache)
    assert open_shards(make_manifest(), tmp_path).index.folder == shards.index.folder
    assert builds == [3]


def test_nowhere_to_write(
    tmp_path: Path, tars: list[Path], user_cache: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / ".vipllava").write_text("in the way")
    user_cache.parent.parent.write_text("in the way")
    shards = open_shards(make_manifest(), tmp_path)
    assert shards.index.folder is None
    assert "keeps it in memory" in caplog.text
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(19).key == "s019"
    assert copy.fingerprint == shards.fingerprint


@pytest.mark.parametrize("damage", ["cut", "emptied", "other", "gone"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, tars: list[Path], damage: str):
    folder = open_shards(make_manifest(), tmp_path).index.folder
    assert folder is not None
    samples = folder / "samples.npy"
    if damage == "cut":
        samples.write_bytes(samples.read_bytes()[:-35])
    elif damage == "emptied":
        samples.write_bytes(b"")
    elif damage == "other":
        np.save(samples, np.zeros(20))
    else:
        samples.unlink()
        (folder / "tars.npy").unlink()
        (folder / "keys.npy").unlink()
        folder.rmdir()
    assert open_shards(make_manifest(), tmp_path).read(19).key == "s019"
    assert DatasetIndex.open(folder).samples["text_tokens"].all()


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, tars: list[Path], user_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert open_shards(make_manifest(), tmp_path).index.folder is None
    assert [path for path in tmp_path.rglob("*.npy")] == []
    assert [path for path in tmp_path.rglob("*.unfinished")] == []


def test_what_a_killed_build_left_is_removed(tmp_path: Path, tars: list[Path]):
    home = tmp_path / ".vipllava"
    left, other = (
        home / f".toy-{'a' * 16}.1-x.unfinished",
        home / f".toy-b-{'a' * 16}.1-x.unfinished",
    )
    for folder in (left, other):
        folder.mkdir(parents=True)
    open_shards(make_manifest(), tmp_path)
    assert not left.exists()
    assert other.exists()  # of the data set `toy-b`, which may be at work


def test_without_locks_it_may_be_another_build_under_way(
    tmp_path: Path, tars: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    building = tmp_path / ".vipllava" / f".toy-{'a' * 16}.1-x.unfinished"
    building.mkdir(parents=True)
    assert open_shards(make_manifest(), tmp_path).index.folder is not None
    assert building.exists()


# Keys.


def index_of(*keys: str) -> ShardIndex:
    ends = np.cumsum([len(key) for key in keys])
    rows = [SampleRow(int(end), 1, 2, 3) for end in ends]
    joined = np.frombuffer("".join(keys).encode(), dtype=np.uint8)
    return ShardIndex(1024, 0, joined, np.array(rows, dtype=SAMPLE))


def test_a_key_in_two_tars(monkeypatch: pytest.MonkeyPatch):
    index = DatasetIndex.join([index_of("a", "b"), index_of("c"), index_of("d", "b", "e")])
    assert index.find_duplicate() == ("b", 0, 2)
    index = DatasetIndex.join([index_of("a", "b"), index_of("ab"), index_of("ba", "bb")])
    assert index.find_duplicate() is None
    monkeypatch.setattr(dataset_index, "hash", lambda key: len(key) % 2, raising=False)
    assert index.find_duplicate() is None  # equal hashes of different keys
    index = DatasetIndex.join([index_of("a", "b"), index_of("ab", "b")])
    assert index.find_duplicate() == ("b", 0, 1)


def test_nothing_is_kept_of_a_set_with_a_key_twice(tmp_path: Path):
    write_tar(tmp_path / "toy" / "a.tar", {"same.json": b"{}"})
    write_tar(tmp_path / "toy" / "b.tar", {"other.json": b"{}", "same.json": b"{}"})
    for _ in range(2):
        with pytest.raises(ShardError, match=r"`same` is in .*a\.tar and in .*b\.tar; keys are un"):
            open_shards(make_manifest(), tmp_path)
    assert folders(tmp_path) == []


# Processes and threads.


def read_all(shards: ShardSet, answers: Any) -> None:
    answers.put([shards.read(position).key for position in range(len(shards))])
    answers.put(shards.index.folder)
    answers.put(type(shards.index.samples.base).__name__)


def open_and_read(root: Path, barrier: Any, answers: Any) -> None:
    barrier.wait()
    shards = open_shards(make_manifest(), root)
    answers.put((list(shards.keys()), shards.index.folder))


def test_a_spawned_process_maps_the_same_files(tmp_path: Path, tars: list[Path]):
    shards = open_shards(make_manifest(), tmp_path)
    shards.read(0)
    assert len(pickle.dumps(shards)) < 2000
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=read_all, args=(shards, answers))
    process.start()
    assert answers.get(timeout=60) == [f"s{n:03d}" for n in range(20)]
    assert answers.get(timeout=60) == shards.index.folder
    assert answers.get(timeout=60) == "memmap"
    process.join()


def test_an_index_that_vanished_before_a_worker_started(tmp_path: Path, tars: list[Path]):
    shards = open_shards(make_manifest(), tmp_path)
    sent = pickle.dumps(shards)
    shutil.rmtree(tmp_path / ".vipllava")
    assert shards.read(19).key == "s019"  # mapped files stay
    with pytest.raises(ShardError, match=r"toy-\w+ vanished while it was in use"):
        pickle.loads(sent)


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_build_at_the_same_time(tmp_path: Path, tars: list[Path], locks: bool):
    context = multiprocessing.get_context("spawn" if locks else "fork")  # a patch has to travel
    barrier, answers = context.Barrier(2), context.Queue()
    with pytest.MonkeyPatch.context() as patch:
        if not locks:
            patch.setattr(fcntl, "flock", no_locks)
        started = [
            context.Process(target=open_and_read, args=(tmp_path, barrier, answers))
            for _ in range(2)
        ]
        for process in started:
            process.start()
        (keys, folder), other = answers.get(timeout=60), answers.get(timeout=60)
        for process in started:
            process.join()
    assert other == (keys, folder)
    assert keys == [f"s{n:03d}" for n in range(20)]
    assert folders(tmp_path) == [folder.name]


def no_locks(*_: object) -> None:
    raise OSError(37, "No locks available")


def test_the_loser_of_a_race_takes_the_winners(
    tmp_path: Path, tars: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    move = atomic.move

    def too_late(unfinished: Path, folder: Path) -> Path:
        shutil.copytree(unfinished, folder)
        (folder / "winner").touch()
        return move(unfinished, folder)

    monkeypatch.setattr(atomic, "move", too_late)
    folder = open_shards(make_manifest(), tmp_path).index.folder
    assert folder is not None
    assert (folder / "winner").exists()
    assert not list((tmp_path / ".vipllava").glob(".*.unfinished"))


def test_threads_read_at_the_same_time(
    tmp_path: Path, tars: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("vipllava.shards.tars._OPEN_FILES", 1)  # files come and go all the time
    shards = open_shards(make_manifest(), tmp_path)
    wanted = [(key, record, image) for key, record, image, _ in toy_samples(20)]
    start = threading.Barrier(4)

    def read(seed: int) -> None:
        order = np.random.default_rng(seed).integers(0, 20, 300).tolist()
        start.wait()
        for position in order:
            entry = shards.read(position)
            assert (entry.key, dict(entry.record), entry.image) == wanted[position]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def test_a_forked_process_reads_while_the_parent_does(tmp_path: Path, tars: list[Path]):
    shards = open_shards(make_manifest(), tmp_path)
    shards.read(0)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=read_all, args=(shards, answers))
    process.start()
    assert [shards.read(n).key for n in range(20)] == [f"s{n:03d}" for n in range(20)]
    assert answers.get(timeout=60) == [f"s{n:03d}" for n in range(20)]
    process.join()
    assert shards.read(19).key == "s019"
