"""A real run to Weights & Biases, offline, read back from the file it leaves."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.toy_training import LIGHTNING_WARNINGS, Loader, make_samples
from vipllava.checkpoints.loading import load_tokenizer
from vipllava.config.composing import compose_job
from vipllava.training.callbacks import StartLog
from vipllava.training.metrics import Throughput
from vipllava.training.run import run_training
from vipllava.training.sample_log import SampleTable
from vipllava.types import VipLlavaError

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, offline and without a key, with every file of its own below the test."""
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_DATA_DIR": str(tmp_path / "staging"),
    }.items():
        monkeypatch.setenv(name, value)
    return pytest.importorskip("wandb")


def records(file: Path) -> list[Any]:
    """Read a run's file: protobuf records in the log format of LevelDB, behind 7 bytes of header.

    A block of 32 KiB holds fragments: checksum (4 bytes), length (2), kind (1: whole, 2: first,
    3: middle, 4: last), data; what is left of a block after the last fragment is zero.
    """
    record_type = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    content = file.read_bytes()
    assert content[:4] in (b":W&B", b"")
    found, data, place = [], b"", 7
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if left < 7 or kind == 0:
            place += left
            continue
        if place + 7 + length > len(content):  # still being written
            break
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = record_type()
            record.ParseFromString(data)
            found.append(record)
            data = b""
    return found


def finished_records(file: Path) -> list[Any]:
    """Read the file of a run that has ended; wandb's own process may still be writing it."""
    until = time.monotonic() + 30
    while True:
        found = records(file)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < until, f"{file} has no end"
        time.sleep(0.05)


def test_a_resumed_run_is_the_same_run_on_wandb(wandb, config, tmp_path):
    run_dir = tmp_path / "runs" / "tiny-pretrain"

    def start(*changes: str) -> tuple[str, list[int]]:
        """Return the run's id and the steps whose loss was logged."""
        job = "stage=pretrain", "stage.epochs=1", "stage.checkpoint_steps=1", "logger=wandb"
        team = "logger.wandb.entity=team", "callbacks.samples=null"
        try:
            run_training(config(*job, *team, *changes))
        finally:
            wandb.finish()
        (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
        read = finished_records(file)
        # wandb names the folder by the second, and these runs are short.
        shutil.rmtree(run_dir / "wandb")
        (run,) = [record.run for record in read if record.WhichOneof("record_type") == "run"]
        assert run.entity == "team"
        rows = [
            {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            for record in read
            if record.WhichOneof("record_type") == "history"
        ]
        steps = [int(row["trainer/global_step"]) for row in rows if "train/loss" in row]
        return run.run_id, steps

    first, steps = start()
    assert re.fullmatch(r"tiny-pretrain-[0-9a-f]{8}", first)
    assert steps == [0, 1, 2]
    # As if killed behind its second step.
    (run_dir / "checkpoints" / "000003.ckpt").unlink()
    (run_dir / "finished.yaml").unlink()
    assert start() == (first, [2])
    assert start("resume=never", "logger.wandb.id=chosen") == ("chosen", [0, 1, 2])
    assert (run_dir / "before-2" / "wandb_id").read_text().strip() == first
    anew, steps = start("resume=never")
    assert anew not in (first, "chosen")
    assert steps == [0, 1, 2]


def test_a_server_that_cannot_be_reached_is_one_message(wandb, config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()  # it has read the variables of an earlier test
    job = "stage=pretrain", "logger=wandb", "logger.wandb.settings={init_timeout: 1}"
    with pytest.raises(VipLlavaError, match=r"W&B cannot be reached .*: .* set WANDB_MODE=offline"):
        run_training(config(*job))
    wandb.teardown()
    assert not (tmp_path / "runs" / "tiny-pretrain" / "checkpoints").exists()


def test_every_argument_of_wandb_has_a_key(wandb):
    made_here = {"dir", "anonymous"}  # Lightning's save_dir; a setting that W&B has given up
    keys = set(compose_job(["logger=wandb"]).logger.wandb)
    assert set(inspect.signature(wandb.init).parameters) - made_here <= keys


def test_pictures_of_tables_wait_in_the_runs_folder(wandb, config, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DATA_DIR")
    try:
        run_training(config("stage=finetune", "stage.checkpoint=null", "logger=wandb"))
    finally:
        wandb.finish()
    folder = tmp_path / "runs" / "tiny-finetune"
    waiting = [p.read_bytes() for p in (folder / "wandb").rglob("staging/*") if p.is_file()]
    lines = (folder / "samples" / "000000.jsonl").read_text().splitlines()
    shown = [json.loads(line) for line in lines]
    num_images = sum(sample["image"] is not None for sample in shown)
    assert sum(content.startswith(b"\x89PNG") for content in waiting) == num_images > 0
    assert all(sample["question"].startswith("USER: ") for sample in shown), shown


def test_an_offline_run_holds_metrics_tables_and_the_start(
    wandb, make_module, make_trainer, spec, tmp_path
):
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(
        name="toy", project="vipllava", group="search", job_type="pretrain", save_dir=tmp_path
    )
    callbacks = [
        StartLog(tmp_path, {"stage": {"learning_rate": 0.01}}),
        Throughput(2),
        SampleTable(tmp_path, 2, num_samples=2, tokenizer=load_tokenizer(spec)),
    ]
    trainer = make_trainer(logger=logger, callbacks=callbacks)
    try:
        trainer.fit(make_module(), Loader(make_samples(12), 4, 1))
    finally:
        wandb.finish()

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    read = finished_records(file)
    (run,) = [record.run for record in read if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, run.job_type) == ("vipllava", "search", "pretrain")
    history: list[dict[str, Any]] = []
    for record in read:
        if record.WhichOneof("record_type") == "history":
            history.append({})
            for item in record.history.item:
                first, *rest = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if rest:
                    history[-1].setdefault(first, {})[".".join(rest)] = value
                else:
                    history[-1][first] = value
    losses = {r["trainer/global_step"]: r["train/loss"] for r in history if "train/loss" in r}
    assert sorted(losses) == [0, 1, 2]
    windows = [row for row in history if "train/samples_per_second" in row]
    assert [row["trainer/global_step"] for row in windows] == [1, 2]
    assert all(row["train/loss/set"] > 0 for row in windows)
    config: dict[str, Any] = {}
    for record in read:
        for item in [*record.config.update, *record.run.config.update]:
            config[item.key or item.nested_key[0]] = json.loads(item.value_json)
    assert config["stage"] == {"learning_rate": 0.01}
    assert config["environment"]["packages"]["torch"]

    tables = [row["samples"] for row in history if "samples" in row]
    assert [(table["_type"], table["nrows"]) for table in tables] == [("table-file", 2)] * 2
    table = json.loads((file.parent / "files" / tables[0]["path"]).read_text())
    assert table["columns"] == ["step", "key", "image", "question", "target", "prediction"]
    assert [row[:2] for row in table["data"]] == [[0, "set/0"], [0, "set/1"]]
    # The run's own copy only says that there is a picture; the table's artifact has it.
    assert [row[2] for row in table["data"]] == ["Image", "Image"]
    stored = [
        entry.path
        for record in read
        if record.WhichOneof("record_type") == "artifact"
        for entry in record.artifact.manifest.contents
    ]
    assert sum(path.startswith("media/images/") for path in stored) == 4
