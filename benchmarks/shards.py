"""Building shards: pictures a second and peak memory; and reading a long annotation list.

One data set of real photographs in the sizes of the real data is built in one process and with
one and two workers, beside a plain loop over ``webdataset.ShardWriter`` that looks at no picture.
``per_second`` counts from the start of the build, worker start-up included. ``peak_mib`` is the
largest resident size that any one process had, the build's own or a worker's; each way runs in a
process of its own. The list reader is measured against ``json.load`` of the same file, and on a
list of the size of stage 2, of which ``json.load`` would make some four gigabytes.
"""

from __future__ import annotations

import importlib.resources
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from vipllava.ingest.building.annotations import plan_ranges
from vipllava.ingest.building.shard_build import build_shards
from vipllava.shards.manifest import Manifest

_NUM_IMAGES: Final = 1000
_NUM_BUILT: Final = 8000  # records; pictures are shared, as COCO's are
_NUM_RECORDS: Final = 100_000
_NUM_STAGE_2: Final = 1_200_000
_SIZES: Final = ((640, 480), (500, 333), (427, 640), (1024, 768))
_ROOT: Final = Path(__file__).resolve().parent.parent


def run() -> dict[str, Any]:
    """Measure; ``images_per_second`` and ``peak_mib`` are per way of building."""
    with tempfile.TemporaryDirectory(prefix="vipllava-bench-") as folder:
        root = Path(folder)
        _make_data(root)
        ways = ("plain webdataset", "build, alone", "build, 1 worker", "build, 2 workers")
        rows = [_measure(way, root) for way in ways]
        long = [
            _measure(way, root) for way in ("list, json.load", "list, ours", "stage-2 list, ours")
        ]
    return {
        "rows": rows + long,
        "images_per_second": {row["way"]: row["per_second"] for row in rows},
        "peak_mib": {row["way"]: row["peak_mib"] for row in rows + long},
        "grown_mib": {row["way"]: row["grown_mib"] for row in long},
    }


def _make_data(root: Path) -> None:
    """Write pictures, their list, and a list that is too long for comfort."""
    raw = importlib.resources.files("skimage.data").joinpath("astronaut.png").read_bytes()
    photograph = Image.open(io.BytesIO(raw)).convert("RGB")
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for number in range(_NUM_IMAGES):
        x, y = (int(v) for v in rng.integers(0, 128, 2))
        picture = photograph.crop((x, y, x + 384, y + 384)).resize(_SIZES[number % len(_SIZES)])
        picture.save(root / "pictures" / f"{number:06d}.jpg", quality=90)
    (root / "list.json").write_text(json.dumps([_record(n) for n in range(_NUM_BUILT)]))
    for name, count in (("long", _NUM_RECORDS), ("stage-2", _NUM_STAGE_2)):
        with (root / f"{name}.json").open("w") as file:
            for number in range(count):
                file.write(("[" if number == 0 else ", ") + json.dumps(_record(number)))
            file.write("]")


def _record(number: int) -> dict[str, Any]:
    said = [("human", "<image>\nWhat is shown?"), ("gpt", "A person in an orange suit. " * 4)] * 3
    return {
        "id": f"{number:012d}",
        "image": f"pictures/{number % _NUM_IMAGES:06d}.jpg",
        "conversations": [
            {"from": who, "value": text if turn == 0 else text.removeprefix("<image>\n")}
            for turn, (who, text) in enumerate(said)
        ],
    }


def _measure(way: str, root: Path) -> dict[str, Any]:
    """Run one way in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.shards", way, str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    return {"way": way, **json.loads(done.stdout)}


def _build(root: Path, num_workers: int) -> None:
    manifest = Manifest(
        schema_version=2,
        name="bench",
        stage="task",
        licence="none",
        shards=(f"built-{num_workers}/*.tar",),
        annotation_file="list.json",
        image_roots=("pictures",),
    )
    build_shards(manifest, root, num_workers=num_workers, max_samples=500)


def _plain(root: Path) -> None:
    from webdataset.writer import ShardWriter

    pattern = str(root / "plain-%06d.tar")
    with ShardWriter(pattern, maxcount=500, verbose=0) as writer:
        for record in json.loads((root / "list.json").read_text()):
            picture = (root / record["image"]).read_bytes()
            writer.write({"__key__": record["id"], "json": record, "jpg": picture})


def _main(way: str, root: Path) -> dict[str, Any]:
    """Do one thing; returns how long it took and how large the largest process became."""
    works: dict[str, tuple[Callable[[], object], int]] = {
        "plain webdataset": (lambda: _plain(root), _NUM_BUILT),
        "build, alone": (lambda: _build(root, 0), _NUM_BUILT),
        "build, 1 worker": (lambda: _build(root, 1), _NUM_BUILT),
        "build, 2 workers": (lambda: _build(root, 2), _NUM_BUILT),
        "list, json.load": (lambda: json.loads((root / "long.json").read_text()), _NUM_RECORDS),
        "list, ours": (lambda: plan_ranges(root / "long.json", 1000), _NUM_RECORDS),
        "stage-2 list, ours": (lambda: plan_ranges(root / "stage-2.json", 1000), _NUM_STAGE_2),
    }
    work, count = works[way]
    memory = _Memory()
    before = memory.peak_mib()
    began = time.perf_counter()
    with memory:
        work()
    seconds = time.perf_counter() - began
    return {
        "count": count,
        "seconds": seconds,
        "per_second": count / seconds,
        "peak_mib": memory.peak_mib(),
        "grown_mib": max(memory.peak_mib() - before, 0.1),
    }


class _Memory:
    """Reads the high-water marks of this process and its children while something runs.

    ``getrusage`` would do if a new process did not begin with its parent's mark.
    """

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def peak_mib(self) -> float:
        """Return the largest mark of any process; 0 where the system does not say."""
        self._look()
        return max(self._peaks.values(), default=0) / 1024

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self._look()

    def _look(self) -> None:
        own = os.getpid()
        children = Path(f"/proc/{own}/task").glob("*/children")
        try:
            pids = {own, *(int(pid) for path in children for pid in path.read_text().split())}
        except OSError:
            pids = {own}
        for pid in pids:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:  # ended meanwhile
                continue
            if match := re.search(r"VmHWM:\s+(\d+) kB", status):
                self._peaks[pid] = int(match.group(1))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(sys.argv[1], Path(sys.argv[2]))))
