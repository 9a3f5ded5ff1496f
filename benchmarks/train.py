"""Training steps of the tiny model on this machine: ours against a plain transformers loop.

Both take the same micro-batches of the sample data and the same starting weights, forward and
backward, in turn. The plain loop pads with an attention mask and lets the model compute logits
at every position. Speeds are samples per second, medians over the batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import VipLlavaForConditionalGeneration

from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.conversation import ConversationEncoder
from vipllava.data.collate import collate_packs
from vipllava.data.image_transform import ImageTransform
from vipllava.data.manifest import load_manifest
from vipllava.data.samples import SampleEncoder, SampleSource
from vipllava.models.building import ModelSpec, image_seq_length, token_id
from vipllava.models.freezing import set_trainable
from vipllava.models.image_features import normalise_pixels
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.sample_world.build import ensure_sample_world
from vipllava.sample_world.teach import BASE, load_tiny_policies
from vipllava.types import PADDING_SEGMENT, Batch

ROOT = Path(__file__).resolve().parent.parent
_MICRO_BATCH, _NUM_BATCHES, _WARM_UP = 32, 12, 2
_STAGES = {"pretrain": ["projector"], "finetune": ["projector", "language_model"]}


def tiny_spec() -> ModelSpec:
    """Return the tiny model as ``conf/model/tiny.yaml`` builds it."""
    return ModelSpec(
        vision_tower=str(BASE / "vision_tower"),
        language_model=str(BASE / "language_model"),
        feature_layers=(-1, -2, -3, -4, 1),
        chat_template="llava_v1",
        image_size=112,
        attn_implementation="eager",
    )


def run(data_root: Path = Path("data")) -> dict[str, Any]:
    """Measure both stages; ``speedup`` is ours over plain."""
    ensure_sample_world(data_root)
    rows = [_measure(stage, trainable, data_root) for stage, trainable in _STAGES.items()]
    return {"rows": rows, "speedup": {row["stage"]: row["speedup"] for row in rows}}


def _measure(stage: str, trainable: list[Any], data_root: Path) -> dict[str, Any]:
    spec = tiny_spec()
    model = build_model(spec)
    set_trainable(model, trainable)
    model.train()
    batches = _batches(spec, stage, data_root)

    def ours(batch: Batch) -> torch.Tensor:
        return supervised_loss_sum(model, batch)[0] / batch.num_supervised

    def plain(batch: Batch) -> torch.Tensor:
        return _plain_loss(model, batch)

    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for batch in batches:
        for name, loss in (("ours", ours), ("plain", plain)):
            times[name].append(_timed(loss, batch, model))
    speed = {name: _MICRO_BATCH / median(values[_WARM_UP:]) for name, values in times.items()}
    return {
        "stage": stage,
        "ours_samples_per_s": speed["ours"],
        "plain_samples_per_s": speed["plain"],
        "speedup": speed["ours"] / speed["plain"],
    }


def _batches(spec: ModelSpec, stage: str, data_root: Path) -> list[Batch]:
    tokenizer = load_tokenizer(spec)
    encoder = ConversationEncoder(
        tokenizer,
        "plain" if stage == "pretrain" else spec.chat_template,
        image_token_id=token_id(tokenizer, spec.image_token),
        image_seq_length=image_seq_length(spec),
        max_length=512,
    )
    transform = ImageTransform(spec.image_size, "square" if stage == "pretrain" else "pad")
    samples = SampleEncoder(load_tiny_policies(), encoder, transform, seed=42)
    manifest = load_manifest(f"sample_{stage}", ROOT / "data_manifests")
    source = SampleSource.open(manifest, data_root, seed=42)
    # The plain loop needs a picture in every batch; text-only rows among them are fine.
    return [
        collate_packs(
            [
                [samples.encode(source.sample(index * _MICRO_BATCH + n))]
                for n in range(_MICRO_BATCH)
            ],
            pad_token_id=token_id(tokenizer, spec.pad_token),
            image_size=spec.image_size,
        )
        for index in range(_NUM_BATCHES)
    ]


def _plain_loss(model: VipLlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    output: Any = model(
        input_ids=batch.input_ids,
        attention_mask=(batch.segment_ids != PADDING_SEGMENT).long(),
        pixel_values=normalise_pixels(batch.pixel_values, torch.float32),
        labels=batch.labels,
    )
    return output.loss


def _timed(
    loss: Callable[[Batch], torch.Tensor], batch: Batch, model: VipLlavaForConditionalGeneration
) -> float:
    model.zero_grad()
    began = time.perf_counter()
    loss(batch).backward()
    return time.perf_counter() - began
