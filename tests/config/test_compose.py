"""Every file of every group, every pair of options of two groups, and the jobs of the docs."""

from __future__ import annotations

import inspect
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from vipllava.config.checks import find_problems, find_target_problems, targets
from vipllava.config.composing import CONFIG_DIR, compose_job
from vipllava.config.hardware import Hardware
from vipllava.config.schema import TRAIN, check_schema

ROOT = CONFIG_DIR.parent
TRAIN_GROUPS = (
    "stage",
    "model",
    "tuning",
    "trainer",
    "strategy",
    "logger",
    "profiler",
    "callbacks",
    "experiment",
    "data",
    "visual_prompts",
    "paths",
    "hydra",
)
GIVEN_WHEN_BUILT = {
    "vipllava.stream.datamodule.VisualPromptDataModule": {
        "conversation_encoder",
        "image_transform",
    },
}
"""Arguments that follow from the model and are added by the code that builds the object."""


def missing_arguments(node: DictConfig) -> set[str]:
    """Return the required arguments of a ``_target_`` node that it does not give."""
    parameters = inspect.signature(get_object(str(node["_target_"]))).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_KEYWORD}
    return required - {p.name for p in parameters if p.kind is p.VAR_POSITIONAL} - set(node)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def resolve(overrides: list[str], config_name: str = "train") -> tuple[DictConfig, Any]:
    """Compose, and work out every value; a task brings its data set."""
    if "stage=task" in overrides:
        overrides = [*overrides, "data.manifest=user_data", "model.manifests.task=user_data"]
    cfg = compose_job(overrides, config_name=config_name)
    return cfg, OmegaConf.to_container(cfg, resolve=True)


def covering_jobs(groups: dict[str, list[str]]) -> list[dict[str, str]]:
    """Return few jobs in which every pair of options of two groups occurs together.

    Greedy: start each job with an uncovered pair, then give every other group the option that
    covers most.
    """
    names = sorted(groups)
    pairs = [
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in groups[a]
        for y in groups[b]
    ]
    uncovered = set(pairs)
    jobs: list[dict[str, str]] = []
    for pair in pairs:
        if pair not in uncovered:
            continue
        job = dict(pair)
        for group in sorted(set(names) - set(job)):
            job[group] = max(
                groups[group],
                key=lambda o: sum(tuple(sorted([(group, o), p])) in uncovered for p in job.items()),
            )
        uncovered.difference_update(itertools.combinations(sorted(job.items()), 2))
        jobs.append(job)
    return jobs


def test_groups_are_all_named_here():
    folders = {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()}
    assert folders == {*TRAIN_GROUPS, "bench", "endpoint"}


def test_the_options_that_were_promised():
    assert options("stage") == ["finetune", "gpt4v", "pretrain", "task"]
    assert options("model") == ["13b", "7b", "llama3_8b", "phi3_mini", "smollm2_135m", "tiny"]
    assert {
        "cpu",
        "1gpu",
        "8xa100",
        "8xa100_40g",
        "8xh100",
        "8xh200",
        "8xv100",
        "8xa6000",
        "8xrtx3090",
        "multinode",
    } < {*options("trainer")}
    assert options("strategy") == ["auto", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]
    assert options("tuning") == ["full", "lora", "qlora"]
    assert options("logger") == ["csv", "tensorboard", "wandb"]
    assert options("profiler") == ["none", "torch"]
    assert {"regions", "vip_bench", "custom", "v7w", "all"} < {*options("bench")}


def test_every_pair_of_options_composes():
    groups = {g: options(g) for g in TRAIN_GROUPS if g not in ("hydra", "experiment")}
    groups["experiment"] = ["null", *options("experiment")]
    jobs = covering_jobs(groups)
    assert len(jobs) < 90  # of 100,000 in the full product
    seen: dict[str, DictConfig] = {}
    for job in jobs:
        overrides = [f"{group}={option}" for group, option in job.items() if option != "null"]
        cfg, values = resolve(overrides)
        assert check_schema(cfg, TRAIN) == [], overrides
        trainer = values["trainer"]
        assert values["data"]["global_batch_size"] == (
            values["data"]["micro_batch_size"]
            * trainer["accumulate_grad_batches"]
            * trainer["devices"]
            * trainer["num_nodes"]
        ), overrides
        for _, node in targets(cfg):
            seen.setdefault(f"{node['_target_']}{sorted(map(str, node))}", cfg)
    assert len(seen) > 10


RECIPE = {"pretrain": 256, "finetune": 128, "gpt4v": 128, "task": 128}
SMALL = ("tiny", "smollm2_135m")


def test_global_batch_is_the_recipes_on_every_trainer():
    # Files of models and stages hold values only, so one can be laid into a composed job.
    models = {name: compose_job([f"model={name}"]).model for name in options("model")}
    stages = {name: compose_job([f"stage={name}"]).stage for name in options("stage")}
    for trainer in options("trainer"):
        cfg = compose_job([f"trainer={trainer}"])
        for model, name in itertools.product(models, stages):
            cfg.model, cfg.stage = models[model], stages[name]
            effective = (
                cfg.machine.micro_batch_size
                * cfg.trainer.accumulate_grad_batches
                * cfg.trainer.devices
                * cfg.trainer.num_nodes
            )
            assert effective == (64 if model in SMALL else RECIPE[name]), (trainer, model, name)


