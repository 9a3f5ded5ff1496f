"""A data set in numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vipllava.ingest.building.build_report import BuildSummary
from vipllava.ingest.check.stats import ShardStats, Spread, shard_stats
from vipllava.shards.tars import Entry

KINDS = ("refcocog", "vcr", "image_level", "text_only")


class FakeShards:
    """Twelve samples in two tars: three of each kind, the last kind without a picture."""

    name = "toy"

    def __init__(self, folder: Path) -> None:
        self.paths = (folder / "a.tar", folder / "b.tar")
        self.shard_ends = np.array([8, 12], dtype=np.int64)
        self.index = SimpleNamespace(tars={"tar_size": np.array([3000, 1000])})
        self.num_read = 0

    def __len__(self) -> int:
        return 12

    def read(self, position: int) -> Entry:
        self.num_read += 1
        kind = KINDS[position % 4]
        record: dict[str, Any] = {"id": f"{kind}-{position}"}
        image = None if kind == "text_only" else b"jpeg"
        return Entry(str(position), record, image, None, self.paths[0])

    def text_tokens(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        return (positions * 10).astype(np.int32)

    def has_image(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return positions % 4 != 3

    def image_sizes(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        sizes = np.array([(640, 480), (480, 640), (500, 500), (0, 0)], dtype=np.int32)
        picked = sizes[positions % 4]
        picked[0] = 0  # a picture that could not be read
        return picked


def test_numbers(tmp_path: Path):
    stats = shard_stats(FakeShards(tmp_path))
    assert (stats.num_samples, stats.num_shards, stats.num_text_only) == (12, 2, 3)
    assert stats.text_only_share == 0.25
    assert stats.text_tokens == Spread(55.0, 0.0, 55.0, 104.5, 110.0)
    assert {label: n for label, n in stats.text_tokens_histogram.items() if n} == {
        "0-31": 4, "32-63": 3, "64-127": 5,
    }  # fmt: skip
    assert stats.image_shapes == {"landscape": 2, "portrait": 3, "square": 3, "unreadable": 1}
    assert stats.image_width is not None
    assert (stats.image_width.minimum, stats.image_width.maximum) == (480, 640)
    assert stats.shard_samples == Spread(6.0, 4.0, 6.0, 7.8, 8.0)
    assert stats.shard_bytes == Spread(2000.0, 1000.0, 2000.0, 2900.0, 3000.0)
    content = stats.to_json()
    assert content["schema_version"] == 1
    assert content["text_only_share"] == 0.25
    assert content["text_tokens"]["p95"] == 104.5


def kinds_of(stats: ShardStats) -> tuple[dict[str, int], str, int]:
    return dict(stats.kinds), stats.kinds_from, stats.num_records_read


def test_kinds_are_counted(tmp_path: Path):
    shards = FakeShards(tmp_path)
    told: list[tuple[int, int]] = []
    stats = shard_stats(shards, on_progress=lambda done, total: told.append((done, total)))
    # A record that names no picture and has one beside it is image-level.
    assert kinds_of(stats) == (
        {"image_level": 3, "refcocog": 3, "text_only": 3, "vcr": 3}, "all", 12,
    )  # fmt: skip
    assert told == [(12, 12)]


def test_kinds_are_estimated(tmp_path: Path):
    shards = FakeShards(tmp_path)
    stats = shard_stats(shards, num_records=4)  # positions 0, 4, 7, 11
    assert kinds_of(stats) == ({"refcocog": 6, "text_only": 6}, "sample", 4)
    assert shards.num_read == 4


def test_kinds_are_known(tmp_path: Path):
    shards = FakeShards(tmp_path)
    assert kinds_of(shard_stats(shards, "vcr")) == ({"vcr": 12}, "manifest", 0)
    summary = BuildSummary("toy", "list.json", "", 13, 13, 8, num_samples=12, kinds={"v7w": 12})
    summary.save(tmp_path)
    assert kinds_of(shard_stats(shards)) == ({"v7w": 12}, "build", 0)
    summary.num_samples = 11  # tars were added since
    summary.save(tmp_path)
    assert shard_stats(shards).kinds_from == "all"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "vipllava-build", "version": 1}'])
def test_a_summary_that_is_none_is_not_used(tmp_path: Path, text: str):
    (tmp_path / "build.json").write_text(text)
    assert BuildSummary.load(tmp_path) is None


def test_no_numbers_have_no_spread():
    assert Spread.of(np.array([])) is None
