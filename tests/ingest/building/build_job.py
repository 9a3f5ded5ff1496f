"""A build in a process of its own, for tests that kill it: ROOT NUM_WORKERS."""

from __future__ import annotations

import sys

from tests.toy_data import make_manifest
from vipllava.ingest.building.shard_build import build_shards

if __name__ == "__main__":
    root, num_workers = sys.argv[1:]
    manifest = make_manifest(annotation_file="list.json", image_roots=["pictures"])
    build_shards(
        manifest,
        root,
        num_workers=int(num_workers),
        max_samples=5,
        on_progress=lambda p: sys.stdout.write(f"{p.phase} {p.done}\n") and sys.stdout.flush(),
    )
