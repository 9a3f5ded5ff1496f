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

    Args:
        dataset: finished samples.
        plan: the sequence of global batches.
        collator: makes the rows.
        place: where the step begins.
        identity: of the stream that it was taken from, see
            :meth:`vipllava.stream.loader.StepLoader.identity`.
        world_size: ranks.
        accumulate: micro-batches of each rank.

    Raises:
        CheckpointError: the stream is another one now, or no step begins there.
    """
    now = json.loads(json.dumps(stream_identity(dataset, plan)))
    if different := list_differences(identity, now):
        raise CheckpointError(
            "the data are not those of the refused step; pass the overrides that the run had:\n- "
            + "\n- ".join(different)
        )
    in_pack, one_sample = collator.pack_length is not None, replace(collator, pack_length=None)
    found: list[ReplayedMicroBatch] = []
    for rank in range(world_size):
        sampler = StepSampler(plan, accumulate=accumulate, world_size=world_size, rank=rank)
        sampler.start = place
        share = next(iter(sampler), None)
        if share is None:
            raise CheckpointError(f"no step of the data begins at {place}")
        parts = zip(share.micro_batches, share.repeats, strict=True)
        for number, (rows, repeats) in enumerate(parts):
            rows = rows[: len(rows) - repeats]
            if not rows:
                continue
            packs = [[dataset.load(item, in_pack=in_pack)[0] for item in row] for row in rows]
            found.append(
                ReplayedMicroBatch(
                    rank=rank,
                    number=number,
                    batch=collator(packs),
                    items=tuple(item for row in rows for item in row),
                    single_samples=tuple(one_sample([[s]]) for pack in packs for s in pack),
                )
            )
    return found
