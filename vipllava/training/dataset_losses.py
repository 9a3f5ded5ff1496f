"""The loss of each data set of a mix, from the predictions that training makes anyway.

The training loss is one sum and stays one. Where a micro-batch is of a single data set that sum is
its; otherwise the tokens' losses are worked out once more without a graph, some rows of logits at a
time, so that the peak of memory stays where it was. Sums stay on the device until they are taken:
nothing here waits for it.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vipllava.models.supervised_loss import Predictions
from vipllava.types import Batch

_ROWS = 256
"""Logits looked at together: 0.13 GB of a vocabulary of 128,000 in float32."""


class DatasetLosses:
    """Adds up losses and supervised tokens by data set on this rank; an observer of predictions."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def observe(self, batch: Batch, predictions: Predictions) -> None:
        """Add a micro-batch; one without names of data sets is passed over."""
        known = list(dict.fromkeys(batch.datasets))
        if len(known) == 1:
            total = predictions.loss_sum
            count = torch.full_like(total, len(predictions.targets))
            self._add(known[0], torch.stack([total, count]))
        if len(known) < 2:
            return
        device = predictions.logits.device
        dataset_of_sample = torch.tensor([known.index(name) for name in batch.datasets]).to(device)
        sample = sample_of_position(batch.segment_ids)[:, 1:][predictions.supervised]
        sums = torch.zeros(len(known), 2, device=device)
        for logits, targets, dataset in zip(
            predictions.logits.split(_ROWS),
            predictions.targets.split(_ROWS),
            dataset_of_sample[sample].split(_ROWS),
            strict=True,
        ):
            losses = functional.cross_entropy(logits, targets, reduction="none")
            sums.index_add_(0, dataset, torch.stack([losses, torch.ones_like(losses)], dim=1))
        for name, values in zip(known, sums, strict=True):
            self._add(name, values)

    def take(self) -> dict[str, tuple[float, float]]:
        """Return by data set the summed loss and the number of tokens since the last call."""
        sums, self._sums = self._sums, {}
        return {name: (float(total), float(count)) for name, (total, count) in sums.items()}

    def _add(self, name: str, values: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values


def sample_of_position(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return which of a batch's samples, in the order of its keys, each position belongs to.

    Args:
        segment_ids: int64 [rows, length]; samples of a row count from 0, padding is -1.

    Returns:
        int64 [rows, length]; meaningless on padding.
    """
    per_row = segment_ids.amax(dim=1) + 1
    first = per_row.cumsum(0) - per_row
    return segment_ids + first[:, None]
