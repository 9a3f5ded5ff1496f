from __future__ import annotations

import errno
import io
import random
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from vipllava.files.download import DiskError
from vipllava.ingest.fetch.unpacking import DamagedArchiveError, UnpackError, unpack

FILES = {
    "train2017/1.jpg": b"one" * 1000,
    "train2017/deep/2.jpg": b"two" * 500,
    "other/3.jpg": b"three",
    "train2017/.DS_Store": b"litter",
    "__MACOSX/train2017/._1.jpg": b"litter",
}


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def found(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_one_folder_of_an_archive(make, tmp_path: Path) -> None:
    told: list[int] = []
    archive = make(tmp_path / "a", FILES)
    count = unpack(
        archive,
        tmp_path / "coco" / "train2017",
        folder="train2017",
        on_progress=lambda done, _: told.append(done),
    )
    assert count == 2
    assert told == [1, 2]
    assert found(tmp_path / "coco") == {
        "train2017/1.jpg": FILES["train2017/1.jpg"],
        "train2017/deep/2.jpg": FILES["train2017/deep/2.jpg"],
    }


def test_the_whole_archive(tmp_path: Path) -> None:
    assert unpack(make_zip(tmp_path / "a.zip", FILES), tmp_path / "all") == 3
    assert set(found(tmp_path / "all")) == {
        "train2017/1.jpg",
        "train2017/deep/2.jpg",
        "other/3.jpg",
    }


def test_what_is_there_stays_and_what_is_not_whole_is_written(tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    (into / "1.jpg").write_bytes(b"x" * 3000)  # the right size: unpacked by an earlier run
    (into / "deep").mkdir()
    (into / "deep" / "2.jpg").write_bytes(b"tw")
    archive = make_zip(tmp_path / "a.zip", FILES)
    unpack(archive, into, folder="train2017")
    assert (into / "1.jpg").read_bytes() == b"x" * 3000
    assert (into / "deep" / "2.jpg").read_bytes() == FILES["train2017/deep/2.jpg"]
    unpack(archive, into, folder="train2017", overwrite=True)
    assert (into / "1.jpg").read_bytes() == FILES["train2017/1.jpg"]


def test_damage_is_noticed_and_leaves_nothing_partial(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    data = bytearray(archive.read_bytes())
    place = data.index(FILES["train2017/deep/2.jpg"])
    data[place + 7] ^= 1
    archive.write_bytes(data)
    with pytest.raises(DamagedArchiveError, match=r"a\.zip is damaged.*CRC.*get it again"):
        unpack(archive, tmp_path / "into", folder="train2017")
    assert set(found(tmp_path / "into")) == {"1.jpg"}


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_truncated_archives(make, tmp_path: Path, share: float) -> None:
    noise = random.Random(0).randbytes(10_000)
    archive = make(tmp_path / "a", {"x/1": noise, "x/2": b"y" * 5000})
    data = archive.read_bytes()
    archive.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DamagedArchiveError, match="get it again"):
        unpack(archive, tmp_path / "into", folder="x")
    assert not [name for name in found(tmp_path) if name.endswith(".part")]


@pytest.mark.parametrize("keep", [3000, 512 + 5120, 512 + 5120 + 100])
def test_a_truncated_plain_tar(tmp_path: Path, keep: int) -> None:
    """Also where it ends between two members, which tarfile takes for the end."""
    archive = make_tar(tmp_path / "a.tar", {"x/1": b"y" * 5000, "x/2": b"z" * 5000}, "w")
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(DamagedArchiveError, match="get it again"):
        unpack(archive, tmp_path / "into", folder="x")
    assert "2" not in found(tmp_path / "into")


def test_a_tar_with_a_broken_header(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", {"x/1": b"y" * 5000, "x/2": b"z" * 5000}, "w")
    data = bytearray(archive.read_bytes())
    data[512 + 5120 + 150] ^= 1
    archive.write_bytes(data)
    with pytest.raises(UnpackError, match="its end is missing"):
        unpack(archive, tmp_path / "into", folder="x")


def test_an_error_page_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("<html>Sorry")
    with pytest.raises(
        DamagedArchiveError, match=r"neither a zip nor a tar \(it starts with b'<html>So'"
    ):
        unpack(tmp_path / "a.zip", tmp_path / "into")


def test_another_archive(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"val2017/1.jpg": b"", "readme": b""})
    with pytest.raises(UnpackError, match=r"no files below `train2017`; it has readme, val2017"):
        unpack(archive, tmp_path / "into", folder="train2017")


@pytest.mark.parametrize("name", ["../out.jpg", "/tmp/out.jpg", "x/../../out.jpg", "x\\..\\out"])
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_members_stay_inside(make, tmp_path: Path, name: str) -> None:
    archive = make(tmp_path / "a", {name: b"1"})
    with pytest.raises(UnpackError, match="not to be trusted"):
        unpack(archive, tmp_path / "into")
    assert not (tmp_path / "out.jpg").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        link = tarfile.TarInfo("x/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(UnpackError, match="link or a device"):
        unpack(tmp_path / "a.tar", tmp_path / "into")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(DiskError, match=r"unpacking .*a\.zip: no space left for .*run the same"):
        unpack(make_zip(tmp_path / "a.zip", FILES), tmp_path / "into")
    assert found(tmp_path / "into") == {}


def test_a_missing_archive(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"unpacking .*a\.zip: .*No such file"):
        unpack(tmp_path / "a.zip", tmp_path / "into")
