"""Two processes on the CPU with gloo give the loss and the gradients of one."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.types import Batch

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]


class RankLoader(Loader):
    """Every second micro-batch of a loader; the order of the samples is that of one process."""

    def __len__(self) -> int:
        return super().__len__() // 2

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(super().__iter__()):
            if index % 2 == torch.distributed.get_rank():
                yield batch


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ddp_equals_one_process_also_with_a_rank_of_text_only(
    make_module, make_trainer, accumulate
):
    # Samples 2, 3 and 6, 7 are text only: with micro-batches of 2, all that rank 1 gets.
    samples = make_samples(16, text_only=lambda i: i % 4 >= 2)
    found = []
    for devices in (1, 2):
        trainer = make_trainer(
            f"devices{devices}",
            devices=devices,
            strategy="ddp_fork" if devices == 2 else "auto",
            accumulate_grad_batches=accumulate * (2 // devices),
            use_distributed_sampler=False,
            gradient_clip_val=0.5,
        )
        loader = Loader if devices == 1 else RankLoader
        trainer.fit(make_module(), loader(samples, 2, 2 * accumulate))
        with Path(trainer.logger.log_dir, "metrics.csv").open(newline="") as file:
            found.append([{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)])

    one, two = found
    assert len(one) == len(two) == 4 // accumulate
    for row_of_one, row_of_two in zip(one, two, strict=True):
        assert row_of_one == pytest.approx(row_of_two, rel=1e-5)
