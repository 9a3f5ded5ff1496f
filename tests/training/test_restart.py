"""Where a run begins, what may have changed since, and the log that goes on with it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from vipllava.files import atomic as whole_files
from vipllava.training.csv_log import CsvLog, cut_csv
from vipllava.training.restart import (
    Goal,
    Restart,
    differences,
    find_restart,
    list_checkpoints,
    mark_finished,
    prepare_run,
    wandb_id,
)
from vipllava.types import CheckpointError, ConfigError

JOB = {
    "seed": 1,
    "stage": {"name": "finetune", "max_length": 2048, "too_long": "cut", "learning_rate": 2e-5},
    "data": {"manifest": "mine", "num_workers": 4},
    "strategy": {"name": "ddp"},
    "module": {"model": {"language_model": "a", "dtype": "float32"}},
}


def _job(**changes: object) -> dict:
    """Return the job with dotted keys changed."""
    import copy

    job = copy.deepcopy(JOB)
    for key, value in changes.items():
        *path, last = key.split("__")
        node: dict = job
        for name in path:
            node = node[name]
        node[last] = value
    return job


def _export(run_dir: Path) -> Path:
    """Write an export's weights, and return their file."""
    file = run_dir / "export" / "model.safetensors"
    file.parent.mkdir()
    save_file({"weight": torch.ones(3)}, file)
    return file


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run that was started and has two checkpoints, one of them a folder."""
    prepare_run(tmp_path / "run", JOB)
    checkpoints = tmp_path / "run" / "checkpoints"
    parts = checkpoints / "000010.ckpt"
    parts.mkdir(parents=True)
    torch.save({"weight": torch.ones(3)}, parts / "0.pt")
    index = {"files": {"0.pt": (parts / "0.pt").stat().st_size}}
    (parts / "checkpoint.json").write_text(json.dumps(index))
    torch.save({"global_step": 9, "weight": torch.ones(9)}, checkpoints / "000009.ckpt")
    torch.save({"global_step": 7}, checkpoints / "best.ckpt")
    (checkpoints / ".000011.ckpt.unfinished").write_bytes(b"half")
    return tmp_path / "run"


def test_only_whole_checkpoints_count(run_dir):
    names = [path.name for path in list_checkpoints(run_dir / "checkpoints")]
    assert names == ["000009.ckpt", "000010.ckpt"]


@pytest.mark.parametrize("values", [{"global_step": 6}, {"run": {"global_step": 6}}])
def test_a_folder_that_is_the_best_says_its_step(run_dir, values):
    """FSDP2's says it itself, DeepSpeed's parts within what Lightning keeps."""
    best = run_dir / "checkpoints" / "best.ckpt"
    best.unlink()
    best.mkdir()
    torch.save(values, best / "meta.pt")
    index = {"files": {"meta.pt": (best / "meta.pt").stat().st_size}}
    (best / "checkpoint.json").write_text(json.dumps(index))
    assert find_restart(run_dir, resume=str(best)) == Restart(best, 6)


@pytest.mark.parametrize(
    ("resume", "checkpoint", "num_steps"),
    [
        ("auto", "000010.ckpt", 10),
        ("never", None, 0),
        ("checkpoints/000009.ckpt", "000009.ckpt", 9),
        ("checkpoints/best.ckpt", "best.ckpt", 7),
    ],
)
def test_every_process_begins_at_the_same_place(
    run_dir, monkeypatch, resume, checkpoint, num_steps
):
    monkeypatch.chdir(run_dir)
    others = find_restart(run_dir, resume=resume)
    first = prepare_run(run_dir, JOB, resume=resume)
    assert first == others
    assert first.num_steps == num_steps
    assert (first.checkpoint.name if first.checkpoint else None) == checkpoint


@pytest.mark.parametrize("launcher", ["SLURM", "TORCHELASTIC"])
@pytest.mark.parametrize("resume", ["never", "checkpoints/000009.ckpt"])
def test_a_job_that_its_launcher_started_again_goes_on(run_dir, monkeypatch, resume, launcher):
    monkeypatch.chdir(run_dir)
    monkeypatch.setenv(f"{launcher}_RESTART_COUNT", "1")
    assert find_restart(run_dir, resume=resume).num_steps == 10
    assert prepare_run(run_dir, JOB, resume=resume).num_steps == 10
    assert not (run_dir / "before-1").exists()
    # Stopped before its first checkpoint: nothing to go on from.
    assert prepare_run(run_dir / "new", JOB, resume=resume).num_steps == (resume != "never") * 9


def test_a_new_run(tmp_path):
    assert prepare_run(tmp_path / "new" / "run", JOB) == Restart(None, 0)
    assert (tmp_path / "new" / "run" / "job.yaml").is_file()


def test_beginning_anew_leaves_the_queues_files_where_they_are(run_dir):
    kept = {".submitit", ".hydra", "train.log", "run.lock"}
    for name in kept:
        (run_dir / name).mkdir()
    prepare_run(run_dir, JOB, resume="never")
    assert {path.name for path in run_dir.iterdir()} == {*kept, "job.yaml", "before-1"}


def test_a_run_without_a_checkpoint_begins_again_aloud(run_dir, caplog):
    shutil.rmtree(run_dir / "checkpoints")
    # Stopped before its first step: nothing to keep, nothing to say.
    assert prepare_run(run_dir, JOB) == Restart(None, 0)
    assert not caplog.records
    log = CsvLog(run_dir / "csv")
    for step in range(3):
        log.log_metrics({"loss": 1.0}, step=step)
    (run_dir / "train.log").write_text("of the start that is under way, too\n")
    assert prepare_run(run_dir, JOB) == find_restart(run_dir) == Restart(None, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "has a log of 3 steps and no checkpoint to go on from" in caplog.text
    assert (run_dir / "before-1" / "csv" / "metrics.csv").read_text().count("\n") == 4
    assert {path.name for path in run_dir.iterdir()} == {"job.yaml", "train.log", "before-1"}


def test_going_back_keeps_later_steps_aside(run_dir, monkeypatch, caplog):
    """They would else be the newest ones, and push the new ones out."""
    monkeypatch.chdir(run_dir)
    CsvLog(run_dir / "csv").log_metrics({"loss": 1.0}, step=9)
    prepare_run(run_dir, JOB, resume="checkpoints/000009.ckpt")
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["000009.ckpt"]
    assert (run_dir / "before-1" / "checkpoints" / "000010.ckpt" / "0.pt").is_file()
    assert (run_dir / "before-1" / "csv" / "metrics.csv").read_text().endswith("9,1.0\n")
    assert "later checkpoints (000010.ckpt)" in caplog.text
    assert find_restart(run_dir).num_steps == 9


@pytest.mark.parametrize("cut", ["cut", "empty", "part"])
def test_a_damaged_newest_checkpoint_is_passed_over(run_dir, caplog, cut):
    checkpoints = run_dir / "checkpoints"
    newest, file = checkpoints / "000012.ckpt", checkpoints / "000012.ckpt"
    if cut == "part":
        shutil.copytree(checkpoints / "000010.ckpt", newest)
        file = newest / "0.pt"
    else:
        shutil.copy(checkpoints / "000009.ckpt", newest)
    os.truncate(file, 0 if cut == "empty" else file.stat().st_size // 2)
    # Whoever reads first, all processes decide alike.
    before = find_restart(run_dir)
    first = prepare_run(run_dir, JOB)
    assert before == first == find_restart(run_dir)
    assert first == Restart(checkpoints / "000010.ckpt", 10)
    assert (checkpoints / "000012.ckpt.damaged").exists()
    names = [path.name for path in list_checkpoints(checkpoints)]
    assert names == ["000009.ckpt", "000010.ckpt"]
    assert f"{newest} is damaged: {file.name} " in caplog.text


def test_where_no_checkpoint_is_whole_nothing_begins(run_dir):
    checkpoints = run_dir / "checkpoints"
    shutil.rmtree(checkpoints / "000010.ckpt")
    os.truncate(checkpoints / "000009.ckpt", 100)
    for decide in (find_restart, lambda run_dir: prepare_run(run_dir, JOB)):
        with pytest.raises(CheckpointError, match=r"(?s)000009.ckpt: .*cut short.*resume=never"):
            decide(run_dir)
    assert (checkpoints / "000009.ckpt").is_file()


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("job.yaml", "job.yaml is empty or cut short"),
        (".", "it has no index of its files"),
        ("checkpoints/000008.ckpt", "000008.ckpt is empty or cut short"),
        ("checkpoints/000007.ckpt", "it does not exist"),
    ],
)
def test_naming_what_is_no_checkpoint_is_one_readable_error(run_dir, tmp_path, named, reason):
    (run_dir / "checkpoints" / "000008.ckpt").write_bytes(b"")
    for other in (run_dir, tmp_path / "other"):
        with pytest.raises(CheckpointError) as error:
            prepare_run(other, JOB, resume=str(run_dir / named))
        assert f"resume={run_dir / named} is no checkpoint to go on from: {reason}" in str(
            error.value
        )
        assert f"{run_dir / 'checkpoints'} has 000009.ckpt, 000010.ckpt: name" in str(error.value)


def test_beginning_anew_loses_nothing(run_dir):
    prepare_run(run_dir, JOB, resume="never")
    assert (run_dir / "before-1" / "checkpoints" / "000009.ckpt").is_file()
    assert not (run_dir / "checkpoints").exists()
    prepare_run(run_dir, JOB, resume="never")
    assert (run_dir / "before-2" / "job.yaml").is_file()


@pytest.mark.parametrize(
    ("goal", "resume", "exported", "finished"),
    [
        (Goal(2), "auto", True, True),
        (Goal(1), "auto", True, True),
        (Goal(1, max_steps=5), "auto", True, True),
        (Goal(1, -1, {"limit_train_batches": 4}), "auto", True, True),
        (Goal(3), "auto", True, False),
        (Goal(2), "auto", False, False),
        (Goal(2), "never", True, False),
        (Goal(2), "checkpoints/000009.ckpt", True, False),
    ],
)
def test_a_run_that_has_ended_is_not_done_again(
    run_dir, monkeypatch, goal, resume, exported, finished
):
    monkeypatch.chdir(run_dir)
    mark_finished(run_dir, Goal(2))
    if exported:
        _export(run_dir)
    # Whoever reads first, all processes decide alike.
    before = find_restart(run_dir, resume=resume, goal=goal)
    first = prepare_run(run_dir, JOB, resume=resume, goal=goal)
    behind = find_restart(run_dir, resume=resume, goal=goal)
    assert before == first == behind
    assert first.finished == finished
    assert (run_dir / "finished.yaml").exists() == finished


@pytest.mark.parametrize("damage", ["deleted", "cut short"])
def test_an_export_that_was_damaged_is_made_again(run_dir, caplog, damage):
    weights = _export(run_dir)
    mark_finished(run_dir, Goal(2))
    assert find_restart(run_dir, goal=Goal(2)).finished
    if damage == "deleted":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-5])
    start = prepare_run(run_dir, JOB, goal=Goal(2))
    assert not start.finished
    assert start.checkpoint is not None
    assert "its export is damaged" in caplog.text


@pytest.mark.parametrize(
    ("done", "asked", "finished"),
    [
        (Goal(1, 6), Goal(1, 6), True),
        (Goal(1, 6), Goal(1, 4), True),
        (Goal(1, 6), Goal(1, 8), False),
        (Goal(1, 6), Goal(1), False),
        (Goal(1, 6), Goal(2, 6), False),
        (Goal(1, -1, {"limit_train_batches": 4}), Goal(1), False),
        (Goal(1, -1, {"limit_train_batches": 4}), Goal(1, -1, {"limit_train_batches": 8}), False),
        (Goal(1, -1, {"limit_train_batches": 4}), Goal(1, -1, {"limit_train_batches": 4}), True),
        (Goal(1, 1, {"fast_dev_run": True}), Goal(1, 1), False),
    ],
)
def test_a_trial_is_not_the_whole_run(run_dir, done, asked, finished):
    _export(run_dir)
    mark_finished(run_dir, done)
    assert prepare_run(run_dir, JOB, goal=asked).finished == finished


def test_a_marker_of_an_earlier_release_counts_as_absent(run_dir, caplog):
    """It may be of a trial."""
    _export(run_dir)
    (run_dir / "finished.yaml").write_text("epochs: 2\n")
    assert not prepare_run(run_dir, JOB).finished
    assert "finished.yaml does not say what was done" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"\xff\xfe", b"{", b"- 1"])
def test_a_marker_that_says_nothing_counts_as_absent(run_dir, caplog, content):
    _export(run_dir)
    for name in ("finished.yaml", "job.yaml", "wandb_id"):
        (run_dir / name).write_bytes(content)
    assert not prepare_run(run_dir, _job(seed=2)).finished
    for name in ("finished.yaml", "job.yaml"):
        assert f"{run_dir / name} cannot be read" in caplog.text
    if content.startswith((b"{", b"-")):
        return
    made = wandb_id(run_dir)
    assert made == wandb_id(run_dir) == (run_dir / "wandb_id").read_text().strip()


def test_markers_are_on_the_disk_before_they_have_their_name(run_dir, monkeypatch):
    done: list[str] = []

    def spy(what: str, name: str) -> None:
        real = getattr(os, name)

        def call(*arguments):
            done.append(what)
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    spy("to the disk", "fsync")
    spy("renamed", "replace")
    for write in (
        lambda: mark_finished(run_dir, Goal()),
        lambda: wandb_id(run_dir),
        lambda: whole_files.write_whole(run_dir / "any", "text"),
    ):
        done.clear()
        write()
        assert done == ["to the disk", "renamed", "to the disk"]


def test_a_run_that_has_ended_was_that_job(run_dir):
    """Its checkpoints take room, and a user may delete them."""
    shutil.rmtree(run_dir / "checkpoints")
    _export(run_dir)
    mark_finished(run_dir, Goal(1))
    assert prepare_run(run_dir, JOB) == Restart(None, 0, finished=True)
    with pytest.raises(ConfigError, match=r"seed: 1 -> 2\nTo go on from export, take these back"):
        prepare_run(run_dir, _job(seed=2))


def test_a_checkpoint_that_is_not_there(run_dir):
    with pytest.raises(
        CheckpointError, match=r"resume=nowhere is no .*not exist.* has 000009.ckpt"
    ):
        prepare_run(run_dir, JOB, resume="nowhere")


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ({"seed": 2}, "seed: 1 -> 2"),
        ({"stage__max_length": 1024}, "stage.max_length: 2048 -> 1024"),
        ({"stage__too_long": "drop_turns"}, "stage.too_long: cut -> drop_turns"),
        ({"data__manifest": "other"}, "data.manifest: mine -> other"),
        ({"module__model__language_model": "b"}, "module.model.language_model: a -> b"),
        ({"strategy__name": "zero3"}, "strategy.name: ddp -> zero3"),
        ({"strategy__name": "fsdp2"}, "strategy.name: ddp -> fsdp2"),
    ],
)
def test_what_changes_data_or_model_is_refused(run_dir, caplog, change, listed):
    before = (run_dir / "job.yaml").read_text()
    with pytest.raises(ConfigError, match="was started with another configuration") as error:
        prepare_run(run_dir, _job(**change))
    assert listed in str(error.value)
    assert (run_dir / "job.yaml").read_text() == before

    with caplog.at_level(logging.WARNING):
        assert prepare_run(run_dir, _job(**change), anyway=True).num_steps == 10
    assert listed in caplog.text


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ({"stage__learning_rate": 1e-5}, "stage.learning_rate: 2e-05 -> 1e-05"),
        ({"data__num_workers": 0}, "data.num_workers: 4 -> 0"),
        ({"strategy__name": "single"}, "strategy.name: ddp -> single"),
        ({"module__model__dtype": "bfloat16"}, "module.model.dtype: float32 -> bfloat16"),
    ],
)
def test_other_changes_are_shown(run_dir, caplog, change, listed):
    with caplog.at_level(logging.INFO):
        assert prepare_run(run_dir, _job(**change)).num_steps == 10
    assert listed in caplog.text
    caplog.clear()
    prepare_run(run_dir, _job(**change))
    assert listed not in caplog.text


@pytest.mark.parametrize("now", ["zero3", "zero3_offload"])
def test_zero_stages_go_on_from_each_other(run_dir, now):
    (run_dir / "job.yaml").write_text(yaml.safe_dump(_job(strategy__name="zero2")))
    assert prepare_run(run_dir, _job(strategy__name=now)).num_steps == 10


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match=r"run_dir=.*cannot be written .*set paths.runs=FOLDER"):
        prepare_run(tmp_path / "runs" / "mine", JOB)


def test_a_job_that_never_saved_may_be_changed(tmp_path):
    prepare_run(tmp_path, JOB)
    assert prepare_run(tmp_path, _job(seed=2)) == Restart(None, 0)


def test_differences_name_what_only_one_has():
    assert differences({"a": {"b": 1}, "c": [1]}, {"a": {}, "c": [1]}) == {
        "a": ("(not set)", {}),
        "a.b": (1, "(not set)"),
    }


class TestCsvLog:
    def test_metrics_of_one_step_share_a_row(self, tmp_path):
        log = CsvLog(tmp_path)
        log.log_metrics({"b": 1.5, "epoch": 0}, step=0)
        log.log_metrics({"a": 2.0}, step=0)
        log.log_metrics({"b": 2.5, "epoch": 0}, step=1)
        assert (tmp_path / "metrics.csv").read_text() == ("epoch,step,a,b\n0,0,2.0,1.5\n0,1,,2.5\n")
        log.log_metrics({"Zürich": 3.0}, step=1)
        log.log_metrics({"c": 4.0}, step=2)
        assert (tmp_path / "metrics.csv").read_text(encoding="utf-8") == (
            "epoch,step,Zürich,a,b,c\n0,0,,2.0,1.5,\n0,1,3.0,,2.5,\n,2,,,,4.0\n"
        )

    def test_a_resumed_run_goes_on_below_its_checkpoint(self, tmp_path):
        path = tmp_path / "metrics.csv"
        whole = CsvLog(tmp_path)
        for step in range(4):
            whole.log_metrics({"loss": step / 3}, step=step)
        expected = path.read_text()
        with path.open("a") as file:
            file.write("4,1.2")  # a row that a kill cut short
        assert cut_csv(path, 2) == 2
        assert path.read_text() == "".join(expected.splitlines(keepends=True)[:3])
        again = CsvLog(tmp_path)
        for step in range(2, 4):
            again.log_metrics({"loss": step / 3}, step=step)
        assert path.read_text() == expected

    def test_nothing_to_cut(self, tmp_path):
        assert cut_csv(tmp_path / "metrics.csv", 3) == 0
        (tmp_path / "metrics.csv").write_text("half a head")
        cut_csv(tmp_path / "metrics.csv", 3)
        assert not (tmp_path / "metrics.csv").exists()


def test_a_run_copied_elsewhere_goes_on_with_the_same_model(run_dir, tmp_path):
    """What a model holds decides, not where it lies: another checkout has other paths."""
    for place in ("here", "there", "other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"WEIGHTS")

    def job(place: str) -> dict:
        model = JOB["module"]["model"] | {"vision_tower": str(tmp_path / place)}
        return JOB | {"module": JOB["module"] | {"model": model}}

    shutil.rmtree(run_dir)
    prepare_run(run_dir, job("here"))
    (run_dir / "checkpoints").mkdir()
    torch.save({"global_step": 5}, run_dir / "checkpoints" / "000005.ckpt")
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(ConfigError, match=r"module\.model\.vision_tower: .*here -> .*other"):
        prepare_run(run_dir, job("other"))
    assert prepare_run(run_dir, job("there")).num_steps == 5
    # Once more: what it says of itself is now of there.
    shutil.rmtree(tmp_path / "there")
    with pytest.raises(ConfigError, match=r"there -> .*other"):
        prepare_run(run_dir, job("other"))
