"""Every command of README and docs is run as it stands there, or is named here with its reason.

Only what a test machine lacks is replaced: models of the hub by tiny ones in the hub's own cache,
published records by a few, ``trainer=...`` by the CPU and one step. That the same commands compose
for the machine that they name, tests/config/test_compose.py holds.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests import tiny_model
from tests.toy_data import encode_picture, said, toy_samples
from tests.training.toy_training import LIGHTNING_WARNINGS
from vipllava import cli
from vipllava.checkpoints.adapter_format import save_adapter
from vipllava.checkpoints.convert import convert
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import load_tokenizer, open_spec
from vipllava.commands import job
from vipllava.config.composing import compose_job
from vipllava.files.atomic import free_path
from vipllava.models.adapters import AdapterSettings, add_adapters
from vipllava.models.building import ModelSpec
from vipllava.sample_world.build import ensure_sample_world
from vipllava.shards.tars import write_shards

pytestmark = LIGHTNING_WARNINGS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    # First, what makes `my_marks`, which other pages use.
    *(ROOT / "docs" / "your_data.md", ROOT / "README.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]
TOWER = "openai/clip-vit-large-patch14-336"
LAYERS = (-2, -5, -8, -11, 6)
PROGRAMS = "vipllava python make torchrun sbatch pip sed mkdir printf WANDB_MODE=offline".split()
ELSEWHERE = {
    "make ": "the Makefile's own",
    "pip install": "installs",
    "sbatch ": "tests/training/test_clusters.py",
    "torchrun ": "tests/training/test_clusters.py",
    "hydra/launcher=slurm": "tests/config/test_launchers.py",
    "optuna": "tests/config/test_sweep.py",
    "answerer=endpoint": "tests/evaluation/test_served.py",
    "judge.base_url": "tests/evaluation/test_served.py",
    " -m ": "a sweep: tests/config/test_sweep.py",
    "sweep-table": "tests/commands/test_sweep_table.py",
    "dashboard": "tests/commands/test_dashboard.py",
    "logger=wandb": "tests/training/test_wandb.py",
    "data fetch": "needs a network; tests/ingest/fetch",
    "--push-to-hub": "tests/checkpoints/test_hub_upload.py",
    "--data-root https": "tests/shards/test_remote.py",
    "llama3_8b": "the stand-in has no tokens of Llama-3; tests/checkpoints",
    "llama-3-8b": "likewise",
    "phi": "likewise, of Phi-3",
    "strategy=zero3": "needs CUDA; tests/training/test_strategies.py",
    "replay=": "needs a refused step; tests/training/test_refused_step.py",
    "bench=sign_letters": "tests/evaluation/test_own_bench.py",
    "bench.manifest=vip_bench": "the published ViP-Bench; tests/evaluation/test_vip_bench.py",
    "benchmarks.run": "tests/test_benchmarks.py",
    "data.mix=": "placeholders of data sets; tests/stream",
    "vipllava chat": "tests/test_documented_uses.py, tests/commands/test_chat.py",
    "vipllava serve": "tests/test_documented_uses.py, tests/serve",
    "vipllava demo": "tests/test_documented_uses.py, tests/serve/page",
    "check-endpoint": "tests/commands/test_check_endpoint.py",
    "benchmarks.serve": "tests/serve/test_soak.py",
    "doctor": "tests/commands/test_doctor.py",
    "vipllava compare": "tests/commands/test_compare.py",
    "vipllava import": "tests/commands/test_import_data.py",
    "data/street": "likewise",
    "vipllava robustness": "tests/commands/test_robustness.py",
    "profiler=torch": "tests/training/test_profiling.py",
}
"""What is run by another test, or cannot be here: a part of the command, and where or why."""
ON_CPU = [
    *("trainer=cpu", "trainer.max_steps=1", "stage.global_batch_size=4", "data.num_workers=0"),
    *("machine.micro_batch_size=2", "callbacks=quiet", "callbacks.samples=null"),
]


def documented() -> list[tuple[str, str]]:
    """Return the lines of code blocks that are commands, with their pages, each once."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        for language, block in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", text):
            for line in block.splitlines() if language in ("", "bash") else ():
                if re.match(rf"({'|'.join(PROGRAMS)}) ", line):
                    command = re.sub(r"\s+# .*", "", line)
                    found.setdefault(" ".join(command.split()), page.name)
    return [(page, command) for command, page in found.items()]


