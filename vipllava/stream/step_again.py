"""The micro-batches of one optimizer step, made again from where it begins in the stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vipllava.stream.batching import BatchPlan, Cursor
from vipllava.stream.collate import collate_packs
from vipllava.stream.loader import StepSampler, stream_identity
from vipllava.stream.order import Item
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import Batch, CheckpointError


@dataclass(frozen=True, slots=True)
class ReplayedMicroBatch:
    """One micro-batch as it was, and its samples each in a batch of its own.

    Attributes:
        rank: that it was of.
        number: among the rank's micro-batches of the step.
        batch: as it was, but for samples repeated to fill it up, which had no labels.
        items: its samples.
        alone: a batch of each of them.
    """

    rank: int
    number: int
    batch: Batch
    items: tuple[Item, ...]
    alone: tuple[Batch, ...]


def replay_step(
    dataset: VisualPromptDataset,
    plan: BatchPlan,
    place: Cursor,
    identity: Mapping[str, Any],
    *,
    world_size: int,
    accumulate: int,
    pad_token_id: int,
    multiple_of: int = 1,
    pack_length: int | None = None,
) -> list[ReplayedMicroBatch]:
    """Make the micro-batches of the step that begins at ``place``, rank by rank.

    Args:
        dataset: finished samples.
        plan: the sequence of global batches.
        place: where the step begins.
        identity: of the stream that it was taken from, see
            :meth:`vipllava.stream.loader.StepLoader.identity`.
        world_size: ranks.
        accumulate: micro-batches of each rank.
        pad_token_id: id of padding.
        multiple_of: see :func:`collate_packs`, as the next.
        pack_length: length of a packed row, or None.

    Raises:
        CheckpointError: the stream is another one now, or no step begins there.
    """
    now = json.loads(json.dumps(stream_identity(dataset, plan)))
    different = [
        f"{name}: then {identity.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if identity.get(name) != value
    ]
    if different:
        raise CheckpointError(
            "the data are not those of the refused step; pass the overrides that the run had:\n- "
            + "\n- ".join(different)
        )
    options: dict[str, Any] = {
        "pad_token_id": pad_token_id,
        "image_size": dataset.encoder.transform.size,
        "multiple_of": multiple_of,
    }
    found: list[ReplayedMicroBatch] = []
    for rank in range(world_size):
        sampler = StepSampler(plan, accumulate=accumulate, world_size=world_size, rank=rank)
        sampler.start = place
        share = next(iter(sampler), None)
        if share is None:
            raise CheckpointError(f"no step of the data begins at {place}")
        for number, (rows, repeats) in enumerate(
            zip(share.micro_batches, share.repeats, strict=True)
        ):
            rows = rows[: len(rows) - repeats]
            if not rows:
                continue
            in_pack = pack_length is not None
            packs = [[dataset.load(item, in_pack=in_pack)[0] for item in row] for row in rows]
            samples = [sample for pack in packs for sample in pack]
            found.append(
                ReplayedMicroBatch(
                    rank=rank,
                    number=number,
                    batch=collate_packs(packs, pack_length=pack_length, **options),
                    items=tuple(item for row in rows for item in row),
                    alone=tuple(collate_packs([[sample]], **options) for sample in samples),
                )
            )
    return found
