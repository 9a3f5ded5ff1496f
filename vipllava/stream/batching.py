"""Which samples make a global batch: shuffled, grouped by length, or packed.

The sequence of global batches is a pure function of (seed, epoch). A batch is a list of *rows*: a
row is one sample, or with packing several that share it. With every batch comes a :class:`Cursor`,
from which the sequence goes on exactly behind it, without replaying what came before.

* ``shuffled``: the order, cut.
* ``length_grouped``: within a window of batches samples are sorted by length, cut, and the batches
  are shuffled, so that little is padded. The longest batch of an epoch's first window comes first:
  one that does not fit into memory fails at once.
* ``packed``: within a window of samples, whole samples share rows of a fixed length. Lengths are
  true ones, text and image, so a window is planned when it is reached.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from vipllava.keyed_random import generator_for
from vipllava.stream.order import Epoch, Item, SampleOrder
from vipllava.types import ConfigError

Batching = Literal["shuffled", "length_grouped", "packed"]
GROUP_WINDOW_BATCHES: Final = 50
"""Global batches whose samples are sorted together."""
PACK_WINDOW_SAMPLES: Final = 4096
"""Samples that are packed together."""

Row = tuple[Item, ...]
Lengths = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the sequence of global batches: what a checkpoint has to know."""

    epoch: int = 0  # the epoch
    step: int = 0  # global batches of this epoch before this place
    samples: int = 0  # samples of this epoch before this place
    window: int = 0  # packed: the window in which the next row lies
    row: int = 0  # packed: rows of that window before this place


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The samples of one optimizer step over all ranks."""

    rows: tuple[Row, ...]  # samples that share a row of the network's input
    after: Cursor  # the place behind this batch
    progress: float  # share of the epoch's samples consumed when this step is done, 0..1


@dataclass(eq=False)
class BatchPlan(ABC):
    """A sequence of global batches for every epoch."""

    order: SampleOrder  # of the samples
    rows_per_batch: int  # rows of a full global batch
    exact: ClassVar = True
    """Whether ``max_steps`` is the number of steps, not a bound."""

    def __post_init__(self) -> None:
        if self.rows_per_batch < 1:
            raise ConfigError(f"global_batch_size={self.rows_per_batch} must be at least 1")

    def max_steps(self) -> int:
        """Return a number of steps that no epoch exceeds: as if every row were one sample."""
        return -(-len(self.order) // self.rows_per_batch)

    @abstractmethod
    def batches(self, start: Cursor) -> Iterator[GlobalBatch]:
        """Yield the global batches of ``start.epoch`` from there on; the last may be smaller."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what has to be equal for a cursor to mean the same place."""


@dataclass(eq=False)
class SampleBatches(BatchPlan):
    """``shuffled`` and ``length_grouped``: every row is one sample."""

    # Gives the (estimated) total length of an epoch's samples; None leaves them shuffled.
    lengths: Callable[[Epoch], Lengths] | None = None

    def batches(self, start: Cursor) -> Iterator[GlobalBatch]:
        """Yield the global batches from ``start`` on."""
        epoch = self.order.epoch(start.epoch)
        total, size = len(epoch), self.rows_per_batch
        places = np.arange(total) if self.lengths is None else self._grouped(epoch, start.epoch)
        for step in range(start.step, self.max_steps()):
            done = min(total, (step + 1) * size)
            rows = tuple((item,) for item in epoch.items(places[step * size : done]))
            yield GlobalBatch(rows, Cursor(start.epoch, step + 1, done), done / total)

    def identity(self) -> dict[str, Any]:
        """Return batching and batch size."""
        batching = "shuffled" if self.lengths is None else "length_grouped"
        return {"batching": batching, "global_batch_size": self.rows_per_batch}

    def _grouped(self, epoch: Epoch, number: int) -> npt.NDArray[np.int64]:
        """Return the places of the epoch's samples in the order of the batches."""
        assert self.lengths is not None
        lengths, size = self.lengths(epoch), self.rows_per_batch
        rng = generator_for(self.order.seed, number, "length_grouped")
        window = size * GROUP_WINDOW_BATCHES
        ordered: list[npt.NDArray[np.int64]] = []
        for first in range(0, len(epoch), window):
            # Stable, longest first: equal lengths stay in the order that was drawn.
            places = first + np.argsort(-lengths[first : first + window], kind="stable")
            # A remainder has to come last; it is drawn from all lengths, not the shortest ones.
            rest = np.sort(rng.permutation(len(places))[: len(places) % size])
            last, full = places[rest], np.delete(places, rest).reshape(-1, size)
            shuffled = rng.permutation(len(full))
            if first == 0 and len(full):
                shuffled = np.concatenate([[0], shuffled[shuffled != 0]])
            ordered += [full[shuffled].reshape(-1), last]
        return np.concatenate(ordered)


