"""How long a file is tried whose storage fails: attempts, pauses, and one time for all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from vipllava.types import ConfigError, StorageError

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

FRUITFUL: Final = 1 << 20
"""Bytes by which a file has to grow for its time and its attempts to count anew."""
_LONGEST_PAUSE_S: Final = 60.0
_LAST_S: Final = 1.0  # a last attempt begun at the very end of the time still gets so long
_MOST_DOUBLINGS: Final = 16
_MOST_WRONG: Final = 5


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a file is tried."""

    # in a row that may bring (almost) nothing; None: only the time counts
    max_attempts: int | None = 5
    timeout_s: float = 60.0  # seconds without a byte after which a connection counts as broken
    backoff_s: float = 1.0  # seconds before the second attempt; doubles with each, up to a minute
    # seconds within which the file is whole or a megabyte longer: connecting, waiting, pauses and
    # all attempts together
    total_s: float = 600.0

    def __post_init__(self) -> None:
        too_few = self.max_attempts is not None and self.max_attempts < 1
        if too_few or self.timeout_s <= 0 or self.backoff_s < 0 or self.total_s <= 0:
            raise ConfigError(
                f"{self} cannot work; max_attempts is at least 1, timeout_s and total_s above 0, "
                "backoff_s not negative"
            )


class BrokenError(Exception):
    """This attempt failed; the next one may not."""

    def __init__(self, message: str, *, size: int = 0, pause_s: float = 0.0) -> None:
        super().__init__(message)
        self.size = size  # bytes of the file that were there at the end of the attempt
        self.pause_s = pause_s  # seconds to wait that the other side has asked for


class WrongError(BrokenError):
    """A whole answer came that is not the file that is expected; few attempts at it are enough."""


class GivenUpError(StorageError):
    """Every attempt failed."""

    reason: BaseException | None = None
    """What the last one failed of, where that is known."""


PATIENT: Final = Patience()
ONCE: Final = Patience(max_attempts=1)


class Trial:
    """The attempts at one file, from the moment it is wanted; ``size`` bytes are there already.

    Its text says how often and for how long it has been tried: ``3 attempts in 12 s``.
    """

    def __init__(self, patience: Patience, size: int = 0) -> None:
        self.patience = patience
        self.num_failed = 0
        self._num_wrong = 0
        self._best = size
        self._moved = self._began = time.monotonic()

    def begin(self) -> None:
        """Note that an attempt begins."""
        self._began = time.monotonic()

    @property
    def left_s(self) -> float:
        """Seconds that are left for the file to get on; 0 at the end."""
        return max(0.0, self._moved + self.patience.total_s - time.monotonic())

    @property
    def timeout_s(self) -> float:
        """Seconds that one wait for a byte may take now."""
        return min(self.patience.timeout_s, max(self.left_s, _LAST_S))

    def moved_to(self, size: int) -> None:
        """Note how many bytes are there; well above the most so far, the time counts anew."""
        if size >= self._best + FRUITFUL:
            self._best = size
            self._moved = time.monotonic()
            self.num_failed = 0

    def check(self, size: int) -> None:
        """Note how many bytes are there; raises BrokenError if they came too slowly."""
        self.moved_to(size)
        if self.left_s == 0 and time.monotonic() - self._began > _LAST_S:
            raise BrokenError(f"only {size} bytes came in the time that it is tried")

    def pause_after_failure(self, error: BrokenError) -> float | None:
        """Count a failed attempt; return the seconds before the next one, None if there is none."""
        self.moved_to(error.size)
        self._best = max(self._best, error.size)
        self.num_failed += 1
        self._num_wrong += isinstance(error, WrongError)
        left_s = self.left_s
        ended = self.num_failed == self.patience.max_attempts or self._num_wrong == _MOST_WRONG
        if left_s == 0 or ended:
            return None
        doublings = min(self.num_failed - 1, _MOST_DOUBLINGS)
        pause_s = max(self.patience.backoff_s * 2**doublings, error.pause_s)
        return min(pause_s, _LONGEST_PAUSE_S, left_s)

    def __str__(self) -> str:
        seconds = time.monotonic() - self._moved
        lasted = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
        return f"{self.num_failed} attempt{'s'[: self.num_failed != 1]} in {lasted}"


def retry(
    attempt: Callable[[], _Result], trial: Trial, what: str, *, level: int = logging.WARNING
) -> _Result:
    """Return the result of the first attempt that does not break.

    Args:
        attempt: raises :class:`BrokenError` where another one may help; other errors end it.
        what: the file, for messages.
        level: of the log's line about each failed attempt.

    Raises:
        GivenUpError: the patience is at its end.
    """
    while True:
        try:
            return attempt()
        except BrokenError as error:
            pause_s = trial.pause_after_failure(error)
            if pause_s is None:
                given_up = GivenUpError(f"{what}: given up after {trial}; the last one: {error}")
                given_up.reason = error.__cause__
                raise given_up from error
            log.log(level, "%s: %s; trying again in %.0f s", what, error, pause_s)
        time.sleep(pause_s)
