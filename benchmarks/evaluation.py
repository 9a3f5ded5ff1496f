"""Items per second of an evaluation with the tiny model, by batch size, on this machine.

From the shards to predictions on disk: decoding, drawing and wording are in it. One at a time and
batches take turns on the same items; ``ratio`` is the median speed over that of one at a time.
``max_new_tokens`` ends an answer after one word, or after a short sentence: most are one word all
the same, and a batch works on until its longest answer ends.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.train_cases import ROOT, tiny_spec
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.conversation import ConversationEncoder
from vipllava.evaluation.answerers import EngineAnswerer
from vipllava.evaluation.asking import Protocol, ask_items
from vipllava.evaluation.bench import BenchData, Item
from vipllava.evaluation.journal import Journal
from vipllava.inference.engine import Engine
from vipllava.models.building import image_seq_length, token_id
from vipllava.models.towers import CLIP
from vipllava.sample_world import TINY_POLICIES
from vipllava.sample_world.build import ensure_sample_world
from vipllava.shards.manifest import load_manifest
from vipllava.stream.image_transform import ImageTransform

BATCH_SIZES: Final = (1, 16, 64)  # 16 is the default
NEW_TOKENS: Final = (2, 16)
PROTOCOL: Final = Protocol(TINY_POLICIES, seed=42)
_ROUNDS: Final = 5


def run(
    data_root: Path = Path("data"), num_items: int = 64, rounds: int = _ROUNDS
) -> dict[str, Any]:
    """Measure; the answers are those of an untrained projector, the work is the same."""
    ensure_sample_world(data_root)
    engine = tiny_engine()
    samples = regions_data(data_root).source()
    speeds: dict[tuple[int, int], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="vipllava-bench-") as folder:
        for number in range(rounds + 1):  # the first one warms up
            for tokens in NEW_TOKENS:
                for size in BATCH_SIZES:
                    items = (Item(each.key, each) for each in islice(samples, num_items))
                    journal = Journal(Path(folder) / f"{tokens}-{size}-{number}", {})
                    answerer = EngineAnswerer(engine, tokens, size)
                    began = time.perf_counter()
                    ask_items(items, PROTOCOL, lambda answerer=answerer: answerer, journal)
                    speed = num_items / (time.perf_counter() - began)
                    speeds.setdefault((tokens, size), []).append(speed)
    rows: list[dict[str, Any]] = []
    for (tokens, size), all_of_it in speeds.items():
        speed, alone = (median(of[1:]) for of in (all_of_it, speeds[tokens, 1]))
        rows.append(
            {
                "max_new_tokens": tokens,
                "batch_size": size,
                "items_per_s": speed,
                "ratio": speed / alone,
            }
        )
    return {"rows": rows}


def regions_data(data_root: Path) -> BenchData:
    """Return the sample world's held-out questions."""
    manifest = load_manifest("sample_regions", ROOT / "data_manifests")
    return BenchData(manifest, data_root, TINY_POLICIES)


def tiny_engine() -> Engine:
    """Return an engine of the tiny model before its first stage, with evaluation's attention."""
    spec = replace(tiny_spec(), attn_implementation="sdpa")
    tokenizer = load_tokenizer(spec)
    encoder = ConversationEncoder(
        tokenizer,
        spec.chat_template,
        image_token_id=token_id(tokenizer, spec.image_token),
        image_seq_length=image_seq_length(spec),
        max_length=512,
    )
    transform = ImageTransform(spec.image_size, "pad", CLIP.preprocessing)
    return Engine(build_model(spec), tokenizer, encoder, transform, "cpu")
