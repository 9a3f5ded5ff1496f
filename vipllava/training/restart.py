"""The same command again goes on where the run stopped, or says why it cannot.

One process at a time writes into a run's folder. What has changed in the configuration since its
start is shown, and refused where it decides the order of the data or the model.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from vipllava.checkpoints.training_state import JOB_FILE, find_damage
from vipllava.files.atomic import free_path, move, read_text, read_yaml, write_whole, write_yaml
from vipllava.files.locks import LOCK_FILE, hold_folder
from vipllava.models.hub_models import content_digest
from vipllava.models.tensor_files import open_tensors
from vipllava.training.csv_log import FILE_NAME, count_rows
from vipllava.types import CheckpointError, ConfigError, VipLlavaError

logger = logging.getLogger(__name__)

FINISHED_FILE: Final = "finished.yaml"
EXPORT_FOLDER: Final = "export"
CHECKPOINTS: Final = "checkpoints"
CSV: Final = "csv"
SUFFIX: Final = ".ckpt"
_ASIDE: Final = "before-"
"""Begins the name of a folder of what an earlier run left; a number follows."""
_MATTERS: Final = (
    "seed", "stage.name", "stage.checkpoint", "stage.trainable", "stage.chat_template",
    "stage.image_aspect", "stage.max_length", "stage.too_long", "stage.pack_length",
    "stage.global_batch_size", "module.model", "module.adapter", "module.quantization",
    "visual_prompts", "data.manifest", "data.mix", "data.samples_per_epoch", "data.batching",
    "data.global_batch_size", "data.window_samples", "strategy.name",
)  # fmt: skip
"""What decides the order of the data, the model, or the form of its checkpoints."""
_HARMLESS: Final = (
    "module.model.attn_implementation", "module.model.dtype", "module.quantization.compute_dtype",
)  # fmt: skip
"""Exceptions: how the model is computed."""
_SOURCES: Final = (
    "stage.checkpoint",
    *(f"module.model.{n}" for n in ("checkpoint", "language_model", "vision_tower")),
)
"""Of these what is there matters, not where it lies: in another checkout that is another path."""
_CONTENTS: Final = "contents"
"""Beside the configuration in ``JOB_FILE``: digests of its sources when the run began."""
_SAME_CHECKPOINTS: Final = ({"single", "ddp"}, {"zero2", "zero3", "zero3_offload"})
"""Strategies that go on from each other's checkpoints."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a job asks for: where its run ends."""

    epochs: int = 1  # passes over the data
    max_steps: int = -1  # optimizer steps at most; -1: as many as the epochs have
    # What else ends it or shortens its epochs, as plain values by name.
    limits: Mapping[str, Any] = field(default_factory=dict)

    def is_within(self, done: Goal) -> bool:
        """Whether a run that has done ``done`` has nothing left to do."""
        return (
            self.epochs <= done.epochs
            and (done.max_steps == -1 or -1 < self.max_steps <= done.max_steps)
            and (not done.limits or done.limits == self.limits)
        )


@dataclass(frozen=True, slots=True)
class Restart:
    """How a run begins."""

    checkpoint: Path | None  # to go on from, or None to begin
    num_steps: int  # optimizer steps that it has done
    # The run has done what is asked and exported what it made; nothing is left to do.
    finished: bool = False


