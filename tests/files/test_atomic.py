"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vipllava.files import atomic
from vipllava.files.atomic import new_file, new_folder, remove, write_json, write_whole


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def found(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_named_when_it_is_whole(tmp_path: Path, durable: bool):
    path = tmp_path / "made" / "a.txt"
    with new_file(path, durable=durable) as unfinished:
        unfinished.write_text("new")
        assert found(path.parent) == [unfinished.name]
        assert unfinished.name.endswith(".unfinished")
    assert found(path.parent) == ["a.txt"]
    with pytest.raises(ZeroDivisionError), new_file(path, durable=durable) as unfinished:
        unfinished.write_text(str(1 / 0))
    assert (found(path.parent), path.read_text()) == (["a.txt"], "new")


def test_two_may_write_the_same_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    with new_file(path) as one, new_file(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert (found(tmp_path), path.read_text()) == (["a.txt"], "one")


def test_a_full_disk_keeps_the_old_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.json"
    write_json(path, {"ä": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "ä": 1\n}\n'
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'"):
        write_whole(path, "new")
    assert found(tmp_path) == ["a.json"]
    assert path.read_text(encoding="utf-8").startswith("{")


def test_a_folder_takes_the_place_of_another(tmp_path: Path):
    folder = tmp_path / "made" / "folder"
    for text in ("old", "new"):
        with new_folder(folder, replace=True) as unfinished:
            (unfinished / text).touch()
    assert found(tmp_path) == ["made", "made/folder", "made/folder/new"]


def test_a_folder_stays_unless_told_otherwise(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(OSError) as caught, new_folder(tmp_path / "folder") as unfinished:  # noqa: PT011
        (unfinished / "new").touch()
    assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
    assert found(tmp_path) == ["folder", "folder/old"]


@pytest.mark.parametrize("fails", ["fsync", "move"])
def test_an_old_folder_is_there_when_the_new_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
):
    folder, move = tmp_path / "folder", atomic.move
    folder.mkdir()
    (folder / "old").touch()

    def move_old_only(source: Path, target: Path) -> Path:
        return full() if (source / "new").exists() else move(source, target)  # type: ignore[func-returns-value,return-value]

    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(atomic, "move", move_old_only)
    with pytest.raises(OSError, match="No space left"), new_folder(folder, replace=True) as new:
        (new / "new").touch()
    assert found(tmp_path) == ["folder", "folder/old"]


def test_removing(tmp_path: Path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("folder", "file", "absent"):
        remove(tmp_path / name)
    assert found(tmp_path) == []
