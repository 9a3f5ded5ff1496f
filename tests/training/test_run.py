"""A stage and the next from the project's own configuration, on tiny data in tars."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import lightning
import pytest
import torch
from hydra.utils import instantiate

from vipllava.checkpoints.export_meta import load_meta
from vipllava.checkpoints.llava_format import read_projector
from vipllava.checkpoints.loading import open_source
from vipllava.models.tensor_files import read_tensor
from vipllava.training import run
from vipllava.training.run import run_training
from vipllava.types import CheckpointError, VipLlavaError


def _metrics(run_dir: Path) -> list[dict[str, str]]:
    (path,) = run_dir.rglob("metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_stages_from_the_projects_configuration(config, tmp_path):
    first = run_training(config("stage=pretrain", "stage.epochs=1"))
    second = run_training(config("stage=finetune", "stage.epochs=1"))

    assert first == tmp_path / "runs" / "tiny-pretrain" / "export"
    assert second == tmp_path / "runs" / "tiny-finetune" / "export"
    assert (load_meta(first).stage, load_meta(first).chat_template) == ("pretrain", "plain")
    assert load_meta(first).image_aspect == "square"
    assert (load_meta(second).stage, load_meta(second).chat_template) == ("finetune", "llava_v1")
    assert not (second.parent / "projector").exists()
    projector = read_projector(first.parent / "projector")
    exported = open_source(str(first)).tensors
    assert len(projector) == 6
    for name, weight in projector.items():
        assert torch.equal(read_tensor(weight), read_tensor(exported[name])), name
    before, after = (open_source(str(f)).network().state_dict() for f in (first, second))
    changed = {name.split(".")[1] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector", "language_model", "weight"}  # lm_head.weight
    metrics = _metrics(first.parent)
    # 10 samples, 4 a step: two whole global batches and a remainder.
    assert [row["step"] for row in metrics] == ["0", "1", "2"]
    assert {"train/loss", "train/lr", "train/grad_norm", "train/supervised_tokens"} <= set(
        metrics[0]
    )
    assert {"train/samples_per_second", "data/wait_share", "data/quarantined_total"} <= set(
        metrics[0]
    )
    assert "train/loss/toy" in metrics[0]
    shown = (first.parent / "samples" / "000000.jsonl").read_text().splitlines()
    # The first micro-batch; s005 has a picture, s004 has none.
    assert [(row["key"], row["image"], row["target"]) for row in map(json.loads, shown)] == [
        ("toy/s005", "000000-0.jpg", "yesyes"),
        ("toy/s004", None, "yes"),
    ]


def test_a_run_that_has_ended_exports_again_at_most(config, tmp_path, caplog):
    caplog.set_level("INFO")
    run_dir = tmp_path / "runs" / "tiny-pretrain"
    export = run_training(config("stage=pretrain", "stage.epochs=1"))
    weights, metrics = (export / "model.safetensors").read_bytes(), _metrics(run_dir)

    caplog.clear()
    written = (export / "model.safetensors").stat().st_mtime_ns
    assert run_training(config("stage=pretrain", "stage.epochs=1")) == export
    assert "has ended already" in caplog.text
    assert (export / "model.safetensors").stat().st_mtime_ns == written

    shutil.rmtree(export)
    run_training(config("stage=pretrain", "stage.epochs=1"))
    assert (export / "model.safetensors").read_bytes() == weights
    assert _metrics(run_dir) == metrics

    run_training(config("stage=pretrain", "stage.epochs=2"))
    assert [row["step"] for row in _metrics(run_dir)] == ["0", "1", "2", "3", "4", "5"]


def _steps(run_dir: Path) -> list[int]:
    return [int(row["step"]) for row in _metrics(run_dir) if row["train/loss"]]


def test_a_run_that_has_ended_by_steps_exports_again_at_most(config, tmp_path, caplog):
    caplog.set_level("INFO")
    run_dir = tmp_path / "runs" / "tiny-pretrain"
    export = run_training(config("stage=pretrain", "trainer.max_steps=2"))
    weights, metrics = (export / "model.safetensors").read_bytes(), _metrics(run_dir)
    assert _steps(run_dir) == [0, 1]

    written = (export / "model.safetensors").stat().st_mtime_ns
    run_training(config("stage=pretrain", "trainer.max_steps=2"))
    assert "has ended already" in caplog.text
    assert (export / "model.safetensors").stat().st_mtime_ns == written

    shutil.rmtree(export)
    run_training(config("stage=pretrain", "trainer.max_steps=2"))
    assert "2 steps and 0 epochs are done, and max_steps=2 is asked for: nothing" in caplog.text
    assert (export / "model.safetensors").read_bytes() == weights
    assert _metrics(run_dir) == metrics

    run_training(config("stage=pretrain", "stage.epochs=1"))
    assert _steps(run_dir) == [0, 1, 2]


def test_fewer_epochs_than_are_done_export_what_is_there(config, tmp_path):
    run_dir = tmp_path / "runs" / "tiny-pretrain"
    export = run_training(config("stage=pretrain", "stage.epochs=2"))
    weights = (export / "model.safetensors").read_bytes()
    shutil.rmtree(export)
    run_training(config("stage=pretrain", "stage.epochs=1"))
    assert (export / "model.safetensors").read_bytes() == weights
    assert _steps(run_dir) == [0, 1, 2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero")  # fast_dev_run
@pytest.mark.parametrize(
    ("trial", "saved"),
    [("+trainer.limit_train_batches=2", ["000001.ckpt"]), ("+trainer.fast_dev_run=1", [])],
)
def test_a_trial_does_not_finish_the_run(config, tmp_path, trial, saved):
    """A trial of one step; an epoch has three, and they have the samples of a whole run."""
    job = ["stage=pretrain", "stage.epochs=1"]
    run_training(config(*job, runs="whole"))
    whole = _metrics(tmp_path / "whole" / "tiny-pretrain")
    run_dir = tmp_path / "runs" / "tiny-pretrain"
    job.append(f"machine.micro_batch_size={2 if 'limit' in trial else 4}")
    run_training(config(*job, trial))
    assert [path.name for path in run_dir.glob("checkpoints/*")] == saved
    written = (run_dir / "export" / "model.safetensors").stat().st_mtime_ns
    run_training(config(*job, trial))
    assert (run_dir / "export" / "model.safetensors").stat().st_mtime_ns == written

    run_training(config(*job))
    tokens = [row["train/supervised_tokens"] for row in whole]
    assert [row["train/supervised_tokens"] for row in _metrics(run_dir)][-2:] == tokens[1:]
    assert (run_dir / "checkpoints" / "000003.ckpt").is_file()


PACKED = (
    "data=packed",
    "stage.max_length=48",
    "stage.pack_length=48",
    "machine.micro_batch_size=1",
    "data.global_batch_size=2",
)


def test_the_last_step_of_packed_epochs_is_a_checkpoint(config, tmp_path):
    """How many steps they have is known when they are over."""
    run_dir = tmp_path / "runs" / "tiny-pretrain"
    job = ["stage=pretrain", "stage.epochs=2", *PACKED]
    export = run_training(config(*job))
    weights, metrics = (export / "model.safetensors").read_bytes(), _metrics(run_dir)
    steps = _steps(run_dir)
    assert 2 < len(steps) < 10
    names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert names == [f"{len(steps):06d}.ckpt"]

    shutil.rmtree(export)
    run_training(config(*job))
    assert (export / "model.safetensors").read_bytes() == weights
    assert _metrics(run_dir) == metrics


@pytest.mark.parametrize("job", [(), PACKED], ids=["shuffled", "packed"])
def test_a_run_shorter_than_the_interval_is_validated_at_its_end(config, tmp_path, job):
    held_out = (
        "stage.epochs=1",
        f"validation.manifest={tmp_path / 'toy.yaml'}",
        "validation.patience=1",
    )
    run_training(config("stage=pretrain", *job, *held_out))
    run_dir = tmp_path / "runs" / "tiny-pretrain"
    steps = _steps(run_dir)
    assert [int(r["step"]) for r in _metrics(run_dir) if r["val/loss"]] == steps[-1:]
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == [f"{len(steps):06d}.ckpt", "best.ckpt"]


def test_a_run_that_its_held_out_loss_has_ended_stays_ended(config, tmp_path):
    job = ["stage=pretrain", "stage.epochs=1", "stage.learning_rate=1e-30"]
    job += ["validation.every_n_steps=1", f"validation.manifest={tmp_path / 'toy.yaml'}"]
    run_dir = tmp_path / "runs" / "tiny-pretrain"
    export = run_training(config(*job, "validation.patience=1"))
    assert _steps(run_dir) == [0, 1]
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["000002.ckpt", "best.ckpt"]

    shutil.rmtree(export)
    run_training(config(*job, "validation.patience=1"))
    assert export.is_dir()
    assert _steps(run_dir) == [0, 1]
    run_training(config(*job, "validation.patience=5"))
    assert _steps(run_dir) == [0, 1, 2]


def test_a_run_that_ends_leaves_the_group_of_processes(config, tmp_path):
    """Or gloo may abort a process whose work is done, and the launcher calls it a failure."""
    group = f"file://{tmp_path}/group"
    torch.distributed.init_process_group("gloo", init_method=group, rank=0, world_size=1)
    run_training(config("stage=pretrain", "stage.epochs=1"))
    assert not torch.distributed.is_initialized()


def test_a_device_without_memory_says_what_to_change(config, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("vipllava.training.lit_module.supervised_loss_sum", full)
    with pytest.raises(VipLlavaError) as error:
        run_training(config("stage=pretrain"))
    assert str(error.value) == (
        "the device's memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB.): pass "
        "stage.gradient_checkpointing=true (recompute every block), machine.micro_batch_size=N "
        "with an N below 2, or another strategy; the same command with preflight=true says what "
        "fits"
    )


@pytest.mark.parametrize("problem", [None, "RuntimeError: no kernel image"])
@pytest.mark.parametrize("asked", [False, True])
def test_a_kernel_is_tried_before_a_run_relies_on_it(config, monkeypatch, caplog, problem, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setenv("LOCAL_RANK", "3")
    tried: list[torch.device] = []

    def try_kernel(kernel: object, device: torch.device) -> str | None:
        tried.append(device)
        return problem

    monkeypatch.setattr("vipllava.models.attention.find_kernel_problem", try_kernel)
    cfg = config("stage=pretrain", *["machine.attn_implementation=torch_varlen"] * asked)
    spec = replace(
        instantiate(cfg.module.model, _convert_="all"), attn_implementation="torch_varlen"
    )
    cfg.model.spec.attn_implementation = "${machine.attn_implementation}"
    if not asked:
        cfg.machine.attn_implementation = "${vip.attention:}"
    if problem is None:
        assert run._with_proven_attention(cfg, spec).attn_implementation == "torch_varlen"
    elif asked:
        with pytest.raises(VipLlavaError, match=r"H200 .*pass machine\.attn_implementation=sdpa"):
            run._with_proven_attention(cfg, spec)
    else:
        assert run._with_proven_attention(cfg, spec).attn_implementation == "sdpa"
        assert "does not work on NVIDIA H200 (RuntimeError: no kernel image)" in caplog.text
    assert tried == [torch.device("cuda", 3)]  # its own: others would keep a context on device 0


def test_equal_seeds_give_identical_loss_logs(config, tmp_path):
    logs = []
    for runs, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_training(config("stage=pretrain", f"seed={seed}", runs=runs))
        rows = _metrics(tmp_path / runs / "tiny-pretrain")
        # What a clock says is never the same.
        logs.append(
            [{k: v for k, v in r.items() if "_second" not in k and "wait" not in k} for r in rows]
        )
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_weights_are_fetched_and_opened_before_processes_have_a_group(
    config, tmp_path, tiny_sources, monkeypatch
):
    """In it, those that wait for a download are ended after half an hour."""
    language = tmp_path / "language"
    shutil.copytree(tiny_sources.language_model, language)
    (language / "model.safetensors").unlink()
    begun: list[str] = []
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *a, **k: begun.append("fit"))

    with pytest.raises(CheckpointError, match=r"language_model=.*has no weights"):
        run_training(config("stage=pretrain", f"model.spec.language_model={language}"))
    assert begun == []


def test_the_next_stage_needs_the_export_of_the_one_before(config):
    with pytest.raises(CheckpointError, match="tiny-pretrain/export' does not exist"):
        run_training(config("stage=finetune", "stage.epochs=1"))


def test_tensorboard_shows_steps_that_are_done_again_once(config, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    job = "stage=pretrain", "stage.epochs=1", "stage.checkpoint_steps=1", "logger=tensorboard"
    run_training(config(*job))
    run_dir = tmp_path / "runs" / "tiny-pretrain"
    # As if it had been killed behind its second step, whose checkpoint is the newest.
    (run_dir / "checkpoints" / "000003.ckpt").unlink()
    (run_dir / "finished.yaml").unlink()
    run_training(config(*job, "callbacks.samples.every_n_steps=1"))

    found = events.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert len(list((run_dir / "tensorboard").glob("events*"))) == 2
    for metric in ("train/loss", "train/lr", "train/samples_per_second"):
        steps = [event.step for event in found.Scalars(metric)]
        assert steps == ([2] if "second" in metric else [0, 1, 2]), metric
    shown = found.Tensors("samples/0/text_summary")
    assert [event.step for event in shown] == [0, 2]


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_torchrun_inside_a_slurm_job_keeps_its_own_ranks(config, monkeypatch, by_torchrun):
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    if by_torchrun:
        names = ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
        for name in names:
            monkeypatch.setenv(name, "0")
    found = [type(plugin).__name__ for plugin in run._plugins(config("stage=pretrain"))]
    assert ("SLURMEnvironment" in found) is not by_torchrun


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (1, 2)])
def test_a_run_goes_on_with_another_micro_batch(config, before, after, caplog):
    """As on another number of devices: other micro-batches a step, the same steps."""
    caplog.set_level("INFO")
    job = ["stage=pretrain", "stage.epochs=2", "stage.schedule=constant", "stage.warmup_ratio=0"]

    def run(name: str, size: int, *more: str) -> list[float]:
        export = run_training(
            config(*job, f"name={name}", f"machine.micro_batch_size={size}", *more)
        )
        return [float(row["train/loss"]) for row in _metrics(export.parent)]

    whole = run("whole", before)
    assert len(whole) == 6
    assert len(run("changed", before, "trainer.max_steps=2")) == 2
    assert run("changed", after) == pytest.approx(whole, rel=1e-5)
    assert "after 2 steps" in caplog.text
