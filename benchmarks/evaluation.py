"""Items per second of an evaluation with the tiny model, by batch size, on this machine.

From the shards to predictions on disk: decoding, drawing and wording are in it. One at a time and
batches take turns on the same items; ``ratio`` is to one at a time, the median of the rounds' own.
``max_new_tokens`` ends an answer after one word, or after a short sentence. An untrained projector
gives few long answers, for which their batches wait; a trained export, where one is named, answers
as an evaluation's model does.
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
_KEPT: Final = 0
"""Image features: every round asks about the same images, an evaluation about each of them once."""
_NUM_ITEMS: Final = {"untrained": 64, "trained": 256}


def run(
    data_root: Path = Path("data"), checkpoint: Path | None = None, rounds: int = _ROUNDS
) -> dict[str, Any]:
    """Measure the tiny model with an untrained projector, and a trained export beside it.

    Args:
        data_root: where the sample world is, or is made.
        checkpoint: the export, e.g. the quick start's; None leaves it out.
        rounds: measured ones.
    """
    ensure_sample_world(data_root)
    models = {"untrained": tiny_engine}
    if checkpoint is not None:
        models["trained"] = lambda: Engine.from_checkpoint(
            checkpoint, "cpu", "float32", feature_bytes=_KEPT
        )
    rows: list[dict[str, Any]] = []
    for model, open_model in models.items():
        found = measure(open_model(), regions_data(data_root), _NUM_ITEMS[model], rounds)
        rows += ({"model": model} | row for row in found)
    return {"rows": rows, "checkpoint": checkpoint and str(checkpoint)}


def measure(engine: Engine, data: BenchData, num_items: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each batch size and length, in turns on the same items."""
    samples = data.source()
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
    for (tokens, size), found in speeds.items():
        ratios = [one / other for one, other in zip(found, speeds[tokens, 1], strict=True)]
        rows.append(
            {
                "max_new_tokens": tokens,
                "batch_size": size,
                "items_per_s": median(found[1:]),
                "ratio": median(ratios[1:]),
                "ratios": " ".join(f"{ratio:.2f}" for ratio in sorted(ratios[1:])),
            }
        )
    return rows


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
    return Engine(build_model(spec), tokenizer, encoder, transform, "cpu", feature_bytes=_KEPT)
