"""How long a file is tried whose storage fails: attempts, pauses, and one time for all of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from vipllava.types import ConfigError

FRUITFUL: Final = 1 << 20
"""Bytes by which a file has to grow for its time and its attempts to count anew."""
_LONGEST_PAUSE_S: Final = 60.0
_LAST_S: Final = 1.0  # a last attempt begun at the very end of the time still gets so long
_MOST_DOUBLINGS: Final = 16


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a file is tried.

    Attributes:
        max_attempts: in a row that may bring (almost) nothing; None: only the time counts.
        timeout_s: seconds without a byte after which a connection counts as broken.
        backoff_s: seconds before the second attempt; doubles with each, up to a minute.
        total_s: seconds within which the file is whole or a megabyte longer: connecting, waiting,
            pauses and all attempts together.
    """

    max_attempts: int | None = 5
    timeout_s: float = 60.0
    backoff_s: float = 1.0
    total_s: float = 600.0

    def __post_init__(self) -> None:
        too_few = self.max_attempts is not None and self.max_attempts < 1
        if too_few or self.timeout_s <= 0 or self.backoff_s < 0 or self.total_s <= 0:
            raise ConfigError(
                f"{self} cannot work; max_attempts is at least 1, timeout_s and total_s above 0, "
                "backoff_s not negative"
            )


PATIENT: Final = Patience()
ONCE: Final = Patience(max_attempts=1)


class Trial:
    """The attempts at one file, from the moment it is wanted.

    Its text says how often and for how long it has been tried: ``3 attempts in 12 s``.
    """

    def __init__(self, patience: Patience, size: int = 0) -> None:
        """Begin.

        Args:
            patience: the bounds.
            size: bytes of the file that are there already.
        """
        self.patience = patience
        self.num_failed = 0
        self._best = size
        self._moved = self._began = time.monotonic()

    def begin(self) -> None:
        """Note that an attempt begins."""
        self._began = time.monotonic()

    @property
    def overdue(self) -> bool:
        """Whether the present attempt is to end, although bytes still come now and then."""
        return self.left_s == 0 and time.monotonic() - self._began > _LAST_S

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

    def pause_after_failure(self, size: int = 0, asked_s: float = 0.0) -> float | None:
        """Count a failed attempt.

        Args:
            size: bytes that are there.
            asked_s: seconds to wait that the other side has asked for.

        Returns:
            Seconds before the next attempt; None if there is to be none.
        """
        self.moved_to(size)
        self._best = max(self._best, size)
        self.num_failed += 1
        left_s = self.left_s
        if left_s == 0 or self.num_failed == self.patience.max_attempts:
            return None
        doublings = min(self.num_failed - 1, _MOST_DOUBLINGS)
        pause_s = max(self.patience.backoff_s * 2**doublings, asked_s)
        return min(pause_s, _LONGEST_PAUSE_S, left_s)

    def __str__(self) -> str:
        seconds = time.monotonic() - self._moved
        lasted = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
        return f"{self.num_failed} attempt{'s'[: self.num_failed != 1]} in {lasted}"
