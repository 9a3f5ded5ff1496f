"""What a person is shown of the training samples."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch
from PIL import Image

from tests.models.tiny_batches import IMAGE, batch_of, encoded_sample
from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.checkpoints.loading import load_tokenizer
from vipllava.models.supervised_loss import Predictions
from vipllava.training.sample_log import SampleTable, ShownSample, log_samples, shown_samples
from vipllava.types import IGNORE_INDEX, PADDING_SEGMENT

pytestmark = LIGHTNING_WARNINGS

NOT = IGNORE_INDEX


@pytest.fixture
def tokenizer(spec):
    return load_tokenizer(spec)


def answers(batch, tokenizer, said: str) -> Predictions:
    """Predictions that spell ``said`` over all supervised positions of a batch."""
    supervised = (batch.labels[:, 1:] != NOT) & (batch.segment_ids[:, 1:] != PADDING_SEGMENT)
    targets = batch.labels[:, 1:][supervised]
    ids = torch.tensor(tokenizer.encode(said, add_special_tokens=False))
    logits = torch.nn.functional.one_hot(ids, len(tokenizer)).float()
    return Predictions(supervised, logits, targets, torch.tensor(0.0))


def test_texts_and_pictures_of_packed_samples(tokenizer):
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def sample(key, turns, pixels):
        tokens, labels = [1], [NOT]
        if pixels is not None:
            tokens, labels = tokens + [IMAGE] * 4, labels + [NOT] * 4
        for question, answer in turns:
            tokens += ids(question) + ids(answer)
            labels += [NOT] * len(ids(question)) + ids(answer)
        return encoded_sample(tokens, labels, pixels, key)

    dark, light = (torch.full((3, 28, 28), value, dtype=torch.uint8) for value in (7, 250))
    samples = [
        sample("a/repeat", [("Nothing here", "")], dark),
        sample("a/1", [("What is this?", "a cup"), ("Where?", "here")], light),
        sample("b/2", [("Hi", "Hello")], None),
        sample("b/3", [("Too many", "x")], dark),
    ]
    batch = batch_of([samples[:2], samples[2:]])
    predictions = answers(batch, tokenizer, "a cap" + "hare" + "Hallo" + "y")
    limits = {"image_token_id": IMAGE, "limit": 2}
    shown = shown_samples(batch, predictions, tokenizer, **limits)
    without = shown_samples(batch, predictions, tokenizer, system="What  is ", **limits)
    assert [s.question for s in without] == ["this?\nWhere?", "Hi"]

    assert [s.key for s in shown] == ["a/1", "b/2"]
    first, second = shown
    assert (first.question, first.target, first.prediction) == (
        "What is this?\nWhere?",
        "a cup\nhere",
        "a cap\nhare",
    )
    assert (second.image, second.target, second.prediction) == (None, "Hello", "Hallo")
    assert first.image is not None
    assert first.image.size == (28, 28)
    assert first.image.getpixel((3, 3)) == (250, 250, 250)


def test_a_run_writes_the_first_step_and_every_second(
    make_module, make_trainer, tokenizer, tmp_path
):
    samples = make_samples(24)
    table = SampleTable(tmp_path, every_n_steps=2, num_samples=3, tokenizer=tokenizer)
    trainer = make_trainer(callbacks=[table], accumulate_grad_batches=2)
    trainer.fit(make_module(), Loader(samples, 4, 2))

    folder = tmp_path / "samples"
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    assert names == ["000000.jsonl", "000002.jsonl"]
    rows = [json.loads(line) for line in (folder / "000002.jsonl").read_text().splitlines()]
    # The first micro-batch of step 2 begins with sample 16.
    assert [row["key"] for row in rows] == ["set/16", "set/17", "set/18"]
    assert [row["image"] for row in rows] == ["000002-0.jpg", "000002-1.jpg", "000002-2.jpg"]
    target = tokenizer.decode(samples[16]["answer"], skip_special_tokens=True)
    assert rows[0]["target"] == " ".join(target.split())
    assert set(rows[0]) == {"step", "key", "image", "question", "target", "prediction"}
    with Image.open(folder / "000002-0.jpg") as image:
        assert image.size == (28, 28)


def test_a_table_changes_no_loss(make_module, make_trainer, tokenizer, tmp_path):
    logs = []
    for name, callbacks in (("with", [SampleTable(tmp_path, 1, tokenizer=tokenizer)]), ("no", [])):
        trainer = make_trainer(name, callbacks=callbacks)
        trainer.fit(make_module(), Loader(make_samples(12), 4, 1))
        trainer.logger.save()
        logs.append((tmp_path / name / "metrics.csv").read_text())
    assert logs[0] == logs[1] != ""


def test_without_a_tokenizer_it_says_so_and_writes_nothing(
    make_module, make_trainer, tmp_path, caplog
):
    with caplog.at_level("INFO", logger="vipllava.training.sample_log"):
        make_trainer(callbacks=[SampleTable(tmp_path)]).fit(
            make_module(), Loader(make_samples(4), 4, 1)
        )
    assert "no table of samples: the training data have no tokenizer" in caplog.text
    assert not (tmp_path / "samples").exists()


def test_wandb_gets_a_table(monkeypatch):
    """As far as that goes without the package; tests/training/test_wandb.py runs it."""
    from lightning.pytorch.loggers import WandbLogger

    tables = []

    class Recorder(WandbLogger):
        def __init__(self) -> None:
            pass

        def log_table(self, key, columns=None, data=None, dataframe=None, step=None) -> None:
            tables.append((key, columns, data, step))

    module = ModuleType("wandb")
    module.Image = lambda image: ("image", image.size)
    monkeypatch.setitem(sys.modules, "wandb", module)
    shown = [
        ShownSample("a/1", Image.new("RGB", (8, 4)), "Q", "T", "P"),
        ShownSample("a/2", None, "Q2", "T2", "P2"),
    ]
    log_samples(Recorder(), shown, 500)
    assert tables == [
        (
            "samples",
            ["step", "key", "image", "question", "target", "prediction"],
            [
                [500, "a/1", ("image", (8, 4)), "Q", "T", "P"],
                [500, "a/2", None, "Q2", "T2", "P2"],
            ],
            500,
        )
    ]


def test_tensorboard_gets_pictures_and_texts(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    log_samples(logger, [ShownSample("a/1", image, "Q", "T", "P")], 500)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == ["samples/0"]
    assert events.Images("samples/0")[0].step == 500
