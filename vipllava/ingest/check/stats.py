"""A data set in numbers: lengths, images, tars, record kinds. Read from the index, mostly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vipllava.ingest.building.build_report import BuildSummary
from vipllava.records import AUTO, kind_of
from vipllava.shards.tars import ShardSet

STATS_VERSION: Final = 1
NUM_RECORDS: Final = 2000
_BINS: Final = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 65536)
_BIN_NAMES: Final = tuple(f"{low}-{high - 1}" for low, high in pairwise(_BINS))
_SHAPES: Final = ("unreadable", "landscape", "portrait")
_SQUARE: Final = 1.1  # width over height up to this, or down to its inverse, counts as square


@dataclass(frozen=True, slots=True)
class Spread:
    """How numbers are distributed."""

    mean: float
    minimum: float
    median: float
    p95: float
    maximum: float

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Spread | None:
        """Summarise; None for no numbers."""
        if not len(values):
            return None
        low, median, p95, high = np.percentile(values, (0, 50, 95, 100)).tolist()
        return cls(float(values.mean()), low, median, p95, high)


@dataclass(frozen=True, slots=True)
class ShardStats:
    """A data set in numbers."""

    dataset: str
    num_samples: int  # in all tars
    num_text_only: int  # of them, without an image
    num_shards: int  # tars
    text_tokens: Spread | None  # estimated tokens of a sample's texts, without those of its image
    text_tokens_histogram: Mapping[str, int]  # samples per bin, by the bin's label ``from-to``
    image_width: Spread | None  # pixels, of upright images
    image_height: Spread | None
    image_shapes: Mapping[str, int]  # ``landscape``, ``portrait``, ``square``, ``unreadable``
    shard_samples: Spread | None  # samples per tar
    shard_bytes: Spread | None
    kinds: Mapping[str, int]  # samples by record kind
    # how ``kinds`` is known: ``manifest`` (all are of the manifest's kind), ``build`` (counted when
    # the tars were built), ``all`` (every record was read), ``sample`` (scaled up from
    # ``num_records_read``)
    kinds_from: str
    num_records_read: int

    @property
    def text_only_share(self) -> float:
        """Share of the samples without an image."""
        return self.num_text_only / self.num_samples if self.num_samples else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return what ``shards stats --json`` prints."""
        values = {"schema_version": STATS_VERSION, **asdict(self)}
        return {**values, "text_only_share": self.text_only_share}


def shard_stats(
    shards: ShardSet,
    record_kind: str = AUTO,
    *,
    num_records: int | None = NUM_RECORDS,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShardStats:
    """Describe a data set.

    Args:
        shards: the opened tars.
        record_kind: the manifest's.
        num_records: records to read for their kind where it is not known otherwise, evenly spread;
            None for all.
        on_progress: told records read and to be read.
    """
    count = len(shards)
    positions = np.arange(count, dtype=np.int64)
    tokens = shards.text_tokens(positions)
    pictured = shards.has_image(positions)
    sizes = shards.image_sizes(positions)[pictured]
    readable = sizes[(sizes > 0).all(axis=1)]
    histogram, _ = np.histogram(tokens, bins=(*_BINS[:-1], 1 << 31))
    width, height = sizes.astype(np.float64).T
    cases = [(sizes <= 0).any(axis=1), width > _SQUARE * height, height > _SQUARE * width]
    shapes = np.select(cases, _SHAPES, "square")
    kinds, how, num_read = _kinds(shards, record_kind, num_records, on_progress)
    return ShardStats(
        dataset=shards.name,
        num_samples=count,
        num_text_only=count - int(pictured.sum()),
        num_shards=len(shards.paths),
        text_tokens=Spread.of(tokens),
        text_tokens_histogram=dict(zip(_BIN_NAMES, histogram.tolist(), strict=True)),
        image_width=Spread.of(readable[:, 0]),
        image_height=Spread.of(readable[:, 1]),
        image_shapes={name: int((shapes == name).sum()) for name in (*_SHAPES, "square")},
        shard_samples=Spread.of(np.diff(shards.shard_ends, prepend=0)),
        shard_bytes=Spread.of(shards.index.tars["tar_size"]),
        kinds=dict(sorted(kinds.items())),
        kinds_from=how,
        num_records_read=num_read,
    )


def _kinds(
    shards: ShardSet,
    record_kind: str,
    num_records: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Mapping[str, int], str, int]:
    """Return ``kinds``, ``kinds_from`` and ``num_records_read``."""
    count = len(shards)
    if record_kind != AUTO:
        return {record_kind: count}, "manifest", 0
    folders = {Path(path).parent for path in shards.paths}
    built = BuildSummary.load(folders.pop()) if len(folders) == 1 else None
    if built is not None and built.num_samples == count and built.dataset == shards.name:
        return built.kinds, "build", 0
    number = count if num_records is None else min(count, num_records)
    chosen = [round(n * (count - 1) / max(1, number - 1)) for n in range(number)]  # evenly spread
    seen: Counter[str] = Counter()
    for done, position in enumerate(chosen, start=1):
        entry = shards.read(position)
        seen[kind_of(entry.record, entry.image is not None)] += 1
        if on_progress is not None and (done % 100 == 0 or done == number):
            on_progress(done, number)
    if number == count:
        return seen, "all", number
    return {kind: round(n * count / number) for kind, n in seen.items()}, "sample", number
