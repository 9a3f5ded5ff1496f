"""How far a run is, in optimizer steps: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class TrainingClock(Callback):
    """Knows how long training has gone on since a moment, validation left out."""

    # Seconds that only grow.
    clock: Callable[[], float] = field(default=time.monotonic, kw_only=True)
    _began: float = field(default=0.0, init=False)
    _paused_at: float = field(default=0.0, init=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = self.clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._began += self.clock() - self._paused_at

    def seconds(self) -> float:
        """Return the seconds of training since :meth:`restart_clock`."""
        return self.clock() - self._began

    def restart_clock(self) -> None:
        """Count from now on."""
        self._began = self.clock()


@dataclass(eq=False)
class StepProgress(TrainingClock):
    """Says which step of how many a run is at, the loss, steps per second and the time left.

    The first process does. On a terminal it is a bar under the messages, which share its console;
    elsewhere (a file, a queue) a message every ``every_n_seconds`` and at the end.
    """

    every_n_seconds: float = 30.0  # between two messages where there is no terminal
    console: Console | None = None  # of the bar; the one that messages are printed to by default
    _bar: Progress | None = field(default=None, init=False)
    _first_step: int = field(default=0, init=False)
    _last_step: int = field(default=0, init=False)
    _said_step: int = field(default=0, init=False)
    _said_at: float = field(default=0.0, init=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count; what was done before this start is no part of the rate."""
        if not trainer.is_global_zero:
            return
        self._first_step = self._last_step = self._said_step = trainer.global_step
        self.restart_clock()
        self._said_at = self.clock()
        console = self.console or get_console()
        if console.is_terminal:
            columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
            self._bar = Progress(*columns, console=console, expand=True)
            self._bar.add_task("", total=None, completed=trainer.global_step, facts="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell of a step, if this micro-batch completed one and it is time."""
        if not trainer.is_global_zero or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self._bar is not None:
            total, facts = self._total(trainer), ", ".join(self._facts(trainer))
            self._bar.update(self._bar.task_ids[0], completed=self._last_step, total=total)
            self._bar.update(self._bar.task_ids[0], facts=facts)
        elif self.clock() - self._said_at >= self.every_n_seconds:
            self._say(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of the last step."""
        if self._bar is None and self._last_step > self._said_step:
            self._say(trainer)
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, trainer: Trainer) -> None:
        self._said_at, self._said_step = self.clock(), self._last_step
        total = self._total(trainer)
        place = f"step {self._last_step}" + ("" if total is None else f" of {total}")
        logger.info(", ".join((place, *self._facts(trainer))))

    def _total(self, trainer: Trainer) -> int | None:
        """Return the steps of the whole run; None where nothing bounds them."""
        total = trainer.estimated_stepping_batches
        return int(total) if math.isfinite(total) else None

    def _facts(self, trainer: Trainer) -> list[str]:
        facts: list[str] = []
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            facts.append(f"loss {float(loss):.4g}")
        done, seconds = self._last_step - self._first_step, self.seconds()
        if done and seconds > 0:
            rate = done / seconds
            facts.append(f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step")
            if (total := self._total(trainer)) is not None:
                facts.append(f"{_duration((total - self._last_step) / rate)} left")
        return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
