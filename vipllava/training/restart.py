"""The same command again goes on where the run stopped, or says why it cannot.

A run's folder keeps the configuration it was started with. Before a run goes on, what has changed
since is shown; what would change the order of the data or the model is refused.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from vipllava.types import CheckpointError, ConfigError, VipLlavaError

logger = logging.getLogger(__name__)

JOB_FILE: Final = "job.yaml"
WANDB_ID_FILE: Final = "wandb_id"
FINISHED_FILE: Final = "finished.yaml"
EXPORT_FOLDER: Final = "export"
CHECKPOINTS: Final = "checkpoints"
SUFFIX: Final = ".ckpt"
_MATTERS: Final = (
    "seed",
    "stage.name",
    "stage.checkpoint",
    "stage.trainable",
    "stage.chat_template",
    "stage.image_aspect",
    "stage.max_length",
    "stage.pack_length",
    "stage.global_batch_size",
    "module.model",
    "module.adapter",
    "module.quantization",
    "visual_prompts",
    "data.manifest",
    "data.mix",
    "data.samples_per_epoch",
    "data.batching",
    "data.global_batch_size",
    "data.window_samples",
    "strategy.name",
)
"""What decides the order of the data, the model, or the form of its checkpoints."""
_HARMLESS: Final = (
    "module.model.attn_implementation",
    "module.model.dtype",
    "module.quantization.compute_dtype",
)
"""Exceptions: how the model is computed."""
_RESTARTS: Final = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""How often a launcher has started this job again."""
_UNSHARDED: Final = ("single", "ddp")
"""Strategies whose checkpoints are one and the same file."""


@dataclass(frozen=True, slots=True)
class Restart:
    """How a run begins.

    Attributes:
        checkpoint: to go on from, or None to begin.
        num_steps: optimizer steps that it has done.
        finished: the run has done all its epochs and exported what it made; nothing is left to do.
    """

    checkpoint: Path | None
    num_steps: int
    finished: bool = False


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first; files, or folders where sharded."""
    found = [path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def prepare_run(
    run_dir: Path,
    job: Mapping[str, Any],
    *,
    epochs: int = 1,
    resume: str = "auto",
    anyway: bool = False,
) -> Restart:
    """Decide where a run begins, and bring its folder into that state.

    To be called by the first process only, before any weight is loaded. A job that Slurm or
    torchrun has started again goes on from its own newest checkpoint, whatever ``resume`` says.

    Args:
        run_dir: the run's folder; made if it is not there.
        job: the whole configuration as plain values.
        epochs: that the job asks for; a run that has done as many is finished.
        resume: ``auto`` goes on from the newest checkpoint if there is one; ``never`` begins, and
            moves what an earlier run left aside; else the path of a checkpoint.
        anyway: go on although what has changed decides the data's order or the model.

    Raises:
        CheckpointError: the named checkpoint is not there.
        ConfigError: the folder cannot be written, or the run was started with other data or
            another model; the message lists what differs.
    """
    resume = _resume_of_launcher(run_dir, resume)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if resume == "never":
            _move_aside(run_dir)
        _write_yaml(run_dir / f".{JOB_FILE}.probe", job)
        (run_dir / f".{JOB_FILE}.probe").unlink()
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir} cannot be written ({error}): free some space or set "
            "paths.runs=FOLDER"
        ) from error
    restart = find_restart(run_dir, resume=resume, epochs=epochs)
    if restart.checkpoint is not None and not restart.checkpoint.exists():
        checkpoints = run_dir / CHECKPOINTS
        known = ", ".join(path.name for path in list_checkpoints(checkpoints)) or "none"
        raise CheckpointError(
            f"resume={resume} does not exist; {checkpoints} has {known}: use resume=auto, or "
            "name a checkpoint"
        )
    # What has ended was that job, too, though its checkpoints may have been deleted since.
    if restart.checkpoint is not None or restart.finished:
        _check_job(run_dir, job, restart.checkpoint or run_dir / EXPORT_FOLDER, anyway)
    if not restart.finished:
        (run_dir / FINISHED_FILE).unlink(missing_ok=True)
        _write_yaml(run_dir / JOB_FILE, job)
    return restart


def mark_finished(run_dir: Path, *, epochs: int) -> None:
    """Note that a run has done so many epochs and exported what it made; first process only."""
    _write_yaml(run_dir / FINISHED_FILE, {"epochs": epochs})


def _is_finished(run_dir: Path, epochs: int) -> bool:
    path = run_dir / FINISHED_FILE
    if not path.is_file() or not (run_dir / EXPORT_FOLDER).is_dir():
        return False
    done: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    return epochs <= done["epochs"]


def find_restart(run_dir: Path, *, epochs: int = 1, resume: str = "auto") -> Restart:
    """Return what :func:`prepare_run` decides, for the other processes; nothing is touched."""
    resume = _resume_of_launcher(run_dir, resume)
    if resume == "never":
        return Restart(None, 0)
    if resume != "auto":
        return _restart(Path(resume).expanduser())
    found = list_checkpoints(run_dir / CHECKPOINTS)
    restart = _restart(found[-1] if found else None)
    return replace(restart, finished=_is_finished(run_dir, epochs))


def rescale_progress(checkpoint: dict[str, Any], saved: int, now: int) -> None:
    """Turn a checkpoint's counts of micro-batches into those of a run that accumulates otherwise.

    Args:
        checkpoint: Lightning's; changed in place.
        saved: micro-batches per optimizer step of the run that wrote it.
        now: the same of this run.

    Raises:
        VipLlavaError: the checkpoint stands within a step.
    """
    if saved == now:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for name, count in counts.items():
            if count % saved:
                raise VipLlavaError(
                    f"the checkpoint stands {count % saved} micro-batches into a step of {saved}; "
                    f"this run has {now} a step: resume from one at the end of a step"
                )
            counts[name] = count // saved * now


def _resume_of_launcher(run_dir: Path, resume: str) -> str:
    """The command of a job that its launcher starts again is the same; what it has done stays."""
    again = any(os.environ.get(name, "0") not in ("", "0") for name in _RESTARTS)
    return "auto" if again and list_checkpoints(run_dir / CHECKPOINTS) else resume


def _restart(checkpoint: Path | None) -> Restart:
    if checkpoint is None:
        return Restart(None, 0)
    return Restart(checkpoint, int(checkpoint.stem) if checkpoint.stem.isdecimal() else 0)


def wandb_id(run_dir: Path) -> str:
    """Return the id of a run on W&B, made at its first start and kept in its folder.

    To be called by the first process only, after :func:`prepare_run`, which moves the id of a run
    that is begun anew aside.
    """
    path = run_dir / WANDB_ID_FILE
    if path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    # A random end: equal folders on two machines are two runs, and an id that was deleted on W&B
    # cannot be had again.
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", run_dir.name).strip("-")
    made = f"{name[:40]}-{secrets.token_hex(4)}"
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(made + "\n", encoding="utf-8")
    unfinished.replace(path)
    return made


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two configurations, by dotted key."""
    first, second = _flat(before), _flat(now)
    absent = "(not set)"
    return {
        key: (first.get(key, absent), second.get(key, absent))
        for key in sorted(first.keys() | second.keys())
        if first.get(key, absent) != second.get(key, absent)
    }


