"""The stream's samples per second beside a plain ``webdataset`` pipeline, with one and two workers.

Both read the same tars of real-size photographs and share everything from the bytes of a sample
on: parsing, decoding, marks, drawing, resizing, encoding. They differ in how a sample is found,
shuffled, checked, collated and handed over. A third pipeline decodes with Pillow, as
``webdataset`` does by itself. All take turns, an epoch each and always the same one, for other
marks would be other work; workers are started before and the first round is not counted. ``ratio``
is ours over the plain one, the median of the rounds.

``packing`` is what planning a window of 4096 samples takes and how full the packs are.
"""

from __future__ import annotations

import importlib.resources
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from webdataset.compat import WebDataset

from benchmarks.train_cases import tiny_spec
from vipllava.checkpoints.loading import load_tokenizer
from vipllava.conversation import ConversationEncoder
from vipllava.models.building import token_id
from vipllava.models.towers import CLIP
from vipllava.records import parse_record
from vipllava.shards.manifest import Manifest, parse_manifest
from vipllava.shards.tars import write_shards
from vipllava.stream.batching import SampleBatches
from vipllava.stream.collate import EncodedSample
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.loader import StepLoader, StepSampler
from vipllava.stream.order import MixEntry, SampleOrder, plan_parts
from vipllava.stream.pack_planner import plan_packs
from vipllava.stream.sample_encoder import (
    SampleEncoder,
    SampleSource,
    marks_generator,
    words_generator,
)
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import IGNORE_INDEX, Sample
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import refer_turns

_HISTOGRAM = Path(__file__).resolve().parent.parent / "tests" / "stream" / "length_histogram.json"
_NAME, _SEED, _INPUT = "bench", 42, 336
_NUM_SAMPLES, _PER_TAR, _BATCH, _ROUNDS = 576, 48, 16, 9
_SIZE = (640, 480)
_PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


def run() -> dict[str, Any]:
    """Measure; ``ratio`` is ours over plain ``webdataset`` per number of workers."""
    encoder = text_encoder()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = write_shards(_samples(), root / _NAME, max_samples=_PER_TAR)
        rows = [_measure(root, paths, encoder, workers) for workers in (1, 2)]
    return {
        "rows": rows,
        "ratio": {str(row["workers"]): row["ratio"] for row in rows},
        "packing": [_measure_packing(pack_length) for pack_length in (4096, 8192)],
    }


def _measure(root: Path, paths: list[Path], encoder: SampleEncoder, workers: int) -> dict[str, Any]:
    loaders: dict[str, Any] = {
        "ours": _stream(root, encoder, workers),
        "webdataset": _plain(paths, partial(_from_bytes, encoder=encoder), None, workers),
        "webdataset_pil": _plain(paths, partial(_from_pillow, encoder=encoder), "pil", workers),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for round_ in range(_ROUNDS + 1):
        # Whoever comes first in one round comes last in the next.
        for name in sorted(loaders, reverse=bool(round_ % 2)):
            began = time.perf_counter()
            count = sum(map(_size, loaders[name]))
            if count != _NUM_SAMPLES:
                raise RuntimeError(f"{name} gave {count} of {_NUM_SAMPLES} samples")
            speeds[name].append(count / (time.perf_counter() - began))
    loaders["ours"].close()
    counted = {name: values[1:] for name, values in speeds.items()}
    ratios = [a / b for a, b in zip(counted["ours"], counted["webdataset"], strict=True)]
    return {
        "workers": workers,
        **{f"{name}_samples_per_s": median(values) for name, values in counted.items()},
        "ratio": median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
    }


def _size(batch: Any) -> int:
    return len(batch["keys"] if isinstance(batch, dict) else batch.keys)


def _stream(root: Path, encoder: SampleEncoder, workers: int) -> StepLoader:
    source = SampleSource.open(_manifest(), root, _SEED)
    parts = plan_parts({_NAME: source.shards.shard_sizes}, {_NAME: MixEntry(epochs=1.0)})
    sampler = StepSampler(SampleBatches(SampleOrder(parts, _SEED), _BATCH))
    dataset = VisualPromptDataset([source], encoder)
    return StepLoader(dataset, sampler, dataset.sample_encoder.collator(), num_workers=workers)


def _plain(
    paths: list[Path],
    make: Callable[[dict[str, Any]], EncodedSample],
    decoder: str | None,
    workers: int,
) -> Iterable[Any]:
    urls = [str(path) for path in paths]
    pipeline: Any = WebDataset(urls, shardshuffle=len(urls), seed=_SEED)
    pipeline = pipeline.shuffle(_NUM_SAMPLES)
    if decoder is not None:
        pipeline = pipeline.map(_keep_bytes).decode(decoder)
    pipeline = pipeline.map(make).batched(_BATCH, collation_fn=_collate)
    return DataLoader(pipeline, batch_size=None, num_workers=workers, persistent_workers=True)


def _collate(samples: list[EncodedSample]) -> dict[str, Any]:
    """Pad and stack as one would with torch alone."""
    ids, labels = (
        pad_sequence([torch.as_tensor(column) for column in columns], True, padding)
        for columns, padding in (
            ([s.encoded.input_ids for s in samples], 0),
            ([s.encoded.labels for s in samples], IGNORE_INDEX),
        )
    )
    lengths = torch.tensor([s.encoded.length for s in samples])
    pictures = [s.pixel_values for s in samples if s.pixel_values is not None]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.arange(ids.shape[1]) < lengths[:, None],
        "pixel_values": torch.stack(pictures),
        "keys": [s.key for s in samples],
    }


