"""Members of tars that are no samples: what would be lost is an error, and so is what is no tar."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.shards.tar_files import write_tar
from tests.toy_data import encode_picture
from vipllava.shards.tar_index import ShardError, build_index
from vipllava.shards.tar_members import list_samples

JPEG = encode_picture()


def test_names_with_dots_are_not_lost(tmp_path: Path):
    members: dict[str, bytes] = {}
    for name in ("ok0", "22.05", "frame.001", "ok1", "photo.final"):
        members |= {f"{name}.jpg": JPEG, f"{name}.json": b"{}"}
    path = write_tar(tmp_path / "x.tar", members)
    with path.open("rb") as file:
        samples, problems, ignored = list_samples(file, "x.tar")
    assert [key for key, _ in samples] == ["ok0", "ok1"]
    assert [problem.message for problem in problems] == [
        "has 6 members such as `22.05.jpg` that would not be read (a name is cut at its first dot, "
        "so that this is `.05.jpg` of a sample `22`); call it `22_05.jpg`, or leave such members "
        "out"
    ]
    assert ignored == Counter(
        ["05.jpg", "05.json", "001.jpg", "001.json", "final.jpg", "final.json"]
    )
    with pytest.raises(ShardError, match=r"x\.tar has 6 members such as `22\.05\.jpg`"):
        build_index(path)


@pytest.mark.parametrize("name", ["a.gif", "a.HEIC", "a.tif", "a.avif"])
def test_images_of_other_formats_are_not_lost(tmp_path: Path, name: str):
    path = write_tar(tmp_path / "x.tar", {"a.json": b"{}", name: b"?"})
    message = rf"`{name}` that would not be read \(images are jpg, .*\); convert it, or leave such"
    with pytest.raises(ShardError, match=message):
        build_index(path)


def test_other_members_are_counted(tmp_path: Path):
    members = {"a.json": b"{}", "a.txt": b"?", "b.json": b"{}", "b.txt": b"", "b.cls": b"7"}
    with write_tar(tmp_path / "x.tar", members).open("rb") as file:
        samples, problems, ignored = list_samples(file, "x.tar")
    assert (len(samples), problems, ignored) == (2, [], {"txt": 2, "cls": 1})


@pytest.mark.parametrize(
    ("pack", "method"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")]
)
def test_a_compressed_tar(tmp_path: Path, pack: Callable[[bytes], bytes], method: str):
    path = write_tar(tmp_path / "x.tar", {"a.json": b"{}"})
    path.write_bytes(pack(path.read_bytes()))
    message = rf"x\.tar is compressed \({method}\); decompress it: samples are read by their places"
    with pytest.raises(ShardError, match=message):
        build_index(path)


def test_a_plain_tar_whose_first_name_looks_compressed(tmp_path: Path):
    assert len(build_index(write_tar(tmp_path / "x.tar", {"BZh9.json": b"{}"}))) == 1


def test_a_name_that_is_no_utf8(tmp_path: Path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("münchen.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    with pytest.raises(ShardError, match=r"a member `m\\udcfcnchen\.json` that is not a file"):
        build_index(path)


def test_a_name_of_more_than_255_letters_is_a_key_as_any(tmp_path: Path):
    key = "x" * 300
    index = build_index(write_tar(tmp_path / "x.tar", {f"{key}.json": b"{}"}))
    assert index.keys.tobytes().decode() == key


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"77777777777\0"])
def test_a_size_that_leads_out_of_the_tar(tmp_path: Path, size: bytes):
    path = write_tar(tmp_path / "x.tar", {"a.json": b"{}", "b.json": b"{}"})
    data = bytearray(path.read_bytes())
    header = data[1024:1536]
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[1024:1536] = header
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"x\.tar (is truncated within `b\.json`|is not a whole)"):
        build_index(path)
