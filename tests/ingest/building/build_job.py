"""A build in a process of its own, for tests that kill it: ROOT NUM_WORKERS."""

from __future__ import annotations

import sys

from tests.toy_data import make_manifest
from vipllava.ingest.building.shard_build import build_shards


def tell(task: str, unit: str, done: int, total: int | None) -> None:
    sys.stdout.write(f"{task.split()[-1]} {done}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    root, num_workers = sys.argv[1:]
    manifest = make_manifest(annotation_file="list.json", image_roots=["pictures"])
    build_shards(
        manifest,
        root,
        num_workers=int(num_workers),
        max_samples=5,
        tell=tell,
    )
