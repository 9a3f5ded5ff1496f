"""A data set of a few records that tests build shards of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.toy_data import make_manifest, said
from vipllava.ingest.building.build_report import BuildSummary
from vipllava.ingest.building.shard_build import build_shards
from vipllava.shards.manifest import Manifest

NUM = 13


def toy_manifest(**changes: Any) -> Manifest:
    return make_manifest(**{"annotation_file": "list.json", "image_roots": ["pictures"], **changes})


def toy_records() -> list[dict[str, Any]]:
    """Return image-level, region and (each fifth) text-only records."""
    records: list[dict[str, Any]] = []
    for number in range(NUM):
        record: dict[str, Any] = {"id": f"r{number:02d}", "conversations": said("Q?", "A.")}
        if number % 5 != 4:
            record["image"] = f"pictures/{number}.jpg"
        if number % 5 == 2:
            record |= {"bboxes": [[4, 4, 30, 30]], "conversations": said("<bbox0>?", "A.")}
        records.append(record)
    return records


def write_list(root: Path, records: list[Any]) -> None:
    root.mkdir(exist_ok=True)
    (root / "list.json").write_text(json.dumps(records))


def build(root: Path, manifest: Manifest | None = None, **options: Any) -> BuildSummary:
    options = {"num_workers": 0, "max_samples": 5, **options}
    return build_shards(manifest or toy_manifest(), root, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