def hold_run(run_dir: Path, *, patience_s: float = 0.0) -> AbstractContextManager[None]:
    """Hold a run's folder, which exists, against a second start; first process only.

    See :func:`vipllava.files.locks.hold_folder`.
    """
    return hold_folder(run_dir, another="name=NEW_NAME", patience_s=patience_s)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; files, or folders where sharded."""
    found = [path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def prepare_run(
    run_dir: Path,
    job: Mapping[str, Any],
    *,
    goal: Goal | None = None,
    resume: str = "auto",
    anyway: bool = False,
) -> Restart:
    """Decide where a run begins, and bring its folder into that state; first process only.

    A job that Slurm or torchrun has started again goes on from its own newest checkpoint, whatever
    ``resume`` says. Nothing is deleted: a damaged checkpoint gets another name, and what stands in
    the way goes to a folder of its own.

    Args:
        run_dir: made if it is not there.
        job: the whole configuration as plain values.
        goal: what the job asks for, one epoch if None; a run that has done as much is finished.
        resume: ``auto`` goes on from the newest whole checkpoint if there is one; ``never`` begins,
            and moves what an earlier run left aside; else the path of a checkpoint.
        anyway: go on although what has changed decides the data's order or the model.

    Raises:
        CheckpointError: the named checkpoint is not there or damaged, or all of the run's are.
        ConfigError: the folder cannot be written, or data or model are others; lists what differs.
    """
    resume = _resume_of_launcher(run_dir, resume)
    probe = run_dir / f".{JOB_FILE}.probe"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_yaml(probe, dict(job))
        probe.unlink()
        if resume == "never" and (left := _files_of_before(run_dir)):
            aside = move_aside(run_dir, left)
            logger.info("resume=never: what an earlier run left is in %s", aside)
    except OSError as error:
        raise unwritable(run_dir, error) from error
    restart, damaged = _decide(run_dir, goal or Goal(), resume)
    for path, damage in damaged.items():
        renamed = Path(f"{path}.damaged")
        renamed = free_path(f"{renamed}-", 2) if renamed.exists() else renamed
        move(path, renamed)
        logger.warning("%s is damaged: %s; it is now %s", path, damage, renamed.name)
    # What has ended was that job, too, though its checkpoints may have been deleted since.
    if restart.checkpoint is not None or restart.finished:
        _check_job(run_dir, job, restart.checkpoint or run_dir / EXPORT_FOLDER, anyway)
    if restart.finished:
        return restart
    log, checkpoints = run_dir / CSV / FILE_NAME, list_checkpoints(run_dir / CHECKPOINTS)
    later = [path for path in checkpoints if _num_steps(path) > restart.num_steps]
    if restart.checkpoint is None and (num_rows := count_rows(log)):
        aside = move_aside(run_dir, _files_of_before(run_dir))
        logger.warning(
            f"{run_dir} has a log of {num_rows} steps and no checkpoint to go on from: the run "
            f"begins again with its first step; what was there is in {aside}"
        )
    elif restart.checkpoint is not None and resume != "auto" and later:
        aside = move_aside(run_dir, later)  # they are no part of the run now
        if log.is_file():
            (aside / CSV).mkdir()
            shutil.copy2(log, aside / CSV)
        names = ", ".join(path.name for path in later)
        logger.warning(
            f"going on from {restart.checkpoint}: later checkpoints ({names}) and the log with "
            f"their steps are in {aside}"
        )
    (run_dir / FINISHED_FILE).unlink(missing_ok=True)
    digests = {source: content_digest(source) for source in _sources(job)}
    contents = {source: digest for source, digest in digests.items() if digest}
    write_yaml(run_dir / JOB_FILE, dict(job) | ({_CONTENTS: contents} if contents else {}))
    return restart


def mark_finished(run_dir: Path, goal: Goal) -> None:
    """Note that a run has done so much and exported what it made; first process only."""
    try:
        write_yaml(run_dir / FINISHED_FILE, asdict(goal))
    except OSError as error:
        logger.warning("%s cannot be written (%s)", run_dir / FINISHED_FILE, error)


def find_restart(run_dir: Path, *, goal: Goal | None = None, resume: str = "auto") -> Restart:
    """Return what :func:`prepare_run` decides, for the other processes; nothing is touched."""
    return _decide(run_dir, goal or Goal(), _resume_of_launcher(run_dir, resume))[0]


def unwritable(run_dir: Path, error: OSError) -> ConfigError:
    """Return the error of a run's folder that cannot be written."""
    remedy = "free some space or set paths.runs=FOLDER"
    return ConfigError(f"run_dir={run_dir} cannot be written ({error}): {remedy}")


