"""Jobs: what ``train`` and ``evaluate`` run, and the one whose data a command looks at."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from vipllava.config.places import CONFIG_DIR
from vipllava.types import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_TRAINING_STAGES: Final = ("pretrain", "finetune", "gpt4v", "task")


_HELP: Final = """\
usage: {program} [GROUP=OPTION] [KEY=VALUE] ...

{what} For example: {program} {example}

Groups and their options, the default marked by *:

{groups}

Options of Hydra:

  --cfg job [--resolve]  print the job with every value, and run nothing
  --config-dir FOLDER    add configuration of your own
  -m, --multirun         a sweep: a job for each of several values, KEY=A,B
  --hydra-help           the others
"""


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
        indent = f"  {group:<16}"
        listed, space = ", ".join(names), " " * len(indent)
        groups.append(textwrap.fill(listed, width, initial_indent=indent, subsequent_indent=space))
    what, example = {
        "train": ("Train one stage.", "stage=finetune model=7b trainer=8xa100"),
        "evaluate": ("Run one benchmark.", "bench=vip_bench checkpoint=runs/7b-gpt4v/export"),
    }[name]
    script = Path(sys.argv[0]).name
    program = f"python {script}" if script == f"{name}.py" else f"vipllava {name}"
    return _HELP.format(program=program, what=what, example=example, groups="\n".join(groups))


def train(cfg: DictConfig) -> None:
    """Check a job, then run it; nothing heavy is imported before the check has passed."""
    from vipllava.config.checks import (
        check_config,
        check_data_config,
        check_plan_config,
        check_targets,
    )

    if cfg.inspect:
        check_data_config(cfg)
        from vipllava.commands.inspect import inspect_job

        inspect_job(cfg)
    elif cfg.preflight:
        check_plan_config(cfg)
        from vipllava.commands.preflight import preflight

        preflight(cfg)
    elif cfg.replay:
        check_data_config(cfg)
        from vipllava.commands.replay import replay_job

        replay_job(cfg)
    else:
        check_config(cfg)
        check_targets(cfg)
        from vipllava.training.run import run_training

        run_training(cfg)


def evaluate(cfg: DictConfig) -> None:
    """Check a benchmark's job, then run it; nothing heavy is imported before."""
    from vipllava.config.checks import check_config
    from vipllava.evaluation.run import bench_problems, run_evaluation

    check_config(cfg, more=bench_problems(cfg))
    run_evaluation(cfg)


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
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from vipllava.config.checks import check_data_config
    from vipllava.config.composing import compose_job, composition_message
    from vipllava.shards.manifest import load_manifest

    added, shown = list[str](), list[str]()
    if config_dir is not None:
        added = [f"hydra.searchpath=[{config_dir.resolve()}]"]
        shown = ["--config-dir", str(config_dir)]

    def compose(chosen: Sequence[str]) -> DictConfig:
        try:
            cfg = compose_job([*added, *chosen])
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            arguments = [*shown, *chosen]
            raise ConfigError(composition_message(arguments, CONFIG_DIR, "train", error)) from error
        check_data_config(cfg)
        return cfg

    if data is None:
        return compose(overrides)
    chosen = [*overrides, "data.mix=null", f"data.manifest={data}"]
    cfg = compose(chosen)
    if any(override.startswith("stage=") for override in overrides):
        return cfg
    manifest = load_manifest(cfg.data.manifest, cfg.data.manifests_dir)
    # Benchmarks are looked at as stage 2 sees pictures and texts.
    stage = manifest.stage if manifest.stage in _TRAINING_STAGES else "finetune"
    return compose([*chosen, f"stage={stage}"])