def elsewhere(command: str) -> str | None:
    return next((why for part, why in ELSEWHERE.items() if part in command), None)


COMMANDS = documented()
RUN = [(page, command) for page, command in COMMANDS if elsewhere(command) is None]


def test_what_is_left_out_is_there():
    """A reason that fits no command any more goes."""
    assert len(COMMANDS) > 70
    assert len(RUN) > 40
    assert [part for part in ELSEWHERE if not any(part in command for _, command in COMMANDS)] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_sources) -> Iterator[Path]:
    """The folder of a user who has trained every stage before, and whose hub has tiny models."""
    from huggingface_hub import constants

    here = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / "data_manifests", here / "data_manifests")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.delenv("VIPLLAVA_DATA", raising=False)
        patch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        _make_data(here)
        _make_models(here, tiny_sources)
        yield here


def _make_data(here: Path) -> None:
    ensure_sample_world("data", scale=0.01)
    (here / "data" / "my_marks" / "images").mkdir(parents=True)
    (here / "data" / "my_marks" / "images" / "kitchen.jpg").write_bytes(encode_picture(320, 240))
    record = {
        "id": "kitchen-1", "image": "kitchen.jpg", "bboxes": [[20, 20, 120, 110]],
        "conversations": said("<image>\nWhat is <bbox0>?", "A cup."),
    }  # fmt: skip
    records = [record | {"id": f"kitchen-{number}"} for number in range(8)]
    (here / "data" / "my_marks" / "records.json").write_text(json.dumps(records))
    write_shards(toy_samples(8), here / "data" / "user_data" / "shards")
    mine = {"schema_version": 2, "name": "my_val", "stage": "task", "licence": "none"}
    mine["shards"] = "user_data/shards/*.tar"
    (here / "data_manifests" / "my_val.yaml").write_text(yaml.safe_dump(mine))
    for name in ("llava_pretrain_558k", "vip_llava_stage2_mix", "vip_llava_stage3_mix"):
        manifest = yaml.safe_load((here / "data_manifests" / f"{name}.yaml").read_text())
        folder, file = here / "data" / manifest["image_roots"][0], manifest["annotation_file"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.jpg").write_bytes(encode_picture(64, 48))
        talk = {"image": "a.jpg", "conversations": said("<image>\nWhat is it?", "A cup.")}
        records = [talk | {"id": f"{number}"} for number in range(8)]
        (here / "data" / file).write_text(json.dumps(records))
        assert cli.main(["shards", "build", name, "--num-workers", "0"]) == 0


def _publish(here: Path, source: Path, *names: str) -> None:
    """Put a folder into the hub's cache, as downloaded."""
    for name in names:
        repository = here / "cache" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(source, repository / "snapshots" / ("0" * 40))


def _make_models(here: Path, tiny_sources: Any) -> None:
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=12, num_attention_heads=2,
        image_size=336, patch_size=14,
    )  # fmt: skip
    CLIPVisionModel(tower).save_pretrained(here / "tower")
    language_model = here / "language_model"
    shutil.copytree(tiny_sources.language_model, language_model)
    config = json.loads((language_model / "config.json").read_text())
    config["max_position_embeddings"] = 2048
    (language_model / "config.json").write_text(json.dumps(config))
    _publish(here, here / "tower", TOWER)
    _publish(here, language_model, "lmsys/vicuna-7b-v1.5", "lmsys/vicuna-13b-v1.5")
    spec = ModelSpec(TOWER, "lmsys/vicuna-7b-v1.5", LAYERS, "llava_v1", 336)
    tokenizer = load_tokenizer(spec)
    meta = replace(
        tiny_model.META, image_size=336, image_seq_length=576, feature_layers=LAYERS,
        vision_tower=TOWER, language_model="lmsys/vicuna-7b-v1.5", chat_template="llava_v1",
    )  # fmt: skip
    export = here / "runs" / "7b-pretrain" / "export"
    network = open_spec(spec, tokenizer).network()
    save_export(network, tokenizer, export, meta)
    for run in ("7b-gpt4v", "13b-pretrain", "13b-finetune"):
        shutil.copytree(export, here / "runs" / run / "export")
    job.train(compose_job(["stage=finetune", "model=7b", *ON_CPU]))
    checkpoints = here / "runs" / "7b-finetune" / "checkpoints"
    shutil.copy(checkpoints / "000001.ckpt", checkpoints / "001000.ckpt")
    settings = AdapterSettings(r=2, alpha=4, dropout=0.05)
    add_adapters(network, settings)
    for name, weight in network.named_parameters():
        if "lora_B" in name:  # as trained: at first an adapter changes nothing
            torch.nn.init.normal_(weight, std=0.1)
    adapter = here / "runs" / "my-lora" / "adapter"
    save_adapter(network, adapter, meta, base=str(export), settings=settings)
    _publish(here, export, "llava-hf/vip-llava-7b-hf", "llava-hf/vip-llava-13b-hf")
    original = convert(str(export), here / "original", format="llava").destination
    known = ("7b", "13b", "7b-base", "13b-base", "7b-base-vcr-ft", "7b-refcocog-ft")
    _publish(here, original, *(f"mucai/vip-llava-{name}" for name in known))
    projector = convert(str(export), here / "projector", format="projector").destination
    _publish(here, projector, *(f"mucai/vip-llava-{name}-pretrain" for name in ("7b", "13b")))
    job.train(compose_job(["stage=gpt4v", "stage.checkpoint=null", *ON_CPU]))


