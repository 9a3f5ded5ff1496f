"""``train.py preflight=true`` on tiny data and on a job for a machine that is not here."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig
from rich.console import Console

from tests.conftest import byte_tokenizer
from tests.models.test_real_sizes import CLIP, LANGUAGE_MODELS
from tests.toy_data import toy_samples
from vipllava.commands.job import train
from vipllava.commands.preflight import preflight
from vipllava.config import hardware
from vipllava.config.checks import check_plan_config
from vipllava.config.composing import compose_job
from vipllava.config.hardware import CudaDevice, Hardware
from vipllava.forecast import memory as memory_forecast
from vipllava.shards.tars import write_shards
from vipllava.training import preflight as preflight_module
from vipllava.training.job import build_datamodule, model_spec
from vipllava.training.preflight import examine, look_ahead
from vipllava.types import CheckpointError, ConfigError, VipLlavaError

ROOT = Path(__file__).resolve().parents[2]
A100 = CudaDevice("NVIDIA A100-SXM4-80GB", 79.2, (8, 0))
MANIFEST = {"schema_version": 2, "name": "toy", "stage": "finetune", "licence": "none"}
MINE = MANIFEST | {"name": "mine", "shards": "*.tar", "policy": "regions", "num_samples": 10}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any device."""
    monkeypatch.setattr(hardware, "detect", lambda: Hardware(num_cpus=2))


@pytest.fixture
def data(tmp_path) -> list[str]:
    write_shards(toy_samples(10), tmp_path / "toy", prefix="shard", max_samples=6)
    manifest = MANIFEST | {"shards": "toy/*.tar", "policy": "regions"}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(manifest))
    return [
        f"paths.runs={tmp_path / 'runs'}",
        f"paths.cache={tmp_path / 'cache'}",
        f"data.manifest={tmp_path / 'toy.yaml'}",
        f"data.data_root={tmp_path}",
    ]


@pytest.fixture
def tiny(data, tiny_sources) -> list[str]:
    return [
        *data,
        "trainer=cpu",
        f"model.spec.vision_tower={tiny_sources.vision_tower}",
        f"model.spec.language_model={tiny_sources.language_model}",
        "model.spec.feature_layers=[-1,-2,1]",
        "model.spec.image_size=28",
        "stage.global_batch_size=4",
        "machine.micro_batch_size=2",
        "stage.epochs=3",
    ]