def _keep_bytes(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "bytes": raw["jpg"]}  # a record's boxes are checked by the picture's header


def _from_bytes(raw: dict[str, Any], encoder: SampleEncoder) -> EncodedSample:
    return encoder.encode(_parse(raw["__key__"], json.loads(raw["json"]), raw["jpg"]))


def _from_pillow(raw: dict[str, Any], encoder: SampleEncoder) -> EncodedSample:
    key, picture = raw["__key__"], raw["jpg"]
    sample = _parse(key, raw["json"], raw["bytes"])
    rng = marks_generator(_SEED, 0, _NAME, key)
    plan = sample_plan(sample.regions, picture.size, encoder.policies[sample.policy], rng)
    encoded = encoder.conversation_encoder.encode(refer_turns(sample.turns, plan, rng))
    return EncodedSample(key, encoded, encoder.transform(render_plan(picture, plan)))


def _parse(key: str, record: dict[str, Any], picture: bytes) -> Sample:
    rng = words_generator(_SEED, 0, _NAME, key)
    return parse_record(record, key=key, dataset=_NAME, image=picture, kind="auto", rng=rng)


def _manifest() -> Manifest:
    raw = {
        "schema_version": 2,
        "name": _NAME,
        "stage": "finetune",
        "licence": "none",
        "shards": f"{_NAME}/*.tar",
    }
    return parse_manifest(raw, where=_NAME)


def text_encoder() -> SampleEncoder:
    """Return the encoder of the tiny model's tokenizer with pictures of the real size."""
    spec = tiny_spec()
    tokenizer = load_tokenizer(spec)
    encoder = ConversationEncoder(
        tokenizer,
        "llava_v1",
        image_token_id=token_id(tokenizer, spec.image_token),
        image_seq_length=576,
        max_length=2048,
    )
    transform = ImageTransform(_INPUT, "pad", CLIP.preprocessing)
    return SampleEncoder({"regions": VisualPromptPolicy()}, encoder, transform, _SEED)


def _samples() -> Iterator[tuple[str, dict[str, Any], bytes, str]]:
    """Yield dialogues about two regions of a picture, each another cut of a photograph."""
    data = importlib.resources.files("skimage.data")
    photographs = [
        Image.open(io.BytesIO(data.joinpath(name).read_bytes())).convert("RGB")
        for name in _PHOTOGRAPHS
    ]
    rng = np.random.default_rng(_SEED)
    for number in range(_NUM_SAMPLES):
        photograph = photographs[number % len(photographs)]
        w, h = photograph.size
        left, top = rng.uniform(0, 0.4, 2) * (w, h)
        box = (left, top, left + 0.6 * w, top + 0.6 * h)
        picture = photograph.resize(_SIZE, Image.Resampling.BICUBIC, box=box)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        key = f"s{number:04d}"
        says = ("What is <bbox0>?", "A part of a photograph. " * 8, "And <bbox1>?", "Another. " * 9)
        record: dict[str, Any] = {
            "id": key,
            "image": f"{key}.jpg",
            "bboxes": [[40, 60, 300, 400], [320, 100, 600, 300]],
            "conversations": [
                {"from": ("human", "gpt")[n % 2], "value": ("<image>\n" if n == 0 else "") + text}
                for n, text in enumerate(says)
            ],
        }
        yield key, record, buffer.getvalue(), "jpg"


def _measure_packing(pack_length: int) -> dict[str, Any]:
    stored = json.loads(_HISTOGRAM.read_text())
    width, counts = stored["bin_width"], np.array([stored["with_image"], stored["text_only"]])
    times: list[float] = []
    fills: list[float] = []
    for seed in range(_ROUNDS):
        rng = np.random.default_rng(seed)
        drawn = rng.choice(counts.size, 4096, p=counts.ravel() / counts.sum())
        lengths = drawn % counts.shape[1] * width + rng.integers(1, width + 1, 4096)
        lengths = lengths.astype(np.int32)
        began = time.perf_counter()
        packs = plan_packs(lengths, drawn < counts.shape[1], pack_length=pack_length, max_images=16)
        times.append(1000 * (time.perf_counter() - began))
        fills.append(float(lengths.sum()) / (len(packs) * pack_length))
    return {"pack_length": pack_length, "plan_ms": median(times), "fill": median(fills)}