@pytest.mark.parametrize(("page", "command"), RUN, ids=[command for _, command in RUN])
def test_it_runs(place: Path, page: str, command: str, capsys):
    words = shlex.split(command.partition(" > ")[0])
    if words[0] in ("sed", "mkdir", "printf"):
        subprocess.run(command, shell=True, check=True)
    elif words[0] == "vipllava" and words[1] not in ("train", "evaluate"):
        small = {
            "lint": ["--num-samples", "4", "--num-workers", "0"],
            "inspect": ["--num-samples", "2"],
        }
        if words[1] == "convert":  # other pages write there, too
            shutil.rmtree(words[3], ignore_errors=True)
        looks = "check" in words or "--strict" in words  # 1: looked at, and not well
        assert cli.main([*words[1:], *small.get(words[1], [])]) in ((0, 1) if looks else (0,))
    elif "evaluate" in words[1]:
        few = ["limit=2", "max_new_tokens=4"]
        job.evaluate(compose_job([*words[2:], *few], config_name="evaluate"))
    elif "--cfg" not in words:
        job.train(_small(words[2:]))


def _small(overrides: list[str]) -> DictConfig:
    """Compose a job for this machine, in a run of its own where there is one already."""
    if "--config-dir" in overrides:
        at = overrides.index("--config-dir")
        folder = Path(overrides[at + 1]).resolve()
        overrides = [f"hydra.searchpath=[{folder}]", *overrides[:at], *overrides[at + 2 :]]
    if "preflight=true" in overrides:  # works without the hardware
        return compose_job(overrides)
    overrides = [word for word in overrides if not word.startswith("trainer=")] + ON_CPU
    cfg = compose_job(overrides)
    if (taken := Path(cfg.run_dir)).exists():
        cfg = compose_job([*overrides, f"name={free_path(f'{taken}-', 2).name}"])
    return cfg
