"""What a build writes about itself: one report per shard while it runs, one summary at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from vipllava.files.atomic import new_file, write_json
from vipllava.ingest.building.incoming import FileState
from vipllava.records.fields import RECORD_VERSION

SUMMARY_FILE: Final = "build.json"
REJECTED_FILE: Final = "rejected.jsonl"
FORMAT: Final = 2
"""Goes up with any change of what a build writes from the same inputs; older parts are redone."""
_HEAD: Final = {"format": "vipllava-build", "version": FORMAT}
_NOT_ONE: Final = (OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that could not be used."""

    position: int  # in the annotation list
    key: str  # that it would have had
    image: str | None  # that it names
    fault: str  # class of the fault
    reason: str
    inputs: Mapping[str, FileState]  # of the files that it may mean, by path under the data root


@dataclass
class ShardReport:
    """What became of one stretch of the annotation list; names as in :class:`BuildSummary`."""

    name: str  # the tar's name without ``.tar``
    inputs: str  # fingerprint of the stretch and of the settings that matter
    first: int  # position of its first record
    num_samples: int = 0
    num_text_only: int = 0
    tar_size: int = 0  # bytes of the tar; 0 where no record was good and there is no tar
    kinds: Counter[str] = field(default_factory=Counter[str])
    changes: Counter[str] = field(default_factory=Counter[str])
    rejected: list[Rejected] = field(default_factory=list[Rejected])
    noted: Counter[str] = field(default_factory=Counter[str])  # see :func:`ingest`

    def save(self, path: Path) -> None:
        """Write the report; it appears under its name only when it is whole."""
        rows = [asdict(row) for row in self.rejected]
        write_json(path, {**vars(self), "rejected": rows}, indent=None)

    @classmethod
    def load(cls, path: Path) -> ShardReport | None:
        """Read a report; None if the file does not exist or is not one of this release's."""
        try:
            raw = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
            rows = cast("list[dict[str, Any]]", raw.pop("rejected"))
            return cls(**raw, rejected=[Rejected(**row) for row in rows])
        except _NOT_ONE:
            return None


@dataclass
class BuildSummary:
    """A build in numbers; written to ``build.json``."""

    dataset: str  # the manifest's name
    annotation_file: str  # as the manifest names it
    inputs: str  # fingerprint of the annotation list and of the settings that matter
    num_records: int  # items of the annotation list
    num_selected: int  # those that belong to the data set: stored and rejected
    max_samples: int  # records per tar
    num_samples: int = 0  # stored samples
    num_text_only: int = 0  # of them, without an image
    num_rejected: int = 0  # see ``rejected.jsonl``
    num_bytes: int = 0  # of all tars
    # rejected records by class of fault, stored samples by kind, images by what was changed
    rejected_by_fault: Counter[str] = field(default_factory=Counter[str])
    kinds: Counter[str] = field(default_factory=Counter[str])
    changes: Counter[str] = field(default_factory=Counter[str])
    remarks: list[str] = field(default_factory=list[str])  # on what was read; no faults
    # per tar its name, first position, samples, rejected records and bytes
    shards: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def add(self, report: ShardReport) -> None:
        """Count one shard."""
        self.num_samples += report.num_samples
        self.num_text_only += report.num_text_only
        self.num_rejected += len(report.rejected)
        self.num_bytes += report.tar_size
        self.rejected_by_fault.update(row.fault for row in report.rejected)
        self.kinds.update(report.kinds)
        self.changes.update(report.changes)
        self.shards.append(
            {
                "name": report.name,
                "first": report.first,
                "num_samples": report.num_samples,
                "num_rejected": len(report.rejected),
                "num_bytes": report.tar_size,
            }
        )

    def save(self, folder: Path) -> None:
        """Write ``build.json``, tars in order."""
        self.shards.sort(key=lambda row: row["first"])
        names = ("rejected_by_fault", "kinds", "changes")
        counts = {name: dict(sorted(vars(self)[name].items())) for name in names}
        values = {**_HEAD, "record_version": RECORD_VERSION, **vars(self), **counts}
        write_json(folder / SUMMARY_FILE, values, indent=1)

    @classmethod
    def load(cls, folder: Path) -> BuildSummary | None:
        """Read ``build.json``; None if it does not exist or is not one of this release's."""
        try:
            raw = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
            values = cast("dict[str, Any]", raw)
            head = {name: values.pop(name) for name in (*_HEAD, "record_version")}
            return cls(**values) if head.items() >= _HEAD.items() else None
        except _NOT_ONE:
            return None


def write_rejected(path: Path, reports: Iterable[ShardReport]) -> None:
    """Write one line per rejected record, in the order of the reports."""
    with (
        new_file(path) as unfinished,
        unfinished.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        for row in (row for report in reports for row in report.rejected):
            values = {name: value for name, value in asdict(row).items() if name != "inputs"}
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
