"""What asks a run to stop while it trains: it stops at the end of a step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from vipllava.processes import (
    EXIT_INTERRUPTED,
    SAME_CTRL_C_S,
    leave_closed_terminal,
    listen,
    say,
    signals_held,
    stop_listening,
)
from vipllava.types import Interrupted


def hold_signals_of_starting(launcher: Any) -> None:
    """Have the processes that Lightning starts hear what asks to stop when they can answer.

    Args:
        launcher: of a strategy, or None where another launcher starts the processes.
    """
    start = getattr(launcher, "_call_children_scripts", None)
    if start is None:
        return

    def start_held() -> None:
        with signals_held():
            start()

    launcher._call_children_scripts = start_held


class StopRequest:
    """Notes the first signal that asks this process to stop.

    A second Ctrl-C is for others: where :func:`vipllava.processes.begin` was called it ends the
    process, elsewhere (a notebook) it raises ``KeyboardInterrupt``.

    Attributes:
        name: of the signal, None until it has come.
        exit_code: that it asks for: 75 for one that a queue sends, 130 for Ctrl-C; 0 until then.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.exit_code = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Begin; in place of Lightning's handlers, which talk to other processes from within."""
        self._before = listen(self._note)

    def stop_listening(self) -> None:
        """Give the signals back."""
        stop_listening(self._note, self._before)
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
