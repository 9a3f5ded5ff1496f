"""Where a run ends: by its epochs, by ``max_steps``, by the clock, early, or by a signal.

Its last step is validated and saved before the export, so that an export that fails costs none.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType
from typing import Any, Final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from vipllava import processes
from vipllava.processes import EXIT_INTERRUPTED, SAME_CTRL_C_S, leave_closed_terminal, say
from vipllava.types import Interrupted

logger = logging.getLogger(__name__)

_LIMIT: Final = "limit_train_batches"
"""Key of a checkpoint: what its run's epochs were cut to, as text, in which 1 is not 1.0."""


class RunEnd(Callback):
    """Sets ``should_stop`` at the last step: the trainer validates, and every callback knows."""

    def __init__(self) -> None:
        self._nothing_left = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note what the epochs are cut to."""
        checkpoint[_LIMIT] = str(trainer.limit_train_batches)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find out whether this run has anything left to do behind the checkpoint.

        If not, Lightning would end without the hooks of an end, and so without an export. It would
        also take an epoch that a limit cut short for a whole one.
        """
        fit, loops = trainer.fit_loop, checkpoint["loops"]["fit_loop"]
        steps, epochs = checkpoint["global_step"], loops["epoch_progress"]["current"]["processed"]
        now = str(trainer.limit_train_batches)
        limit = checkpoint.get(_LIMIT, now)
        if limit != now:
            loops["epoch_loop.batch_progress"]["is_last_batch"] = False
            if epochs:
                logger.warning(
                    f"{epochs} epochs before this one ended at limit_train_batches={limit}: what "
                    "they left out comes in later ones only"
                )
        asked = []
        if -1 < fit.max_steps <= steps:
            asked.append(f"max_steps={fit.max_steps}")
            fit.epoch_loop.max_steps = steps + 1
        if fit.max_epochs is not None and -1 < fit.max_epochs <= epochs:
            asked.append(f"max_epochs={fit.max_epochs}")
            fit.max_epochs = epochs + 1
        if asked:
            self._nothing_left = True
            logger.info(
                f"{steps} steps and {epochs} epochs are done, and {' and '.join(asked)} is asked "
                "for: nothing is trained, the export is made of what is there"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End before the first step where nothing is left to do."""
        trainer.should_stop = trainer.should_stop or self._nothing_left

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if this micro-batch completed the last step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        in_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        # Packing: the trainer knows a bound of the epoch's steps only, the batch its share.
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        epoch_ends = is_last or getattr(batch, "progress", None) == 1.0
        if trainer.global_step == trainer.max_steps or (in_last_epoch and epoch_ends):
            trainer.should_stop = True


class EarlyStop(EarlyStopping):
    """Ends a run whose held-out loss no longer falls; one that it has ended stays ended.

    ``patience`` in validations is that of this start, not the checkpoint's.
    """

    def __init__(self, patience: int) -> None:
        super().__init__("val/loss", patience=patience)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was counted."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End before the first step if the run had come to its end."""
        not_a_number = self.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC
        if not_a_number or self.wait_count >= self.patience:
            logger.info("the held-out loss had ended this run: only the export is made")
            trainer.should_stop = True


def hold_signals_of_starting(launcher: Any) -> None:
    """Have the processes that a strategy's launcher starts hear what asks to stop when they can."""
    if (start := getattr(launcher, "_call_children_scripts", None)) is not None:
        launcher._call_children_scripts = processes.signals_held()(start)


class StopRequest:
    """Notes the first signal that asks this process to stop.

    A second Ctrl-C is for others: where :func:`vipllava.processes.begin` was called it ends the
    process, elsewhere (a notebook) it raises ``KeyboardInterrupt``.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal; None until it has come
        self.exit_code = 0  # that it asks for: 75 for one that a queue sends, 130 for Ctrl-C
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Begin; in place of Lightning's handlers, which talk to other processes from within."""
        self._before = processes.listen(self._note)

    def stop_listening(self) -> None:
        """Give the signals back."""
        processes.stop_listening(self._note, self._before)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        leave_closed_terminal()
        is_ctrl_c = number == signal.SIGINT
        if self.name is not None:
            alone = self._before.get(number) is signal.default_int_handler
            if is_ctrl_c and alone and time.monotonic() - self._since > SAME_CTRL_C_S:
                raise KeyboardInterrupt
            return
        self.name = "Ctrl-C" if is_ctrl_c else signal.Signals(number).name
        self.exit_code = EXIT_INTERRUPTED if is_ctrl_c else Interrupted.exit_code
        self._since = time.monotonic()
        if is_ctrl_c and os.environ.get("LOCAL_RANK", "0") == "0":
            say("Ctrl-C: the run stops when this step is saved; once more ends it at once")