WindowPlanner = Callable[[Sequence[Item], np.random.Generator, str], tuple[Row, ...]]
"""Makes the packs of a window, a pure function of its samples, a generator that shuffles the packs,
and a name that tells the window from any other. Every sample, or its substitute, is in one pack."""


@dataclass(eq=False)
class PackedBatches(BatchPlan):
    """``packed``: every row is a pack."""

    planner: WindowPlanner  # makes the packs of a window
    _: KW_ONLY
    window_samples: int = PACK_WINDOW_SAMPLES  # samples of a window
    ahead: bool = True  # plan the next window in a thread; False where another process plans it
    # What else a cursor depends on, e.g. the pack length.
    depends_on: Mapping[str, Any] = field(default_factory=dict[str, Any])
    exact: ClassVar = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_samples < 1:
            raise ConfigError(f"window_samples={self.window_samples} must be at least 1")

    def batches(self, start: Cursor) -> Iterator[GlobalBatch]:
        """Yield the global batches from ``start`` on."""
        rows: list[Row] = []
        step, samples, total = start.step, start.samples, len(self.order)
        for window, packs in self._windows(start):
            first = start.row if window == start.window else 0
            for row in range(first, len(packs)):
                rows.append(packs[row])
                if len(rows) < self.rows_per_batch:
                    continue
                step, samples = step + 1, samples + sum(map(len, rows))
                behind = (window, row + 1) if row + 1 < len(packs) else (window + 1, 0)
                after = Cursor(start.epoch, step, samples, *behind)
                yield GlobalBatch(tuple(rows), after, samples / total)
                rows = []
        if rows:
            after = Cursor(start.epoch, step + 1, total, self._num_windows, 0)
            yield GlobalBatch(tuple(rows), after, 1.0)

    def identity(self) -> dict[str, Any]:
        """Return batching and batch size."""
        return {
            "batching": "packed",
            "packs_per_batch": self.rows_per_batch,
            "pack_window": self.window_samples,
            **self.depends_on,
        }

    @property
    def _num_windows(self) -> int:
        return -(-len(self.order) // self.window_samples)

    def _windows(self, start: Cursor) -> Iterator[tuple[int, tuple[Row, ...]]]:
        epoch = self.order.epoch(start.epoch)

        def plan(window: int) -> tuple[Row, ...]:
            first = window * self.window_samples
            items = epoch.items(slice(first, first + self.window_samples))
            rng = generator_for(self.order.seed, start.epoch, window, "packs")
            return self.planner(items, rng, f"epoch{start.epoch}-window{window}")

        coming: Future[tuple[Row, ...]] | None = None
        for window in range(start.window, self._num_windows):
            packs = plan(window) if coming is None else coming.result()
            more = self.ahead and window + 1 < self._num_windows
            coming = _in_thread(plan, window + 1) if more else None
            yield window, packs


def _in_thread(plan: Callable[[int], tuple[Row, ...]], window: int) -> Future[tuple[Row, ...]]:
    """Plan in a thread that a process does not wait for when it ends: its storage may be silent."""
    planned: Future[tuple[Row, ...]] = Future()

    def run() -> None:
        try:
            planned.set_result(plan(window))
        except BaseException as error:  # noqa: BLE001 - raised where the plan is wanted
            planned.set_exception(error)

    threading.Thread(target=run, name="pack-planner", daemon=True).start()
    return planned
