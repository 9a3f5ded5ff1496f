"""A tiny training set in memory, with the contract of the data module's loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from vipllava.types import IGNORE_INDEX, PADDING_SEGMENT, Batch

IMAGE = 259
PAD = 260

LIGHTNING_WARNINGS = [
    # Lightning 2.6 with torch 2.13.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # Frozen parts stay in eval mode on purpose; run_training silences this one itself.
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Loader:
    """Micro-batches of fixed samples, each stamped with its global batch's denominator."""

    def __init__(self, samples: Sequence[dict], micro_batch_size: int, accumulate: int) -> None:
        self.samples = samples
        self.micro_batch_size = micro_batch_size
        self.accumulate = accumulate

    def __len__(self) -> int:
        return len(self.samples) // self.micro_batch_size

    def __iter__(self) -> Iterator[Batch]:
        size = self.micro_batch_size * self.accumulate
        for start in range(0, len(self.samples), size):
            group = self.samples[start : start + size]
            total = sum(len(sample["answer"]) for sample in group)
            for first in range(0, size, self.micro_batch_size):
                yield collate(group[first : first + self.micro_batch_size], total)


def overflow_backwards(module: Any, at_step: int) -> None:
    """Have a gradient overflow in the backward pass of one step; its loss is as it would be.

    Args:
        module: with its network; the step is counted by its trainer.
        at_step: optimizer steps before it.
    """

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (math.inf if module.trainer.global_step == at_step else 1.0)

    def watch(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(overflow)

    module.network.model.multi_modal_projector.register_forward_hook(watch)


def make_samples(count: int, text_only: Callable[[int], bool] = lambda i: i % 4 == 3) -> list[dict]:
    """Random prompts with a picture (but for some) and answers of 1 to 8 tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 259, (length,), generator=generator).tolist()

    samples = []
    for index in range(count):
        has_image = not text_only(index)
        pixels = torch.randint(0, 256, (3, 28, 28), generator=generator, dtype=torch.uint8)
        prompt = [1, *ids(1, 5), *([IMAGE] * 4 if has_image else []), *ids(1, 8)]
        samples.append(
            {
                "key": f"set/{index}",
                "prompt": prompt,
                "answer": ids(1, 9),
                "pixels": pixels if has_image else None,
            }
        )
    return samples


def collate(samples: Sequence[dict], num_supervised_global: int) -> Batch:
    length = max(len(s["prompt"]) + len(s["answer"]) for s in samples)
    rows = []
    for sample in samples:
        prompt, answer = sample["prompt"], sample["answer"]
        real = len(prompt) + len(answer)
        padding = length - real
        rows.append(
            (
                prompt + answer + [PAD] * padding,
                [IGNORE_INDEX] * len(prompt) + answer + [IGNORE_INDEX] * padding,
                [*range(real), *range(padding)],
                [0] * real + [PADDING_SEGMENT] * padding,
            )
        )
    pixels = [s["pixels"] for s in samples if s["pixels"] is not None]
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    return Batch(
        *columns,
        pixel_values=torch.stack(pixels) if pixels else torch.zeros(0, 3, 28, 28).byte(),
        num_supervised_global=num_supervised_global,
        keys=tuple(sample["key"] for sample in samples),
        datasets=tuple(sample["key"].split("/")[0] for sample in samples),
    )