@pytest.mark.parametrize(
    ("stage", "pack_length", "packs"), [("pretrain", 4224, (4, 32)), ("finetune", 4096, (3, 24))]
)
def test_packs_hold_about_the_recipes_samples(
    stage: str, pack_length: int, packs: tuple[int, int]
) -> None:
    """Stage 1: 256 samples of 601 ids are 36.4 packs of 4224; 8 devices x 4 packs make 32 of it."""
    _, values = resolve([f"stage={stage}", "model=7b", "trainer=8xa100", "data=packed"])
    data = values["data"]
    assert data["pack_length"] == pack_length
    assert (data["micro_batch_size"], data["global_batch_size"]) == packs


def test_published_data_are_cut_and_your_own_lose_exchanges() -> None:
    ways = {name: compose_job([f"stage={name}"]).stage.too_long for name in RECIPE}
    assert ways == {"pretrain": "cut", "finetune": "cut", "gpt4v": "cut", "task": "drop_turns"}


@pytest.mark.parametrize("bench", ["regions", "vip_bench"])
def test_evaluation_composes(bench: str):
    cfg, values = resolve([f"bench={bench}"], "evaluate")
    assert values["run_dir"] == f"runs/eval/tiny-gpt4v/{bench}"
    assert values["checkpoint"] == "runs/tiny-gpt4v/export"
    assert find_target_problems(cfg) == []


JOBS = [
    "train.py",
    "train.py stage=pretrain model=13b trainer=8xa100",
    "train.py stage=finetune model=7b trainer=8xa100_40g",
    "train.py stage=finetune model=llama3_8b trainer=8xa100",
    "train.py stage=finetune model=llama3_8b tuning=qlora trainer=8xrtx3090",
    "train.py stage=finetune model=13b tuning=lora trainer=8xa6000 strategy=zero3_offload",
    "train.py stage=gpt4v model=phi3_mini trainer=multinode trainer.num_nodes=4",
    "train.py stage=task model=7b trainer=1gpu data.manifest=user_data stage.learning_rate=2e-6",
    "train.py experiment=quickstart stage=gpt4v",
    "train.py model=7b trainer=8xa100 experiment=released_recipe logger=wandb",
    "evaluate.py bench=vip_bench",
    "evaluate.py bench=regions marks=removed checkpoint=runs/7b-gpt4v/export",
]


PLUGINS = {
    "optuna": "optuna_sweeper",
    "submitit": "submitit_launcher",
    "slurm": "submitit_launcher",
}


def documented_jobs() -> list[str]:
    """Return the commands that README and docs show."""
    jobs: list[str] = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if page.is_file():
            text = page.read_text(encoding="utf-8").replace("\\\n", " ")
            jobs += re.findall(r"python ((?:train|evaluate)\.py[^\n`#]*)", text)
            jobs += re.findall(r"vipllava ((?:train|evaluate) [a-z][^\n`#.]*)[\n`#]", text)
    return jobs


def _each(override: Override) -> Iterator[str]:
    if not override.is_sweep_override():
        yield str(override.input_line)
        return
    for value in override.sweep_string_iterator():
        yield f"{override.key_or_group}={value}"


@pytest.mark.parametrize("job", dict.fromkeys([*JOBS, *(j.strip() for j in documented_jobs())]))
def test_documented_jobs_compose(job: str):
    script, *overrides = shlex.split(job)
    if "-m" in overrides:  # a sweep: its first job
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if o != "-m"])
        overrides = [next(iter(_each(o))) for o in parsed]
    if any(word.isupper() for override in overrides for word in override.split("=")[1:2]):
        pytest.skip("a placeholder to fill in")
    if "--config-dir" in overrides:
        pytest.skip("a folder of the reader's; tests/evaluation/test_own_bench.py makes it")
    for name, plugin in PLUGINS.items():
        if any(o.startswith("hydra/") and name in o for o in overrides):
            pytest.importorskip(f"hydra_plugins.hydra_{plugin}")
    arguments = [o for o in overrides if not o.startswith("-") and o not in ("job",)]
    cfg = compose_job(arguments, config_name=Path(script).stem)
    OmegaConf.to_container(cfg, resolve=True)


def test_a_published_job_runs_where_it_was_published(machines: dict[str, Hardware]):
    cfg = compose_job(["stage=pretrain", "model=13b", "trainer=8xa100"])
    assert find_problems(cfg, machines["8xa100"]) == []


def test_every_target_exists_and_binds():
    """Each constructor call: known arguments only, none missing but what the builder adds."""
    jobs: list[DictConfig] = [
        compose_job([f"{group}={option}"])
        for group in ("model", "strategy", "logger", "profiler", "callbacks", "data")
        for option in options(group)
    ]
    jobs += [compose_job([f"bench={b}"], config_name="evaluate") for b in options("bench")]
    calls = {
        f"{node['_target_']} {sorted(map(str, node))}": (path, node)
        for cfg in jobs
        for path, node in targets(cfg)
    }
    assert len(calls) >= 12
    for path, node in calls.values():
        name = str(node["_target_"])
        assert missing_arguments(node) == GIVEN_WHEN_BUILT.get(name, set()), path
    for cfg in jobs:
        assert find_target_problems(cfg) == []
