"""Questions per second of the engine with the tiny model, by batch size, on this machine."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.train_cases import ROOT, tiny_spec
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.conversation import ConversationEncoder
from vipllava.evaluation.asking import Protocol, requests_of
from vipllava.evaluation.bench import Item
from vipllava.inference.engine import Engine
from vipllava.models.building import image_seq_length, token_id
from vipllava.models.towers import CLIP
from vipllava.sample_world import TINY_POLICIES
from vipllava.sample_world.build import ensure_sample_world
from vipllava.shards.manifest import load_manifest
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.sample_encoder import SampleSource

_NUM_QUESTIONS, _MAX_NEW_TOKENS = 64, 8


def run(data_root: Path = Path("data")) -> dict[str, Any]:
    """Measure; the answers are those of an untrained projector, the work is the same."""
    ensure_sample_world(data_root)
    spec = tiny_spec()
    tokenizer = load_tokenizer(spec)
    encoder = ConversationEncoder(
        tokenizer,
        spec.chat_template,
        image_token_id=token_id(tokenizer, spec.image_token),
        image_seq_length=image_seq_length(spec),
        max_length=512,
    )
    engine = Engine(
        build_model(spec),
        tokenizer,
        encoder,
        ImageTransform(spec.image_size, "pad", CLIP.preprocessing),
        "cpu",
    )
    manifest = load_manifest("sample_regions", ROOT / "data_manifests")
    samples = SampleSource.open(manifest, data_root, seed=42)
    items = (Item(sample.key, sample) for sample in islice(samples, _NUM_QUESTIONS))
    requests = list(requests_of(items, Protocol(TINY_POLICIES, seed=42)))
    rows: list[dict[str, Any]] = []
    for batch_size in (1, 8, 32):
        engine.answer(requests[:batch_size], max_new_tokens=2, batch_size=batch_size)  # warm up
        began = time.perf_counter()
        engine.answer(requests, max_new_tokens=_MAX_NEW_TOKENS, batch_size=batch_size)
        seconds = time.perf_counter() - began
        rows.append({"batch_size": batch_size, "questions_per_s": len(requests) / seconds})
    best = max(row["questions_per_s"] for row in rows)
    return {"rows": rows, "speedup_over_one_by_one": best / rows[0]["questions_per_s"]}
