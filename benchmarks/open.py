"""Opening a data set of the full size: 1.2 million samples in 1200 tars.

The tars are sparse files with one record in them, their indices are as large as real ones.
``build_s`` is the one time that the index of the whole set is made, ``open_s`` any later opening
with the first sample read, in a process of its own. ``bytes_per_sample`` is by how much that
process grows when it looks at every row and key, the most that any use of the index can hold;
``bytes_per_sample_private`` is the part of it that other processes do not share. ``resume_*_s`` is
the time from opening to the first global batch of a run that goes on in the middle of an epoch,
``state_bytes`` what its checkpoint keeps of the stream.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np

from vipllava.shards.manifest import Manifest, parse_manifest
from vipllava.shards.tar_index import SAMPLE, ShardIndex, index_path, save_index
from vipllava.shards.tars import ShardSet, open_shards
from vipllava.stream.batching import Batching

_NUM_TARS: Final = 1200
_PER_TAR: Final = 1000
_TAR_BYTES: Final = 100_000_000
_RECORD: Final = json.dumps(
    {
        "conversations": [
            {"from": "human", "value": "Which of the two is it, and why? " * 4},
            {"from": "gpt", "value": "The first, as far as one can tell from here. " * 12},
        ]
    }
).encode()
_BATCH: Final = 128
_KEY: Final = "{:012d}-{:07d}"  # a COCO picture's id and the position in the list
_ROOT: Final = Path(__file__).resolve().parent.parent


def run() -> dict[str, Any]:
    """Measure; the one row holds all numbers."""
    result = measure()
    return {"rows": [result], **result}


def measure(num_tars: int = _NUM_TARS, per_tar: int = _PER_TAR) -> dict[str, Any]:
    """Write the tars' indices into a temporary folder and open the set, in new processes.

    Args:
        num_tars: tars.
        per_tar: samples in each.
    """
    with tempfile.TemporaryDirectory(prefix="vipllava-bench-") as folder:
        root = Path(folder)
        _write(root / "big", num_tars, per_tar)
        build = _in_process(root)["open_s"]
        later = [_in_process(root) for _ in range(3)]
        fastest = min(later, key=lambda result: result["open_s"])
        on_disk = sum(path.stat().st_size for path in (root / ".vipllava").rglob("*.npy"))
        pickled = _in_process(root, "pickle")
        resumed = {way: _in_process(root, way) for way in get_args(Batching)}
    count = num_tars * per_tar
    return {
        "samples": count,
        "tars": num_tars,
        "build_s": build,
        "open_s": fastest["open_s"],
        "worker_open_s": pickled["open_s"],
        "bytes_per_sample": fastest["grown"] / count,
        "bytes_per_sample_private": fastest["private"] / count,
        "bytes_per_sample_on_disk": on_disk / count,
        **{f"resume_{way}_s": result["first_batch_s"] for way, result in resumed.items()},
        "state_bytes": max(result["state_bytes"] for result in resumed.values()),
    }


def _write(folder: Path, num_tars: int, per_tar: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(num_tars):
        tar = folder / f"shard-{number:06d}.tar"
        with tar.open("wb") as file:
            file.truncate(_TAR_BYTES)
            file.seek(512)
            file.write(_RECORD)
            file.flush()
        head = bytes(512) + _RECORD + bytes(4096 - 512 - len(_RECORD))
        keys = [_KEY.format(n, number * per_tar + n).encode() for n in range(per_tar)]
        rows = np.zeros(per_tar, dtype=SAMPLE)
        rows["key_end"] = np.cumsum([len(key) for key in keys])
        rows["record_block"], rows["record_size"] = 1, len(_RECORD)
        rows["record_crc"] = zlib.crc32(_RECORD)
        rows["image_crc"] = generator.integers(1 << 32, size=per_tar, dtype=np.uint32)
        rows["text_tokens"] = generator.integers(20, 1200, size=per_tar)
        index = ShardIndex(
            _TAR_BYTES, zlib.crc32(head), np.frombuffer(b"".join(keys), dtype=np.uint8), rows
        )
        save_index(index, index_path(tar))


def _in_process(root: Path, way: str = "open") -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.open", way, str(root)]
    done = subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _main(way: str, root: Path) -> dict[str, Any]:
    raw = {
        "schema_version": 2, "name": "big", "stage": "finetune", "licence": "none",
        "shards": "big/*.tar",
    }  # fmt: skip
    manifest = parse_manifest(raw, where="bench")
    if way == "pickle":
        import pickle

        sent = pickle.dumps(open_shards(manifest, root))
        began = time.perf_counter()
        shards: ShardSet = pickle.loads(sent)
        shards.read(len(shards) // 2)
        return {"open_s": time.perf_counter() - began}
    if way in get_args(Batching):
        return _resume(way, manifest, root)
    before = _memory()
    began = time.perf_counter()
    shards = open_shards(manifest, root)
    shards.read(len(shards) // 2)
    taken = time.perf_counter() - began
    tokens = int(shards.index.samples["text_tokens"].sum())  # every page of the rows
    keys = int(shards.index.keys.max())
    after = _memory()
    assert tokens > len(shards)
    assert keys < 128
    return {"open_s": taken, **{name: after[name] - before[name] for name in before}}


def _resume(way: str, manifest: Manifest, root: Path) -> dict[str, Any]:
    """Go on in the middle of an epoch, as a new process does."""
    from benchmarks.stream import text_encoder
    from vipllava.stream.batching import Cursor, PackedBatches, SampleBatches
    from vipllava.stream.loader import StepLoader, StepSampler
    from vipllava.stream.order import MixEntry, SampleOrder, plan_parts
    from vipllava.stream.pack_planner import PackPlanner
    from vipllava.stream.sample_encoder import SampleSource
    from vipllava.stream.visual_prompt_dataset import VisualPromptDataset

    encoder = text_encoder()
    began = time.perf_counter()
    source = SampleSource.open(manifest, root, 0)
    dataset = VisualPromptDataset([source], encoder)
    parts = plan_parts({"big": source.shards.shard_sizes}, {"big": MixEntry(epochs=1.0)})
    order = SampleOrder(parts, 0)
    if way == "packed":
        planner = PackPlanner(dataset, pack_length=4096, max_images=16)
        plan: Any = PackedBatches(order, _BATCH // 5, planner)
        place = Cursor(0, step=4000, samples=600_000, window=150, row=10)
    else:
        plan = SampleBatches(
            order, _BATCH, dataset.estimate_lengths if way == "length_grouped" else None
        )
        place = Cursor(0, step=4687, samples=4687 * _BATCH)
    pack_length = 4096 if way == "packed" else None
    collator = dataset.sample_encoder.collator(pack_length=pack_length)
    loader = StepLoader(dataset, StepSampler(plan), collator)
    state = {**loader.state_dict(), **asdict(place)}
    loader.load_state_dict(state)
    batch = next(iter(loader))
    taken = time.perf_counter() - began
    assert batch.num_supervised_global > 0
    return {"first_batch_s": taken, "state_bytes": len(json.dumps(state))}


def _memory() -> dict[str, int]:
    """Return the bytes of this process in memory, and those that no file stands for."""
    pages = list(map(int, Path("/proc/self/statm").read_text().split()))
    size = os.sysconf("SC_PAGE_SIZE")
    return {"grown": pages[1] * size, "private": (pages[1] - pages[2]) * size}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(sys.argv[1], Path(sys.argv[2]))))