@pytest.fixture
def real(data, tmp_path) -> list[str]:
    """7B by its two config.json and a tokenizer, on eight A100; no weights anywhere."""
    for name, config in (("clip", CLIP), ("language_model", LANGUAGE_MODELS["7b"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    byte_tokenizer().save_pretrained(tmp_path / "language_model")
    return [
        *data,
        "model=7b",
        "trainer=8xa100",
        f"model.spec.vision_tower={tmp_path / 'clip'}",
        f"model.spec.language_model={tmp_path / 'language_model'}",
    ]


def job(overrides: list[str]) -> DictConfig:
    cfg = compose_job(["preflight=true", *overrides])
    check_plan_config(cfg)
    return cfg


def run(overrides: list[str]) -> str:
    console = Console(file=io.StringIO(), width=120)
    preflight(job(overrides), console)
    return console.file.getvalue()


def _tokenizer(cfg: DictConfig) -> Any:
    from vipllava.checkpoints.loading import load_tokenizer

    return load_tokenizer(model_spec(cfg))


def test_a_tiny_job(tiny, tmp_path):
    report = examine(job([*tiny, "stage=pretrain"]))

    assert report.problems == ()
    assert (report.num_proved, report.num_linted) == (10, 10)
    assert report.forecast.num_steps == 9  # 10 samples, 4 a step, 3 epochs
    assert report.forecast.samples_per_step == 4
    assert report.forecast.times_seen == {"toy": 3.0}
    trained = {row.part: row.num_trainable for row in report.forecast.parameters}
    assert trained == {"vision_tower": 0, "projector": 4352, "language_model": 0}
    # Float32: 4352 weights and two moments of each.
    assert report.forecast.checkpoint_bytes == 12 * 4352
    assert report.setup.strategy == "single"
    assert not (tmp_path / "runs").exists()
    assert 0 < report.corpus.mean_tokens <= report.corpus.longest


def test_what_is_printed(tiny):
    text = run([*tiny, "stage=pretrain"])
    for piece in (
        "preflight: pretrain of tiny on cpu",
        "labels proved: 10 samples; linted: 10",
        "4,352",
        "nothing stands in the way",
    ):
        assert piece in text, piece


def test_the_lengths_are_those_of_the_jobs_own_tokenizer(tiny):
    report = examine(job([*tiny, "stage=finetune", "stage.max_length=4096"]))
    # One id per byte: the first samples' true lengths, not the index' estimate for words.

    cfg = job([*tiny, "stage=finetune", "stage.checkpoint=null", "stage.max_length=4096"])
    datamodule = build_datamodule(cfg)
    dataset = datamodule.open_dataset()
    lengths = [dataset.measure(item)[0] for item in datamodule.first_items(dataset, 10)]
    assert report.corpus.mean_tokens == pytest.approx(sum(lengths) / len(lengths), rel=0.02)


def test_a_stage_whose_start_is_not_there_yet(tiny):
    report = examine(job([*tiny, "stage=finetune"]))
    assert report.problems == ()
    assert any("tiny-pretrain/export, which is not there yet" in note for note in report.notes)


def test_7b_on_eight_a100_without_any_device(real):
    report = examine(job([*real, "stage=finetune"]))

    assert report.problems == ()
    rows = {row.part: row for row in report.forecast.parameters}
    # 261 tokens of the toy tokenizer fit Llama's 32000 rows.
    assert rows["language_model"].num_trainable == 6_738_415_616
    assert (report.setup.strategy, report.setup.num_devices) == ("zero2", 8)
    assert report.choice is not None
    assert report.choice.strategy == "zero2"
    assert report.largest == 16
    assert report.plan.device == "A100"
    assert report.forecast.hours is not None
    # 558K samples would be seen in hours; these are ten.
    assert 0 < report.forecast.hours < 0.01


def test_lora_and_qlora_of_7b(real):
    for tuning, strategy, bits in (("lora", "zero2", None), ("qlora", "ddp", 4)):
        report = examine(job([*real, "stage=finetune", f"tuning={tuning}"]))
        trained = sum(row.num_trainable for row in report.forecast.parameters)
        assert trained == 319_815_680 + 37_767_168
        assert (report.setup.strategy, report.setup.bits) == (strategy, bits)
        assert report.setup.adapter_dropout


def test_packed_rows_hold_several_pictures(real):
    report = examine(job([*real, "stage=pretrain", "data=packed"]))
    assert report.setup.row_tokens == 4224
    assert 1 < report.setup.row_images <= 16
    assert report.plan.samples_per_row > 1


def test_a_job_that_does_not_fit_names_what_would(real):
    with pytest.raises(VipLlavaError, match="preflight found 1 problem") as caught:
        run([*real, "stage=finetune", "machine.memory_gb=24", "stage.max_length=2048"])
    message = str(caught.value)
    assert "machine.micro_batch_size=16 with strategy=zero2 needs about" in message
    assert "strategy=zero3 machine.micro_batch_size=" in message
    with pytest.raises(VipLlavaError, match=r"a larger machine, tuning=lora or tuning=qlora"):
        run([*real, "stage=finetune", "machine.memory_gb=4"])


def test_captions_are_short_where_no_data_are(real, tmp_path):
    """The recipe's micro-batch fits; at the length of instructions it would seem not to."""
    for path in (tmp_path / "toy").glob("*.tar"):
        path.unlink()
    missing = [*real, "trainer=8xa100_40g", "machine.memory_gb=32", "stage=pretrain"]
    report = examine(job(missing))
    assert (report.corpus.longest, report.corpus.supervised_share) == (768, 0.05)
    (problem,) = report.problems
    assert "GiB" not in problem
    problems = examine(job([*missing, "stage.longest_length=2048"])).problems
    assert any("needs about" in problem for problem in problems)


def test_what_may_just_fit_is_a_note(real):
    every = [*real, "stage=pretrain", "stage.gradient_checkpointing=true"]
    least = examine(job(every)).forecast.memory.total / 0.985 / 2**30
    report = examine(job([*every, f"machine.memory_gb={1.02 * least}"]))
    assert report.problems == ()
    (note,) = [note for note in report.notes if "just fit" in note]
    assert note.startswith("it may just fit, or not: machine.micro_batch_size=32 with strategy=")


def test_the_network_is_forecast_as_it_will_be_built(real):
    cfg = job([*real, "stage=pretrain", "machine.attn_implementation=flash_attention_2"])
    spec = replace(model_spec(cfg), attn_implementation="sdpa")
    assert look_ahead(cfg, _tokenizer(cfg), spec=spec).setup.attention == "sdpa"


def test_the_memory_of_this_machine_where_the_trainer_says_none(real, monkeypatch):
    device = CudaDevice("NVIDIA H200", 139.8, (9, 0))
    monkeypatch.setattr(hardware, "detect", lambda: Hardware((device,), num_cpus=16))
    report = examine(job([*real, "trainer=1gpu", "stage=pretrain"]))
    assert report.capacity == 139.8 * 2**30
    assert report.plan.device == "NVIDIA H200"
    assert report.choice is not None
    assert report.choice.strategy == "single"


def test_missing_data_are_a_problem_and_the_rest_is_still_said(real, tmp_path):
    (tmp_path / "toy" / "shard-000000.tar").rename(tmp_path / "elsewhere.tar")
    (tmp_path / "toy" / "shard-000001.tar").unlink()
    report = examine(job([*real, "stage=finetune"]))
    assert len(report.problems) == 1
    assert "toy" in report.problems[0]
    assert report.num_proved == report.num_linted == 0
    assert report.forecast.num_steps is None
    assert report.setup.row_tokens == 2048
    assert report.corpus.mean_tokens == 774
    assert report.forecast.memory.weights == 2 * report.forecast.export_bytes / 2
    with pytest.raises(VipLlavaError, match="preflight found 1 problem"):
        run([*real, "stage=finetune"])


def test_lint_errors_are_problems_and_its_warnings_are_notes(tiny, tmp_path):
    """A picture that is cut off: the proof of labels reads its header only."""
    samples = list(toy_samples(10))
    key, record, picture, kind = samples[0]
    assert picture is not None
    samples[0] = (key, record, picture[: len(picture) * 3 // 4], kind)
    for path in (tmp_path / "toy").iterdir():
        path.unlink()
    write_shards(samples, tmp_path / "toy", prefix="cut", max_samples=10)
    report = examine(job([*tiny, "stage=pretrain", "lint.min_mark_pixels=1000"]))
    (problem,) = report.problems
    assert "lint of 10 samples of toy: 1 image-corrupt; `vipllava lint --data toy`" in problem
    assert any("mark-small" in note for note in report.notes)


def test_a_full_disk_is_a_problem(tiny, monkeypatch):
    monkeypatch.setattr(preflight_module, "_free_disk", lambda folder: 1000.0)
    report = examine(job([*tiny, "stage=pretrain"]))
    (problem,) = report.problems
    assert "GB free; checkpoints and export need" in problem


def test_the_disk_of_another_machine_is_a_note(real, monkeypatch):
    monkeypatch.setattr(preflight_module, "_free_disk", lambda folder: 1000.0)
    report = examine(job([*real, "stage=finetune"]))
    assert report.problems == ()
    # Two checkpoints that are kept and the one being written: of 6 776 707 072 trained weights the
    # float32 masters and moments, 81.3 GB each; and the export, 14.2.
    assert any("export need 258.1 GB" in note for note in report.notes)
    with_best = examine(job([*real, "stage=finetune", "validation.manifest=sample_finetune"]))
    assert any("export need 339.4 GB" in note for note in with_best.notes)


def test_a_model_that_cannot_be_had_is_a_clear_error(data):
    unknown = "model.spec.language_model=lmsys/vicuna-7b-v9"
    with pytest.raises(CheckpointError, match=r"vicuna-7b-v9' is no folder here .*HF_HUB_OFFLINE"):
        examine(job([*data, "model=7b", "trainer=8xa100", "stage=finetune", unknown]))


@pytest.mark.parametrize(
    ("overrides", "trained", "samples", "missing"),
    [
        ("stage=pretrain model=13b", 52_449_280, 558_000, "vicuna-13b-v1.5' is no folder"),
        ("stage=finetune model=7b", 6_776_707_072, 1_185_000, "7b-pretrain/export, which is not"),
        ("stage=finetune model=7b tuning=lora", 357_582_848, 1_185_000, "vicuna-7b-v1.5"),
        ("stage=finetune model=7b tuning=qlora", 357_582_848, 1_185_000, "vicuna-7b-v1.5"),
        ("stage=gpt4v model=llama3_8b", 8_068_552_704, 0, "llama3_8b-finetune/export"),
        ("stage=task model=phi3_mini", 3_846_261_760, 10, "vip-llava-phi-3-mini-3.8B' is no"),
        ("stage=pretrain model=phi3_mini data=packed", 25_182_208, 558_000, "Phi-3-mini"),
    ],
)
def test_a_published_model_is_forecast_without_any_file_of_it(
    tmp_path, overrides, trained, samples, missing
):
    """No cache and no network: every number that follows from sizes, and what was not looked at."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(MINE))
    mine = f" data.manifest={tmp_path / 'mine.yaml'}" if "stage=task" in overrides else ""
    where = f"{overrides}{mine} trainer=8xa100 paths.runs={tmp_path} data.data_root={tmp_path}"
    report = examine(job(where.split()))

    assert report.problems == ()
    assert sum(row.num_trainable for row in report.forecast.parameters) == trained
    assert sum(part.num_samples for part in report.corpus.datasets) == samples
    assert (report.forecast.num_steps is not None) == bool(samples)
    assert report.choice is not None
    assert (report.num_proved, report.num_linted) == (0, 0)
    text = "\n".join(report.notes)
    assert missing in text
    assert "not looked at: tokenizer, labels, lint, and whether the weights" in text


def test_settings_of_a_published_model_are_checked_without_any_file_of_it(tmp_path):
    wrong = "model.spec.feature_layers=[-2,-30]"
    with pytest.raises(ConfigError, match=r"feature_layers \[-30\] do not exist"):
        examine(job(["stage=pretrain", "model=7b", "trainer=8xa100", wrong]))


def test_without_a_network_the_command_ends_well(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            *"stage=pretrain model=13b trainer=8xa100 preflight=true".split(),
            f"paths.runs={tmp_path / 'runs'}",
            f"paths.data_root={tmp_path / 'data'}",
        ],
        cwd=ROOT,
        env={
            **environment,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing that was looked at stands in the way" in done.stdout
    assert "13,016,519,680" in done.stdout
    assert "not looked at: tokenizer" in done.stdout


def test_the_nodes_own_memory(real, monkeypatch):
    """ZeRO-3 with offload holds masters, moments and gradients of what trains on the host."""
    report = examine(job([*real, "stage=finetune", "strategy=zero3_offload"]))
    host = report.forecast.host
    assert host.trained == 18 * 6_776_182_784
    assert host.total >= host.processes + host.trained
    assert report.host_capacity is None  # of a machine that is not here

    monkeypatch.setattr(hardware, "detect", lambda: Hardware((A100,) * 8, num_cpus=16))
    monkeypatch.setattr(memory_forecast, "machine_memory", lambda: 64 * 2**30)
    report = examine(job([*real, "stage=finetune", "strategy=zero3_offload"]))
    (problem,) = [problem for problem in report.problems if "node's memory" in problem]
    assert "GiB of the node's memory (what stays while it trains: 113.6), which" in problem
    assert "has 64.0: use strategy=zero3, tuning=lora, or a machine" in problem
    cfg = job([*real, "stage=finetune", "stage.checkpoint=null", "strategy=zero3_offload"])
    assert any("which has 64.0" in line for line in look_ahead(cfg, _tokenizer(cfg)).lines)


def test_where_the_host_trains_it_holds_the_network(tiny):
    report = examine(job([*tiny, "stage=pretrain"]))
    memory = report.forecast.memory
    assert report.forecast.host.trained == memory.total - memory.overhead
    assert report.host_capacity is not None


def test_settings_are_checked_and_hardware_is_not(real):
    cfg = compose_job([*real, "stage=finetune", "tuning=qlora", "strategy=zero3"])
    with pytest.raises(ConfigError, match="tuning=qlora does not work with strategy=zero3"):
        check_plan_config(cfg)
    with pytest.raises(ConfigError, match="not a multiple"):
        check_plan_config(compose_job([*real, "stage.global_batch_size=100"]))
    check_plan_config(compose_job([*real, "trainer=multinode", "logger=wandb"]))


def test_the_short_form(real):

    cfg = job([*real, "stage=pretrain"])
    tokenizer = _tokenizer(cfg)
    lines = look_ahead(cfg, tokenizer, build_datamodule(cfg, tokenizer)).lines
    assert lines[0].startswith("forecast: 37,767,168 of 7,079,690,240 parameters train; 1 steps of")
    assert "GiB a device of 78.8 with zero2" in lines[1]
    assert lines[2].endswith(
        "of 32 decoder blocks are recomputed (stage.gradient_checkpointing=auto)"
    )
    assert lines[3].endswith("hours at an MFU of 40%")
    assert len(lines) == 4
    unknown = look_ahead(cfg, tokenizer).lines
    assert "an unknown number of steps of 256 samples, about 153,856 tokens" in unknown[0]


@pytest.mark.parametrize(
    ("overrides", "recomputed"),
    [
        # The fewest that leave a tenth of 80 GB, at the length of captions; as docs/machines.md.
        (["trainer=8xa100"], 17),
        (["trainer=8xa100", "stage.longest_length=2048"], 29),
        (["trainer=multinode", "machine.micro_batch_size=1"], 0),
        # Another node may have other devices, and all have to decide alike.
        (["trainer=multinode", "machine.micro_batch_size=1", "machine.memory_gb=null"], None),
        (["trainer=8xa100", "stage.gradient_checkpointing=true"], None),
        (["trainer=8xa100", "stage.gradient_checkpointing=false"], 0),
        (["trainer=8xa100", "stage.gradient_checkpointing=1"], 1),
        (["trainer=cpu"], None),  # nobody knows what a CPU's job may take
    ],
)
def test_how_many_blocks_are_recomputed(real, overrides, recomputed):
    cfg = job([*real, "stage=pretrain", *overrides])
    assert look_ahead(cfg, _tokenizer(cfg)).setup.recomputed_blocks == recomputed


def test_the_entry_point_stops_behind_it(tiny, tmp_path, capsys):
    train(job([*tiny, "stage=pretrain"]))
    assert "nothing stands in the way" in capsys.readouterr().out
    assert not Path(tmp_path / "runs").exists()
