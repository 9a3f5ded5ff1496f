"""Speed, waiting and the loss of each data set over windows of steps."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.models.tiny_batches import batch_of, encoded_sample, three_samples
from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.checkpoints.loading import build_model
from vipllava.forecast.architecture import architecture_of
from vipllava.forecast.flops import useful_flops
from vipllava.models.adapters import AdapterSettings
from vipllava.models.supervised_loss import supervised_loss_sum
from vipllava.training import metrics
from vipllava.training.metrics import (
    METRICS,
    BatchFlops,
    DatasetLosses,
    Throughput,
    WindowSums,
    count_flops_of,
    dataset_loss,
    sample_of_position,
    segment_lengths,
    window_metrics,
)
from vipllava.types import Batch

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]


def rows_of(trainer) -> list[dict[str, float]]:
    trainer.logger.save()
    with Path(trainer.logger.log_dir, "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def windows(trainer) -> list[dict[str, float]]:
    return [row for row in rows_of(trainer) if "train/samples_per_second" in row]


def of_two_sets(count: int) -> list[dict]:
    """Samples 0, 1 of one data set, 2, 3 of another, and so on."""
    samples = make_samples(count)
    return [s | {"key": f"{'ab'[n // 2 % 2]}/{n}"} for n, s in enumerate(samples)]


class Mixed(Loader):
    """Pairs one sample of each data set in a micro-batch."""

    def __init__(self, samples, micro_batch_size, accumulate) -> None:
        order = [n + k for n in range(0, len(samples), 4) for k in (0, 2, 1, 3)]
        super().__init__([samples[n] for n in order], micro_batch_size, accumulate)


def test_the_page_explains_every_metric():
    page = (Path(__file__).resolve().parents[2] / "docs" / "logging.md").read_text()
    for metric, meaning in METRICS.items():
        assert f"| `{metric}` | {meaning} |" in page
    assert f"`{dataset_loss('<data set>')}`" in page


def test_metrics_of_a_window_of_two_ranks():
    ranks = [
        WindowSums(4.0, 1.0, 10, 600, 2000, 3e12, 5_000_000_000, {"a": (30.0, 10.0)}),
        WindowSums(5.0, 2.0, 12, 600, 3000, 2e12, 7_000_000_000, {"a": (10.0, 10.0), "b": (6, 3)}),
    ]
    assert window_metrics(ranks, peak_flops=1e12) == {
        "train/samples_per_second": 4.4,
        "train/supervised_tokens_per_second": 120.0,
        "train/tokens_per_second": 1000.0,
        "data/wait_share": 0.4,
        "train/mfu": 0.5,
        "train/memory_gb": 7.0,
        "train/loss/a": 2.0,
        "train/loss/b": 2.0,
    }


def test_what_is_not_known_is_not_logged():
    sums = WindowSums(2.0, None, 10, 600, 2000, useful_flops=1e12)
    assert set(window_metrics([sums])) == {
        "train/samples_per_second",
        "train/supervised_tokens_per_second",
        "train/tokens_per_second",
    }


def test_a_run_logs_a_window_every_two_steps_and_the_rest_at_its_end(make_module, make_trainer):
    samples = make_samples(24)
    tokens = [len(s["prompt"]) + len(s["answer"]) for s in samples]
    answers = [len(s["answer"]) for s in samples]
    clock = count(100, 8)  # begin, log, begin, log: 8 seconds between any two looks
    throughput = Throughput(
        2, useful_flops=lambda batch: float(len(batch.keys)), peak_flops=4.0, clock=clock.__next__
    )
    trainer = make_trainer(callbacks=[throughput], accumulate_grad_batches=2)
    trainer.fit(make_module(), Loader(samples, 4, 2))

    first, last = windows(trainer)
    assert (first["step"], last["step"]) == (1, 2)
    assert first["train/samples_per_second"] == 16 / 8
    assert first["train/tokens_per_second"] == sum(tokens[:16]) / 8
    assert first["train/supervised_tokens_per_second"] == sum(answers[:16]) / 8
    assert first["train/mfu"] == 16 / 8 / 4
    assert last["train/samples_per_second"] == 8 / 8
    assert last["train/tokens_per_second"] == sum(tokens[16:]) / 8
    logged = {name for row in rows_of(trainer) for name in row} - {"step", "epoch"}
    assert logged <= {*METRICS, dataset_loss("set")}
    losses = [row["train/loss"] for row in rows_of(trainer) if "train/loss" in row]
    sums = [loss * sum(answers[8 * n : 8 * n + 8]) for n, loss in enumerate(losses)]
    # One data set: its loss is the steps' by their tokens.
    assert first["train/loss/set"] == pytest.approx(sum(sums[:2]) / sum(answers[:16]), rel=1e-6)


def test_validation_and_repeats_do_not_count():
    ticks = iter([0.0, 10.0, 13.0, 20.0, 20.0])
    throughput = Throughput(1, clock=ticks.__next__)
    logged = []
    trainer = SimpleNamespace(
        global_step=0,
        world_size=1,
        train_dataloader=None,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        loggers=[SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics)))],
    )
    batch = batch_of([[sample] for sample in three_samples()])
    batch.keys, batch.num_repeats = ("set/0", "set/1", "set/0"), 1
    throughput.on_train_start(trainer, None)
    throughput.on_validation_start(trainer, None)
    throughput.on_validation_end(trainer, None)
    trainer.global_step = 1
    throughput.on_train_batch_end(trainer, None, None, batch, 0)

    ((step, metrics),) = logged
    assert step == 0
    assert metrics["train/samples_per_second"] == 2 / (20 - 3)


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("rows", [[[0], [1], [2]], [[0, 1, 2]], [[1], [2, 0]]])
def test_lengths_of_a_batch_are_those_of_its_samples(rows, padding):
    samples = three_samples()
    assert [s.encoded.length for s in samples] == [17, 14, 12]
    lengths = segment_lengths(batch_of([[samples[n] for n in row] for row in rows], padding))
    found = [row[row > 0].tolist() for row in lengths]
    assert found == [[(17, 14, 12)[n] for n in row] for row in rows]


def test_lengths_with_padding_between_samples():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 0]])
    segments = torch.tensor([[0, 0, 0, -1, -1, 1, 1], [-1, 0, 0, 0, 0, 0, 1]])
    batch = Batch(positions, positions, positions, segments, torch.empty(0, 3, 28, 28))
    assert segment_lengths(batch).tolist() == [[0, 0, 3, 0, 0, 0, 2], [0, 0, 0, 0, 0, 5, 1]]


@pytest.mark.parametrize(
    ("trainable", "adapter", "counts"),
    [
        (("projector",), None, ("projector", 0, False)),
        (("projector", "language_model", "vision_tower"), None, ("full", 0, True)),
        (("projector", "language_model"), AdapterSettings(r=4), ("lora", 4, False)),
    ],
)
def test_a_module_says_what_its_work_is(spec, make_module, trainable, adapter, counts):
    if adapter is not None:
        pytest.importorskip("peft")
    module = make_module(trainable=trainable, adapter=adapter)
    module.configure_model()
    assert count_flops_of(module) == BatchFlops(architecture_of(build_model(spec).config), *counts)


def test_a_device_whose_peak_is_known_logs_its_mfu(make_module, make_trainer, monkeypatch):
    monkeypatch.setattr(metrics, "peak_of", lambda device: 1e9)
    module, loader = make_module(), Loader(make_samples(4), 4, 1)
    trainer = make_trainer(callbacks=[Throughput(1, clock=count(0, 8).__next__)])
    trainer.fit(module, loader)
    (row,) = windows(trainer)
    work = float(count_flops_of(module)(next(iter(loader))))
    assert row["train/mfu"] == pytest.approx(work / 8 / 1e9)


@pytest.mark.parametrize("workload", ["projector", "full", "lora"])
def test_work_of_a_batch_is_that_of_its_samples(spec, workload):
    architecture = architecture_of(build_model(spec).config)
    samples = three_samples()
    batch = batch_of([[samples[1]], [samples[2], samples[0]]], padding=3)
    # 17 + 14 + 12 tokens, 4 + 7 + 2 supervised; 289 + 196 + 144; two of the three have a picture.
    assert BatchFlops(architecture, workload, adapter_rank=4)(batch) == useful_flops(
        architecture,
        workload,
        num_samples=3,
        num_tokens=43,
        num_supervised=13,
        num_images=2,
        squared_tokens=629,
        adapter_rank=4,
    )


def test_positions_of_packed_rows_belong_to_their_samples():
    one, two, three = three_samples()
    batch = batch_of([[one, two], [three]], padding=1)
    sample = sample_of_position(batch.segment_ids)
    lengths = [s.encoded.length for s in (one, two, three)]
    assert sample[0, :-1].tolist() == [0] * lengths[0] + [1] * lengths[1]
    assert sample[1, : lengths[2]].tolist() == [2] * lengths[2]


@pytest.mark.parametrize("rows", [[[0], [1], [2]], [[0, 1, 2]], [[1, 2], [0]]])
def test_losses_of_data_sets_are_those_of_their_samples_alone(spec, rows):
    model = build_model(spec)
    names = ("a/x", "b/with/slashes", "a/y")
    samples = [
        encoded_sample(s.encoded.input_ids, s.encoded.labels, s.pixel_values, key)
        for s, key in zip(three_samples(), names, strict=True)
    ]
    losses = DatasetLosses()
    batch = batch_of([[samples[n] for n in row] for row in rows])
    with torch.no_grad():
        with_observer, _ = supervised_loss_sum(model, batch, [losses])
        without, _ = supervised_loss_sum(model, batch)
        alone = [float(supervised_loss_sum(model, batch_of([[sample]]))[0]) for sample in samples]

    assert torch.equal(with_observer, without)
    taken = losses.take()
    assert taken["a"] == pytest.approx((alone[0] + alone[2], 4 + 2), rel=1e-5)
    assert taken["b"] == pytest.approx((alone[1], 7), rel=1e-5)
    assert losses.take() == {}


class RankLoader(Mixed):
    """Every second micro-batch, as the stream deals them out."""

    def __len__(self) -> int:
        return super().__len__() // 2

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(super().__iter__()):
            if index % 2 == torch.distributed.get_rank():
                yield batch


def test_two_ranks_log_what_one_does(make_module, make_trainer):
    found = []
    for devices in (1, 2):
        throughput = Throughput(
            2, useful_flops=lambda batch: 6.0, peak_flops=1.0, clock=count(0, 8).__next__
        )
        trainer = make_trainer(
            f"devices{devices}",
            devices=devices,
            strategy="ddp_fork" if devices == 2 else "auto",
            accumulate_grad_batches=2 // devices,
            use_distributed_sampler=False,
            callbacks=[throughput],
        )
        loader = Mixed if devices == 1 else RankLoader
        trainer.fit(make_module(), loader(of_two_sets(16), 2, 2))
        with Path(trainer.logger.log_dir, "metrics.csv").open(newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        found.append([row for row in rows if "train/tokens_per_second" in row])

    one, two = found
    assert len(one) == len(two) == 2
    assert {"train/loss/a", "train/loss/b"} < set(one[0])
    for row_of_one, row_of_two in zip(one, two, strict=True):
        # The same work by twice the devices in the same (made up) time.
        row_of_one["train/mfu"] /= 2
        assert row_of_one == pytest.approx(row_of_two, rel=1e-5)
