"""A small data set of a user's own, beside the project's manifests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.toy_data import encode_picture, said, toy_samples
from vipllava.shards.tars import write_shards


@dataclass(frozen=True)
class UserData:
    """Where it lies, and the overrides with which every command finds it."""

    root: Path
    manifest: Path

    @property
    def arguments(self) -> list[str]:
        return [
            "--data",
            str(self.manifest),
            f"paths.data_root={self.root}",
            f"paths.runs={self.root}",
        ]


@pytest.fixture
def user_data(tmp_path: Path) -> UserData:
    """Ten good records."""
    return make_user_data(tmp_path, [])


@pytest.fixture
def faulty_data(tmp_path: Path) -> UserData:
    """Ten good records and one whose box is empty."""
    record = {
        "id": "bad", "image": "bad.jpg", "bboxes": [[5, 5, 5, 30]],
        "conversations": said("<image>\nWhat is <bbox0>?", "A cup."),
    }  # fmt: skip
    return make_user_data(tmp_path, [("bad", record, encode_picture(), "jpg")])


def make_user_data(root: Path, more: list) -> UserData:
    write_shards([*toy_samples(10), *more], root / "mine")
    manifest = root / "mine.yaml"
    manifest.write_text(
        "schema_version: 2\nname: mine\nstage: task\nlicence: none\nshards: mine/*.tar\n"
    )
    return UserData(root, manifest)
