"""Training checkpoints that a kill, a full disk or a lost node cannot spoil.

A checkpoint is written beside its place, brought to the disk, and renamed; older ones go after
that. Weights that are on one process are written while training goes on, sharded ones by all.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch.distributed.checkpoint.api import CheckpointException

from vipllava.checkpoints.plain_pickles import load_plain
from vipllava.files.atomic import UNFINISHED, new_file, put_folder, remove
from vipllava.training.ending import StopRequest
from vipllava.training.first_alone import first_alone
from vipllava.training.lit_module import VipLlavaLitModule
from vipllava.training.restart import SUFFIX, list_checkpoints
from vipllava.types import CheckpointError, Interrupted, first_line

logger = logging.getLogger(__name__)

BEST: Final = "best.ckpt"


@dataclass(eq=False)
class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes one file per checkpoint, in a thread, from a copy on the CPU; the next save waits."""

    on_written: Callable[[], None] = lambda: None  # behind every whole file
    _executor: ThreadPoolExecutor | None = field(default=None, init=False)
    _pending: Future[None] | None = field(default=None, init=False)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; raises CheckpointError if the one before could not be written."""
        self.wait()
        copy = apply_to_collection(
            checkpoint, torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True)
        )
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._executor.submit(self._write, copy, Path(path))

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            with new_file(path, durable=True) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError on a full disk
            raise _unwritten(path, error) from error
        self.on_written()

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file onto the CPU; nothing in it can run code, whatever ``weights_only`` says."""
        if Path(path).is_dir():
            raise CheckpointError(
                f"{path} is the checkpoint of a sharded strategy: go on with the strategy that "
                "wrote it, or make a model of it with `vipllava convert` and start from that"
            )
        try:
            checkpoint = load_plain(Path(path))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; or move it away, and the same command goes on from the one before"
            ) from error
        if "loops" not in checkpoint:  # which only a trainer writes
            raise CheckpointError(
                f"{path} holds no state of a run, so none can go on from it: name a file of "
                "RUN/checkpoints; to start from its weights pass checkpoint=FOLDER"
            )
        return checkpoint

    def wait(self) -> None:
        """Wait for the file that is being written; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def teardown(self) -> None:
        """Finish the last file."""
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None


@dataclass(eq=False)
class CheckpointCallback(Checkpoint):
    """Saves at steps, at times, at the last step, and before a run that is asked to stop ends."""

    dirpath: str | Path  # folder of the run's checkpoints
    every_n_steps: int | None = 500  # optimizer steps between two; None: not by steps
    every_n_minutes: float | None = None  # between two, by the first process; None: not by time
    keep_last: int = 2  # how many stay, at least one
    keep_best: bool = True  # also keep the one with the lowest ``val/loss``, as ``best.ckpt``

    def __post_init__(self) -> None:
        self.folder = Path(self.dirpath)
        self.best_loss: float | None = None
        self._deferred = False
        self._last_step = self._saved_step = 0
        self._last_time = time.monotonic()
        self._stop = StopRequest()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from listening to signals, for which there is no setting."""
        # Its handler talks to the other processes, and ends a run as if it had succeeded.
        connector: Any = trainer._signal_connector
        connector.register_signal_handlers = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear what a killed save left, and listen to the signals that ask to stop."""
        self._last_step = self._saved_step = trainer.global_step
        self._last_time = time.monotonic()
        _check_same_step(trainer)
        if isinstance(plugin := trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            plugin.on_written = self._remove_older
        if trainer.is_global_zero and self.folder.is_dir():
            for path in self.folder.glob(f".*{UNFINISHED}"):
                remove(path)
        self._stop.listen()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save if this micro-batch completed a step that is due."""
        step = trainer.global_step
        if step == self._last_step:
            return
        asked, due = self._decide(trainer, step)
        # Behind the last step a run is at its end: an export that fails then costs no step.
        due = due or trainer.should_stop
        # A checkpoint of the same step belongs behind its validation, which a resumed run skips.
        self._deferred = due and not asked and _validation_follows(trainer)
        if asked or (due and not self._deferred):
            self._save_step(trainer)
        if asked:
            self._interrupt(trainer, asked)
        self._last_step = step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was due before the validation, and the best so far; stop if asked to."""
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        if is_best := loss < (math.inf if self.best_loss is None else self.best_loss):
            self.best_loss = loss
        in_training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        asked = self._decide(trainer, trainer.global_step)[0] if in_training else 0
        # Now, too, where this loss has ended the run.
        if self._deferred or asked or trainer.should_stop:
            self._deferred = False
            self._save_step(trainer)
        if is_best and self.keep_best:
            logger.info("val/loss %.4f is the lowest so far", loss)
            self.save(trainer, BEST)
        if asked:
            self._interrupt(trainer, asked)

    def state_dict(self) -> dict[str, Any]:
        """Return the best loss."""
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best loss."""
        self.best_loss = state_dict.get("best_loss")

    def _save_step(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.global_step:
            self._saved_step = trainer.global_step
            self.save(trainer)
        if trainer.should_stop:
            _wait(trainer)  # the export comes next

    def save(self, trainer: Trainer, name: str | None = None) -> None:
        """Save now, by the step's name if none is given; every process has to call this."""
        path = self.folder / (name or f"{trainer.global_step:06d}{SUFFIX}")
        if isinstance(trainer.lightning_module, VipLlavaLitModule):
            # Lightning would log this step only after the callbacks, and a kill in between lose it.
            trainer.lightning_module.log_step()
        if trainer.is_global_zero:
            for log in trainer.loggers:
                log.save()
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(trainer.strategy, (DeepSpeedStrategy, ModelParallelStrategy)):
                _save_sharded(trainer, path)
            else:
                trainer.save_checkpoint(path, weights_only=False)
        except (OSError, CheckpointException) as error:  # the latter of FSDP2's writer
            raise _unwritten(path, error) from error
        self._last_time = time.monotonic()
        plugin = trainer.strategy.checkpoint_io
        if trainer.is_global_zero and not isinstance(plugin, AtomicCheckpointIO):
            self._remove_older()  # that one does so itself, when the new file is whole

    def _remove_older(self) -> None:
        for old in list_checkpoints(self.folder)[: -max(1, self.keep_last)]:
            try:
                remove(old)
            except OSError as error:
                logger.warning("%s is not needed any more and cannot be removed: %s", old, error)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._stop.stop_listening()

    def on_exception(self, *_: Any) -> None:
        """Give the signals back; nothing is torn down after an error."""
        self._stop.stop_listening()

    def _interrupt(self, trainer: Trainer, exit_code: int) -> NoReturn:
        _wait(trainer)
        by = self._stop.name or "a signal to another process"
        raise Interrupted(
            f"stopped at step {trainer.global_step} by {by}; the checkpoint is in {self.folder}: "
            "start the same command again to go on",
            exit_code,
        )

    def _decide(self, trainer: Trainer, step: int) -> tuple[int, bool]:
        """Return the exit code to stop with, or 0, and whether to save; alike on all processes."""
        due = bool(self.every_n_steps and step % self.every_n_steps == 0)
        if self.every_n_minutes is not None and trainer.is_global_zero:
            due = due or time.monotonic() - self._last_time >= 60 * self.every_n_minutes
        asked, any_due = _greatest(trainer, self._stop.exit_code, int(due))
        return asked, bool(any_due)


def _greatest(trainer: Trainer, *numbers: int) -> list[int]:
    """Return of each number the greatest that a process has."""
    if trainer.world_size == 1:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.int64, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return found.tolist()


def _check_same_step(trainer: Trainer) -> None:
    last, negative_first = _greatest(trainer, trainer.global_step, -trainer.global_step)
    if -negative_first != last:
        raise CheckpointError(
            f"the processes of this run go on from different steps, {-negative_first} to {last}: "
            "its folder has to be on a file system that all nodes share, and its checkpoints "
            "readable there"
        )


def _validation_follows(trainer: Trainer) -> bool:
    if not trainer.enable_validation:
        return False
    every = trainer.val_check_batch or math.inf
    is_time = every < math.inf and (trainer.fit_loop.total_batch_idx + 1) % int(every) == 0
    return is_time or (trainer.should_stop and trainer.fit_loop._can_stop_early)


def _save_sharded(trainer: Trainer, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")  # the same for all processes
    if trainer.is_global_zero:
        remove(unfinished)
    trainer.strategy.barrier("before saving")
    trainer.save_checkpoint(unfinished, weights_only=False)
    trainer.strategy.barrier("saved")
    # Storage may take longer to have all of it than a collective waits.
    give_name = partial(put_folder, unfinished, path, replace=True)
    first_alone(trainer.is_global_zero, f"{path.name} on the disk", give_name)


def _unwritten(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} could not be written ({first_line(error)}): free some space; "
        "those of before are whole, and the same command goes on from the newest"
    )


def _wait(trainer: Trainer) -> None:
    if isinstance(plugin := trainer.strategy.checkpoint_io, AtomicCheckpointIO):
        plugin.wait()
