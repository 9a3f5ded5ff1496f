"""Jobs: what ``train`` and ``evaluate`` run, and the one whose data a command looks at."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from vipllava.config.places import CONFIG_DIR
from vipllava.types import ConfigError, VipLlavaError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_TRAINING_STAGES: Final = ("pretrain", "finetune", "gpt4v", "task")


_HELP: Final = """\
usage: {program} [GROUP=OPTION] [KEY=VALUE] ...
{what}, for example
  {program} {example}
Groups and their options, the default marked by *:
{groups}
Often set:
{keys}
Options: --cfg job [--resolve] prints the job with every key and runs nothing;
  --config-dir FOLDER adds configuration of yours; -m starts a job for each of
  several values, KEY=A,B; --hydra-help lists others. More: docs/{page}
"""
_ABOUT: Final = {
    "train": (
        "Train one stage", "stage=finetune model=7b trainer=8xa100", "training.md",
        "name=RUN  stage.checkpoint=FOLDER  data.manifest=NAME  stage.learning_rate=X",
        "stage.epochs=N  trainer.max_steps=N  machine.micro_batch_size=N  resume=never",
        "inspect=true  preflight=true  replay=FILE: look at the job, and do not train",
    ),
    "evaluate": (
        "Run one benchmark", "bench=vip_bench checkpoint=runs/7b-gpt4v/export", "evaluation.md",
        "checkpoint=FOLDER_OR_ID  base=FOLDER_OR_ID  chat_template=NAME  name=RUN",
        "limit=N  batch_size=N  device=cpu  dtype=NAME  bits=4",
        "answerer=endpoint  endpoint.base_url=URL  endpoint.model=NAME",
        "judge.base_url=URL  judge.model=NAME  judge.runs=N  judge.prompt=FILE",
    ),
}  # fmt: skip


def run_job(name: Literal["train", "evaluate"], arguments: Sequence[str] | None = None) -> None:
    """Run ``vipllava train`` or ``vipllava evaluate``; for ``--help`` nothing is composed.

    Args:
        name: which.
        arguments: the job's part of the command line; all but the program's name if not given.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(given):
        sys.stdout.write(job_help(name, given))
        return
    from vipllava.config.entry import run_main

    run_main({"train": train, "evaluate": evaluate}[name], config_name=name, arguments=arguments)


def job_help(name: Literal["train", "evaluate"], arguments: Sequence[str] = ()) -> str:
    """Return what can be chosen, read from the folders of ``conf/`` and of ``--config-dir``."""
    import yaml

    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--config-dir", "-cd", type=Path)
    own = options.parse_known_args(arguments)[0].config_dir
    root = yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    defaults: dict[str, str | None] = {}
    for entry in root["defaults"]:
        defaults |= entry if isinstance(entry, dict) else {}
    width = min(shutil.get_terminal_size().columns, 120)
    groups: list[str] = []
    for group, default in defaults.items():
        folders = [folder / group for folder in (CONFIG_DIR, own) if folder]
        files = [file for folder in folders for file in folder.glob("*.yaml")]
        names = sorted({f"{f.stem}*" if f.stem == default else f.stem for f in files})
        if names in ([], [f"{default}*"]):
            continue  # there is nothing to choose
        indent = f"  {group:<15}"
        listed, space = ", ".join(names), " " * len(indent)
        groups.append(textwrap.fill(listed, width, initial_indent=indent, subsequent_indent=space))
    what, example, page, *keys = _ABOUT[name]
    script = Path(sys.argv[0]).name
    program = f"python {script}" if script == f"{name}.py" else f"vipllava {name}"
    return _HELP.format(
        program=program,
        what=what,
        example=example,
        groups="\n".join(groups),
        keys="\n".join(f"  {line}" for line in keys),
        page=page,
    )


def train(cfg: DictConfig) -> None:
    """Check a job, then run it; nothing heavy is imported before the check has passed."""
    from vipllava.config.checks import (
        check_config,
        check_data_config,
        check_plan_config,
        check_targets,
    )

    marks = _mark_problems(cfg)
    if cfg.inspect:
        check_data_config(cfg, marks)
        from vipllava.commands.inspect import inspect_job

        inspect_job(cfg)
    elif cfg.preflight:
        check_plan_config(cfg, marks)
        from vipllava.commands.preflight import preflight

        preflight(cfg)
    elif cfg.replay:
        check_data_config(cfg, marks)
        from vipllava.commands.replay import replay_job

        replay_job(cfg)
    else:
        check_config(cfg, more=marks)
        check_targets(cfg)
        from vipllava.training.run import run_training

        run_training(cfg)


def evaluate(cfg: DictConfig) -> None:
    """Check the job of each benchmark, then run them; nothing heavy is imported before."""
    from vipllava.config.checks import check_config
    from vipllava.evaluation.run import bench_problems, run_evaluation

    jobs = _jobs_of_benches(cfg)
    for job in jobs:
        check_config(job, more=[*_mark_problems(job), *bench_problems(job)])
    run_evaluation(*jobs)


