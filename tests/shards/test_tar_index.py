"""The index of one tar: its rows, and what is refused."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.shards.tar_files import write_tar
from tests.toy_data import encode_picture, said, toy_samples
from vipllava.shards.tar_index import (
    SAMPLE,
    SampleRow,
    ShardError,
    ShardIndex,
    build_index,
    ensure_index,
    estimate_tokens,
    index_path,
    load_index,
    read_index,
    save_index,
    tar_name,
)
from vipllava.shards.tars import write_shards

JPEG = encode_picture()


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_shards(toy_samples(10), tmp_path)[0]


def read(path: Path) -> ShardIndex:
    with path.open("rb") as file:
        return read_index(file, str(path), "mend it")


def rewrite(path: Path, **changes: Any) -> None:
    """Write an index again with other arrays or other meta data."""
    with np.load(path) as stored:
        arrays = dict(stored)
    meta = json.loads(str(arrays["meta"]))
    for name, value in changes.items():
        (arrays if name in arrays else meta)[name] = value
    np.savez(path, **{**arrays, "meta": np.array(json.dumps(meta))})


def test_rows(tmp_path: Path):
    first, second = b'{"conversations": [{"from": "gpt", "value": "12345678"}]}', b"{}"
    path = write_tar(
        tmp_path / "x.tar", {"one.json": first, "one.PNG": JPEG, "part/two.json": second}
    )
    index = build_index(path)
    size = len(JPEG)
    blocks = -(-size // 512)
    assert [SampleRow._make(row) for row in index.samples.tolist()] == [
        SampleRow(3, 1, len(first), zlib.crc32(first), 3, size, zlib.crc32(JPEG), 64, 48, 3, 2),
        SampleRow(11, 4 + blocks, 2, zlib.crc32(second)),
    ]  # fmt: skip
    assert index.keys.tobytes() == b"onepart/two"
    assert index.tar_size == path.stat().st_size
    assert index.head_crc == zlib.crc32(path.read_bytes()[:4096])
    assert SAMPLE.itemsize == 35
    assert SAMPLE.names == SampleRow._fields


def test_what_is_saved_is_loaded(tar: Path, tmp_path: Path):
    index = build_index(tar)
    save_index(index, tmp_path / "copy.npz")
    for loaded in (load_index(tmp_path / "copy.npz", tar), read(tmp_path / "copy.npz")):
        assert (loaded.samples == index.samples).all()
        assert (loaded.keys == index.keys).all()
        assert (loaded.tar_size, loaded.head_crc) == (index.tar_size, index.head_crc)
        assert loaded.content_crc == index.content_crc
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("record", "tokens"),
    [
        ({}, 0),
        ({"conversations": said("abcd")}, 2),  # 4 / 3.6
        ({"conversations": said("<image>\nabc", "äöü" * 10)}, 18),  # 4 + 60 bytes
        ({"conversations": said("abcd"), "answer": "not read"}, 2),
        ({"question": "x" * 36, "answer": "y" * 36, "id": "z" * 99}, 20),
        ({"question": ["is", [0, 1], "here"], "answer_choices": [["yes"], ["no"]]}, 6),
        ({"grounding": "x" * 1_000_000}, 65535),
        ({"conversations": ["not a turn", {"value": None}]}, 0),
        ({"question": "\ud800"}, 1),  # no text, and no reason to fail here
    ],
)
def test_lengths_of_texts(record: dict[str, Any], tokens: int):
    assert estimate_tokens(record) == tokens


def test_equal_content_has_an_equal_checksum(tmp_path: Path):
    members = {"a.json": b"{}", "a.jpg": JPEG, "b.json": b"{}"}
    paths = [
        write_tar(tmp_path / "0.tar", members),
        write_tar(tmp_path / "1.tar", members),
        write_tar(tmp_path / "2.tar", {**members, "b.json": b"[]"[:0] + b"{ }"}),
        write_tar(tmp_path / "3.tar", {"a.json": b"{}", "a.jpg": JPEG, "c.json": b"{}"}),
        write_tar(tmp_path / "4.tar", {**members, "a.jpg": encode_picture(seed=1)}),
    ]
    first, same, *others = (build_index(path).content_crc for path in paths)
    assert first == same
    assert len({first, *others}) == 4


def test_names():
    assert tar_name(Path("/data/x-000.tar")) == "x-000.tar"
    assert tar_name("https://host/a/x-000.tar?sign=a/b.tar") == "x-000.tar"
    assert tar_name("pipe:curl -s https://host/a/x-000.tar | cat") == "x-000.tar"
    assert index_path(Path("/data/x-000.tar")) == Path("/data/x-000.index.npz")


def test_an_index_in_a_folder_that_cannot_be_written(
    tar: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    index_path(tar).unlink()

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("vipllava.shards.tar_index.save_index", refuse)
    assert ensure_index(tar).samples["text_tokens"].any()
    assert not index_path(tar).exists()
    assert "kept in memory" in caplog.text


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "has version 1, this release reads 2"),
        ({"version": 3}, "has version 3, this release reads 2; update .* or delete"),
        ({"version": "2"}, "has version '2'"),
        ({"tar_size": 1}, "is the index of another tar, .* indexed 1 bytes, found"),
        ({"head_crc": 1}, "is the index of another tar"),
        ({"content_crc": 1}, "is not a shard index .its rows do not match"),
        ({"samples": np.zeros(0, dtype=SAMPLE)}, "is not a shard index"),
        ({"samples": np.zeros(3, dtype=np.int64)}, "is not a shard index"),
        ({"keys": np.zeros(3, dtype=np.uint8)}, "keys are cut off"),
        ({"meta": np.array("none")}, "is not a shard index"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit(tar: Path, changes: dict[str, Any], message: str):
    path = index_path(tar)
    if "meta" in changes:
        np.savez(path, **changes)
    else:
        rewrite(path, **changes)
    with pytest.raises(ShardError, match=message):
        ensure_index(tar)


def test_nothing_stays_when_the_disk_is_full(tar: Path, monkeypatch: pytest.MonkeyPatch):
    index = build_index(tar)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        save_index(index, tar.with_name("copy.npz"))
    assert sorted(path.name for path in tar.parent.iterdir()) == [
        "shard-000000.index.npz", "shard-000000.tar",
    ]  # fmt: skip