def started_again() -> bool:
    """Whether a launcher, Slurm or torchrun, has started this job again."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(os.environ.get(name, "0") not in ("", "0") for name in counts)


def _decide(run_dir: Path, goal: Goal, resume: str) -> tuple[Restart, dict[Path, str]]:
    """Return where the run begins, and the damaged checkpoints that are passed over."""
    # A first process that moves those aside meanwhile changes nothing: for another one they are
    # then not listed, or missing.
    damaged: dict[Path, str] = {}
    if resume == "never":
        return Restart(None, 0), damaged
    if resume != "auto":
        path = Path(resume).expanduser()
        _check_named(path, resume, run_dir / CHECKPOINTS)
        return Restart(path, _num_steps(path)), damaged
    is_finished = _is_finished(run_dir, goal)
    for path in list_checkpoints(run_dir / CHECKPOINTS)[::-1]:
        if is_finished or (damage := find_damage(path)) is None:
            return Restart(path, _num_steps(path), is_finished), damaged
        damaged[path] = damage
    if damaged:
        raise CheckpointError(
            "no checkpoint of this run is whole:\n"
            + "".join(f"- {path}: {damage}\n" for path, damage in damaged.items())
            + "name another one by resume=PATH, or begin again with resume=never"
        )
    return Restart(None, 0, is_finished), damaged


def _is_finished(run_dir: Path, goal: Goal) -> bool:
    done, export = read_yaml(run_dir / FINISHED_FILE), run_dir / EXPORT_FOLDER
    if done is None or not export.is_dir():
        return False
    try:
        open_tensors(export, "export")
    except CheckpointError as error:
        logger.warning("the run has ended, but its export is damaged (%s): it is made again", error)
        return False
    try:
        return goal.is_within(Goal(done["epochs"], done["max_steps"], done["limits"]))
    except (KeyError, TypeError) as error:
        logger.warning("%s does not say what was done (%r)", run_dir / FINISHED_FILE, error)
        return False


def _check_named(path: Path, resume: str, checkpoints: Path) -> None:
    damage = find_damage(path) if path.exists() else "it does not exist"
    if damage is None:
        return
    folders = (checkpoints, path.parent, path.parent / CHECKPOINTS, path / CHECKPOINTS)
    known: list[str] = []
    for folder in dict.fromkeys(folder.absolute() for folder in folders):
        whole = [each.name for each in list_checkpoints(folder) if find_damage(each) is None]
        known += [f"{folder} has {', '.join(whole)}"] if whole else []
    remedy = f"{'; '.join(known)}: name one of these, or use" if known else "Use"
    raise CheckpointError(
        f"resume={resume} is no checkpoint to go on from: {damage}. {remedy} resume=auto"
    )


def _num_steps(checkpoint: Path) -> int:
    """Return the steps that a checkpoint has done; its name tells, but for one like best.ckpt."""
    if checkpoint.stem.isdecimal():
        return int(checkpoint.stem)
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    try:
        # The tensors stay where they are.
        values: Any = torch.load(file, map_location="meta", mmap=True, weights_only=True)
        return int(values.get("run", values)["global_step"])  # of DeepSpeed's parts: within
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} does not say how many steps it has done ({error}): give it the number "
            f"of its steps as name, like 000123{SUFFIX}"
        ) from error


def rescale_progress(checkpoint: dict[str, Any], saved: int, now: int) -> None:
    """Turn a checkpoint's counts of micro-batches, in place, into those of another run.

    ``saved`` and ``now`` are micro-batches per optimizer step. Raises VipLlavaError if the
    checkpoint stands within a step.
    """
    if saved == now:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        # Checkpoints are made at the end of a micro-batch, before Lightning counts it as completed:
        # by that it knows, when it goes on, that the micro-batch was done.
        behind = counts["ready"] - counts["completed"]
        for name, count in counts.items():
            whole = count + behind if name == "completed" else count
            if whole % saved:
                raise VipLlavaError(
                    f"the checkpoint stands {whole % saved} micro-batches into a step of {saved}; "
                    f"this run has {now} a step: resume from one at the end of a step"
                )
            counts[name] = whole // saved * now
        counts["completed"] -= behind


def _resume_of_launcher(run_dir: Path, resume: str) -> str:
    """What a job that its launcher starts again by the same command has done stays."""
    return "auto" if started_again() and list_checkpoints(run_dir / CHECKPOINTS) else resume


def wandb_id(run_dir: Path) -> str:
    """Return a run's id on W&B, kept in its folder; first process only, after `prepare_run`."""
    path = run_dir / "wandb_id"
    if (known := read_text(path)) is not None:
        return known
    # A random end: equal folders on two machines are two runs, and an id that was deleted on W&B
    # cannot be had again.
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", run_dir.name).strip("-")
    made = f"{name[:40]}-{secrets.token_hex(4)}"
    write_whole(path, made + "\n")
    return made


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two configurations, by dotted key."""
    first, second = _flat(before), _flat(now)
    keys = sorted(first.keys() | second.keys())
    pairs = {k: (first.get(k, "(not set)"), second.get(k, "(not set)")) for k in keys}
    return {key: (was, new) for key, (was, new) in pairs.items() if was != new}


def _check_job(run_dir: Path, job: Mapping[str, Any], done: Path, anyway: bool) -> None:
    before = read_yaml(run_dir / JOB_FILE)
    if before is None:
        return
    shown, refused = "", ""
    contents = before.pop(_CONTENTS, {})
    for key, (was, now) in differences(before, job).items():
        line = f"\n  {key}: {was} -> {now}"
        same = key == "strategy.name" and any({was, now} <= each for each in _SAME_CHECKPOINTS)
        if key in _SOURCES and isinstance(was, str) and isinstance(now, str):
            digest = contents.get(was) or content_digest(was)
            same = digest is not None and digest == content_digest(now)
        if _is_below(key, _MATTERS) and not _is_below(key, _HARMLESS) and not same:
            refused += line
        else:
            shown += line
    if shown:
        logger.info("the configuration has changed since the run began:%s", shown)
    if refused and not anyway:
        raise ConfigError(
            f"{run_dir} was started with another configuration, which decides the order of the "
            f"data or the model:{refused}\nTo go on from {done.name}, take these back; for a run "
            "of its own pass name=NEW_NAME; to begin this one again resume=never; to go on all the "
            "same resume_anyway=true"
        )
    if refused:
        logger.warning("resume_anyway=true: going on with changes:%s", refused)


def _sources(job: Mapping[str, Any]) -> list[str]:
    flat = _flat(job)
    return sorted({source for key in _SOURCES if isinstance(source := flat.get(key), str)})


def _is_below(key: str, roots: tuple[str, ...]) -> bool:
    return any(f"{key}.".startswith(f"{root}.") for root in roots)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values:
        return {prefix: list(values) if isinstance(values, tuple) else values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def move_aside(run_dir: Path, paths: Iterable[Path]) -> Path:
    """Move what lies in a run's folder into a new ``before-N`` there, which is returned."""
    aside = free_path(f"{run_dir / _ASIDE}", 1)
    for path in paths:
        target = aside / path.relative_to(run_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        move(path, target)
    return aside


def _files_of_before(run_dir: Path) -> list[Path]:
    # Not what the process that is starting writes already, and the queue's files of its job.
    own = (".hydra", "train.log", ".submitit", LOCK_FILE)
    return [p for p in run_dir.iterdir() if p.name not in own and not p.name.startswith(_ASIDE)]