def _jobs_of_benches(cfg: DictConfig) -> list[DictConfig]:
    """Return a job for each benchmark of ``bench=[A,B]``, or of ``bench=all`` whose data are here.

    Hydra lays several options of a group over each other; here each is composed alone.
    """
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():  # composed by a program
        return [cfg]
    hydra = HydraConfig.get()
    # A list is no choice for Hydra.
    words = [word for word in hydra.overrides.task if word.startswith("bench=")]
    chosen = str(hydra.runtime.choices.get("bench") or words[-1].partition("=")[2])
    if chosen != "all" and not chosen.startswith("["):
        return [cfg]
    words = [word for word in hydra.overrides.task if not word.startswith("bench=")]
    own = [str(each.path) for each in hydra.runtime.config_sources if each.schema == "file"]
    in_sweep = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    return compose_benches(chosen, words, own, folder=cfg.run_dir if in_sweep else None)


def compose_benches(
    chosen: str,
    overrides: Sequence[str],
    config_dirs: Sequence[str] = (),
    folder: str | None = None,
) -> list[DictConfig]:
    """Compose a job for each of several benchmarks.

    Args:
        chosen: ``[A,B]``, or ``all``: those whose data are here.
        overrides: of all of them.
        config_dirs: the configuration folders; those beside the package's own are searched, too.
        folder: in which each gets one; None: where each would be alone, or with a common ``name``
            in the folder of that name.

    Raises:
        ConfigError: the data of no benchmark are here.
    """
    from vipllava.config.composing import compose_job
    from vipllava.config.overrides import quoted
    from vipllava.evaluation.benches import BENCHES
    from vipllava.evaluation.run import has_data

    own = [f"file://{folder}" for folder in config_dirs if Path(folder) != CONFIG_DIR]
    added = [f"hydra.searchpath=[{','.join(map(quoted, own))}]"] if own else []
    folders = [Path(folder) for folder in [*config_dirs, CONFIG_DIR]]
    names = [name.strip(" '\"") for name in chosen.strip("[]").split(",")]
    if chosen == "all":
        files = {path.stem: path for folder in folders for path in folder.glob("bench/*.yaml")}
        names = [name for name in files if name not in ("all", "custom")]
    jobs = [
        compose_job([*added, f"bench={name}", *overrides], config_name="evaluate")
        for name in dict.fromkeys(names)
    ]
    if chosen == "all":
        jobs = [job for job in jobs if has_data(job)]
        if not jobs:
            raise ConfigError(f"bench=all: the data of none of {', '.join(names)} are here")
    # What joins others' answers comes behind them.
    jobs.sort(key=lambda job: job.bench.name in BENCHES and BENCHES[job.bench.name].joins != ())
    share = len({job.name for job in jobs}) < len(jobs)
    for job in jobs:  # Hydra's own folder is that of the whole command
        base = folder or (f"{job.paths.runs}/{job.name}" if share else None)
        job.run_dir = f"{base}/{job.bench.name}" if base else f"{job.paths.runs}/{job.name}"
    return jobs


def _mark_problems(cfg: DictConfig) -> list[str]:
    """Return what is wrong with the shapes, colours and ranges of a job's marks."""
    from vipllava.config.schema import read
    from vipllava.visual_prompts.policies import build_policies

    try:
        build_policies(read(cfg, "visual_prompts.policies"), read(cfg, "visual_prompts.ranges"))
    except ConfigError:
        return []  # said by the checks of the configuration
    except VipLlavaError as error:
        return str(error).splitlines()
    return []


def compose_data_job(
    data: str | None, overrides: Sequence[str], config_dir: Path | None = None
) -> DictConfig:
    """Compose the training job whose data a command looks at.

    Args:
        data: a manifest's name or path; None leaves it to the job. Its stage is the job's unless
            the overrides choose one.
        overrides: of ``conf/train.yaml``.
        config_dir: a configuration folder of one's own that is added.

    Raises:
        ConfigError: listing what does not compose, or what is wrong with the job's data.
    """
    from vipllava.config.checks import check_data_config
    from vipllava.config.composing import (
        COMPOSING_ERRORS,
        compose_job,
        composition_message,
        searchpath,
    )
    from vipllava.config.overrides import quoted, readable_words
    from vipllava.shards.manifest import load_manifest

    overrides = readable_words(overrides)
    if data is None and (names := [word for word in overrides if re.fullmatch(r"[\w./-]+", word)]):
        raise ConfigError(f"{names[0]} is not KEY=VALUE; a data set is named by --data {names[0]}")
    shown = [] if config_dir is None else ["--config-dir", str(config_dir)]

    def compose(chosen: Sequence[str]) -> DictConfig:
        try:
            cfg = compose_job([*searchpath(config_dir), *chosen])
        except COMPOSING_ERRORS as error:
            arguments = [*shown, *chosen]
            raise ConfigError(composition_message(arguments, CONFIG_DIR, "train", error)) from error
        check_data_config(cfg, _mark_problems(cfg))
        return cfg

    if data is None:
        return compose(overrides)
    chosen = [*overrides, "data.mix=null", f"data.manifest={quoted(data)}"]
    try:
        cfg = compose(chosen)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"data.manifest={data}", f"--data {data}")) from error
    if any(override.startswith("stage=") for override in overrides):
        return cfg
    manifest = load_manifest(cfg.data.manifest, cfg.data.manifests_dir)
    # Benchmarks are looked at as stage 2 sees pictures and texts.
    stage = manifest.stage if manifest.stage in _TRAINING_STAGES else "finetune"
    return compose([*chosen, f"stage={stage}"])
