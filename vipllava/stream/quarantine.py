"""What happens to a sample that cannot be read or made: an error, or quarantine.

``error`` ends the job at the first one. ``quarantine`` puts a substitute in its place, the same one
in every run and division over ranks; writes a line to ``quarantine.jsonl``; and ends the job once
more than a stated share of the samples is bad. Only faults of the data are bad samples:
``RecordError``, which covers records, images and checksums. Whatever else fails, storage above all,
fails for other samples too, and not in every run; it ends the job.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

from vipllava.keyed_random import generator_for
from vipllava.stream.order import Item
from vipllava.types import ConfigError, RecordError, StorageError

log = logging.getLogger(__name__)

OnFault = Literal["error", "quarantine"]
QUARANTINE_FILE: Final = "quarantine.jsonl"
_ATTEMPTS: Final = 64
_FEWEST_SAMPLES: Final = 1000
"""A share is only judged as if at least so many samples had been read."""
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class BadSample:
    """One bad sample."""

    dataset: str  # the data set's name
    key: str  # the sample's key
    shard: str  # the tar it lies in
    offset: int  # place of its record in the tar, bytes
    epoch_pass: int  # pass over the data set in which it was met
    fault: str  # class of the fault, see docs/lint.md
    reason: str  # the error's message
    substitute: str  # key of the sample in its place


@dataclass(frozen=True, slots=True)
class BadSamplePolicy:
    """What to do about bad samples."""

    on_fault: OnFault = "error"  # ``error`` or ``quarantine``
    max_fault_rate: float = 0.001  # share of bad samples above which quarantine gives up

    def __post_init__(self) -> None:
        if self.on_fault not in get_args(OnFault):
            known = ", ".join(get_args(OnFault))
            raise ConfigError(f"on_fault={self.on_fault}: expected one of {known}")
        if not 0 <= self.max_fault_rate <= 1:
            raise ConfigError(
                f"max_fault_rate={self.max_fault_rate}: expected a number from 0 to 1"
            )


def candidates(item: Item, num_samples: int, *, seed: int, name: str) -> Iterator[Item]:
    """Yield the substitutes to try for a bad sample of the data set ``name``, always the same."""
    rng = generator_for(seed, item.epoch_pass, name, item.position, "substitute")
    for _ in range(_ATTEMPTS):
        yield item._replace(position=int(rng.integers(num_samples)))


def with_substitute(
    item: Item,
    make: Callable[[Item], _Made],
    describe: Callable[[Item, RecordError, Item], BadSample],
    policy: BadSamplePolicy,
    substitutes: Iterator[Item],
) -> tuple[_Made, Item, BadSample | None]:
    """Make a sample, or by the policy another one.

    ``make`` raises RecordError for a bad sample and for an unfit substitute; whatever else it
    raises is no fault of the sample, and raised under any policy.

    Returns:
        What was made, of which item, and the fault if it is a substitute.

    Raises:
        RecordError: the sample's own, by policy, or because no substitute is good either.
    """
    try:
        return make(item), item, None
    except RecordError as error:
        if policy.on_fault == "error":
            raise
        first = error
    for other in substitutes:
        try:
            return make(other), other, describe(item, first, other)
        except RecordError:
            continue
    raise RecordError(
        f"{first}\nNone of {_ATTEMPTS} substitutes of the same data set is good either: run "
        "`vipllava lint` on it"
    ) from first


@dataclass(eq=False)
class QuarantineLog:
    """Counts faults over the job and writes this process's ones down."""

    path: Path | None  # the quarantine file, to which every process appends; None only counts
    policy: BadSamplePolicy  # gives the rate at which to stop
    total: int = field(default=0, init=False)  # faults of all ranks
    num_samples: int = field(default=0, init=False)  # of all ranks, bad ones included

    def __post_init__(self) -> None:
        self._pending = 0
        self._lock = threading.Lock()  # plans are made in a thread
        self._written: set[tuple[str, str, int]] | None = None

    def write(self, faults: list[BadSample]) -> None:
        """Append faults; one that stands in the file already (a resumed run) is left out.

        Raises:
            StorageError: the file cannot be written.
        """
        if not faults or self.path is None:
            return
        try:
            with self._lock:
                self._append(faults, self.path)
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written ({error}): free some space there, or check who may "
                "write it; then start the same command again"
            ) from error

    def _append(self, faults: list[BadSample], path: Path) -> None:
        if self._written is None:
            self._written = {
                (line["dataset"], line["key"], line["epoch_pass"]) for line in read_quarantine(path)
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            for fault in faults:
                identity = (fault.dataset, fault.key, fault.epoch_pass)
                if identity not in self._written:
                    self._written.add(identity)
                    log.warning("quarantined %s/%s: %s", fault.dataset, fault.key, fault.reason)
                    line = json.dumps(asdict(fault), ensure_ascii=False) + "\n"
                    file.write(line.encode())  # one write: lines of several processes stay whole

    def add(self, faults: list[BadSample]) -> None:
        """Write faults met outside a step (while planning); the next step counts them."""
        with self._lock:
            self._pending += len(faults)
        self.write(faults)

    def take_pending(self) -> int:
        """Return how many faults were added since the last call."""
        with self._lock:
            pending, self._pending = self._pending, 0
        return pending

    def count(self, num_faults: int, num_samples: int) -> None:
        """Add what all ranks together met in one step.

        Raises:
            RecordError: more than the stated share of the samples is bad.
        """
        self.total += num_faults
        self.num_samples += num_samples
        allowed = self.policy.max_fault_rate * max(self.num_samples, _FEWEST_SAMPLES)
        if num_faults and self.total > allowed:
            where = f"; they are listed in {self.path}" if self.path else ""
            raise RecordError(
                f"{self.total} of {self.num_samples} samples are bad, more than "
                f"max_fault_rate={self.policy.max_fault_rate} allows{where}. Repair or remove them "
                "(`vipllava lint` finds them all), or raise the rate"
            )


def read_quarantine(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a quarantine file; none if there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]
