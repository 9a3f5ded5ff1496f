"""The micro-batches of one optimizer step, made again from where it begins in the stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vipllava.stream.batching import BatchPlan, Cursor
from vipllava.stream.collate import Collator
from vipllava.stream.loader import StepSampler, list_differences, stream_identity
from vipllava.stream.order import Item
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import Batch, CheckpointError


@dataclass(frozen=True, slots=True)
class ReplayedMicroBatch:
    """One micro-batch as it was, and its samples each in a batch of its own."""

    rank: int  # that it was of
    number: int  # among the rank's micro-batches of the step
    batch: Batch  # as it was, but for samples repeated to fill it up, which had no labels
    items: tuple[Item, ...]  # its samples
    single_samples: tuple[Batch, ...]  # a batch of each of them


def replay_step(
    dataset: VisualPromptDataset,
    plan: BatchPlan,
    collator: Collator,
    place: Cursor,
    identity: Mapping[str, Any],
    *,
    world_size: int,
    accumulate: int,
) -> list[ReplayedMicroBatch]:
    """Make the micro-batches of the step that begins at ``place``, rank by rank.

    See :meth:`vipllava.stream.datamodule.VisualPromptDataModule.replay`.
    """
    now = json.loads(json.dumps(stream_identity(dataset, plan)))
    if different := list_differences(identity, now):
        raise CheckpointError(
            "the data are not those of the refused step; pass the overrides that the run had:\n- "
            + "\n- ".join(different)
        )
    in_pack, one_sample = collator.pack_length is not None, replace(collator, pack_length=None)
    batch = next(plan.batches(place), None)
    if batch is None:
        raise CheckpointError(f"no step of the data begins at {place}")
    found: list[ReplayedMicroBatch] = []
    for rank in range(world_size):
        share = StepSampler(plan, accumulate=accumulate, world_size=world_size, rank=rank).share(
            batch
        )
        for number, (rows, repeats) in enumerate(
            zip(share.micro_batches, share.repeats, strict=True)
        ):
            rows = rows[: len(rows) - repeats]
            if not rows:
                continue
            packs = [[dataset.load(item, in_pack=in_pack)[0] for item in row] for row in rows]
            items = tuple(item for row in rows for item in row)
            singles = tuple(one_sample([[sample]]) for pack in packs for sample in pack)
            found.append(ReplayedMicroBatch(rank, number, collator(packs), items, singles))
    return found