def _check_job(run_dir: Path, job: Mapping[str, Any], done: Path, anyway: bool) -> None:
    path = run_dir / JOB_FILE
    if not path.is_file():
        return
    before: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    changed = differences(before if isinstance(before, dict) else {}, job)
    refused = {key: pair for key, pair in changed.items() if _is_refused(key, pair)}
    shown = {key: pair for key, pair in changed.items() if key not in refused}
    if shown:
        logger.info("the configuration has changed since the run began:\n%s", _listed(shown))
    if refused and not anyway:
        raise ConfigError(
            f"{run_dir} was started with another configuration, which decides the order of the "
            f"data or the model:\n{_listed(refused)}\nTo go on from {done.name}, take these "
            "back; for a run of its own pass name=NEW_NAME; to begin this one anew resume=never; "
            "to go on all the same resume_anyway=true"
        )
    if refused:
        logger.warning("resume_anyway=true: going on with changes:\n%s", _listed(refused))


def _is_refused(key: str, pair: tuple[Any, Any]) -> bool:
    if key == "strategy.name" and set(pair) <= set(_UNSHARDED):
        return False
    return _is_below(key, _MATTERS) and not _is_below(key, _HARMLESS)


def _is_below(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {was} -> {now}" for key, (was, now) in changed.items())


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values:
        return {prefix: list(values) if isinstance(values, tuple) else values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    unfinished.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    unfinished.replace(path)


def _move_aside(run_dir: Path) -> None:
    """Keep an earlier run's files under a name of their own; nothing is deleted."""
    # What the process that is starting writes already, and the queue's files of its job.
    own = (".hydra", "train.log", ".submitit")
    kept = [path for path in run_dir.iterdir() if path.name not in own]
    kept = [path for path in kept if not path.name.startswith("before-")]
    if not kept:
        return
    number = 1
    while (aside := run_dir / f"before-{number}").exists():
        number += 1
    aside.mkdir()
    for path in kept:
        path.rename(aside / path.name)
    logger.info("resume=never: what an earlier run left is in %s", aside)
