"""In which order samples come: a pure function of (seed, epoch), whatever reads them.

Each data set is an endless sequence of *passes* over its samples. In a pass the shards are
permuted, neighbouring shards form a window, and samples are shuffled within the window: reads stay
near-sequential, a few shards at a time. An epoch takes the next so many samples of each data set's
sequence, so half a pass now and the other half in the next epoch is one whole pass; samples of
several data sets are interleaved evenly. Nothing here opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vipllava.keyed_random import generator_for
from vipllava.types import ConfigError

WINDOW_SAMPLES: Final = 16384
"""Samples that are shuffled among each other unless told otherwise: at least so many, and whole
shards."""

Ints = npt.NDArray[np.int64]


class Item(NamedTuple):
    """One sample to be read."""

    part: int  # number of the data set in the mix
    epoch_pass: int  # which pass over that data set this is; the epoch of its wordings and marks
    position: int  # place of the sample in the data set


@dataclass(frozen=True, slots=True)
class MixEntry:
    """How much of one data set an epoch takes; one of the two."""

    epochs: float | None = None  # passes over the data set per epoch, e.g. 1, 0.5 or 2
    # Its share of an epoch whose size is given, relative to the other weights.
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One data set of a mix."""

    name: str  # part of the random key
    shard_sizes: tuple[int, ...]  # samples per shard, in shard order
    num_per_epoch: int  # samples that an epoch takes of it

    @property
    def num_samples(self) -> int:
        """Samples of one pass."""
        return sum(self.shard_sizes)


@dataclass(frozen=True, slots=True)
class Epoch:
    """The samples of one epoch in order, as columns of one length; see :class:`Item`."""

    part: npt.NDArray[np.int16]
    epoch_pass: npt.NDArray[np.int32]
    position: Ints

    def __len__(self) -> int:
        return len(self.position)

    def items(self, places: slice | Ints) -> list[Item]:
        """Return some of the items."""
        columns = (self.part[places], self.epoch_pass[places], self.position[places])
        return [Item(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def parse_mix(mix: Mapping[str, Mapping[str, Any]]) -> dict[str, MixEntry]:
    """Read a mix from plain values.

    Raises:
        ConfigError: listing every entry that gives neither or both of ``epochs`` and ``weight``,
            or a number that is not positive; or weights mixed with epochs.
    """
    problems: list[str] = []
    entries: dict[str, MixEntry] = {}
    for name, value in mix.items():
        given = {key: number for key, number in value.items() if number is not None}
        if set(given) not in ({"epochs"}, {"weight"}):
            problems.append(f"{name} has {dict(value)}; give either epochs or weight")
            continue
        ((key, number),) = given.items()
        if type(number) in (int, float) and math.isfinite(number) and number > 0:
            entries[name] = MixEntry(**{key: float(number)})
        else:
            problems.append(f"{name}.{key} is {number!r}; give a number above 0")
    if not mix:
        problems.append("it is empty; name at least one data set")
    if len({entry.weight is None for entry in entries.values()}) > 1:
        problems.append("some entries give epochs and some weight; use one of the two throughout")
    if problems:
        raise ConfigError("the mix cannot be used:\n" + "\n".join(f"- {p}" for p in problems))
    return entries


def plan_parts(
    shard_sizes: Mapping[str, Sequence[int]],
    mix: Mapping[str, MixEntry],
    samples_per_epoch: int | None = None,
) -> tuple[Part, ...]:
    """Decide how many samples of each data set an epoch takes.

    ``shard_sizes`` are each data set's samples by shard; an epoch mixed by weight is as long as the
    data sets together unless ``samples_per_epoch`` says otherwise.

    Raises:
        ConfigError: a data set would give no sample to an epoch, or ``samples_per_epoch`` is given
            for a mix by epochs, whose size follows from it.
    """
    totals = {name: sum(sizes) for name, sizes in shard_sizes.items()}
    by_weight = any(entry.weight is not None for entry in mix.values())
    if samples_per_epoch is not None and not by_weight:
        raise ConfigError(
            f"samples_per_epoch={samples_per_epoch} belongs to a mix by weight; this one "
            "gives epochs, its size follows from them"
        )
    size = samples_per_epoch or sum(totals[name] for name in mix)
    whole = sum(entry.weight or 0.0 for entry in mix.values())
    parts: list[Part] = []
    for name, entry in mix.items():
        count = round(totals[name] * (entry.epochs or 0.0))
        if by_weight:
            count = round(size * (entry.weight or 0.0) / whole)
        if count < 1:
            raise ConfigError(
                f"the mix gives `{name}` ({totals[name]} samples) no sample in an epoch; raise "
                "its share or leave it out"
            )
        parts.append(Part(name, tuple(shard_sizes[name]), count))
    return tuple(parts)


@dataclass(frozen=True)
class SampleOrder:
    """The order of every epoch."""

    parts: Sequence[Part]  # the data sets
    seed: int  # of all orders
    _: KW_ONLY
    window_samples: int = WINDOW_SAMPLES  # that are shuffled among each other
    shuffle: bool = True  # False keeps shard order, data set after data set

    def __post_init__(self) -> None:
        if self.window_samples < 1:
            raise ConfigError(f"window_samples is {self.window_samples}; it must be at least 1")

    def __len__(self) -> int:
        """Return the samples of an epoch."""
        return sum(part.num_per_epoch for part in self.parts)

    def epoch(self, epoch: int) -> Epoch:
        """Return the samples of an epoch: 0.2 s for a million of them."""
        passes, positions = zip(*(self._stretch(part, epoch) for part in self.parts), strict=True)
        part = np.concatenate([np.full(len(p), n, dtype=np.int16) for n, p in enumerate(positions)])
        epoch_pass, position = np.concatenate(passes), np.concatenate(positions)
        if self.shuffle and len(self.parts) > 1:
            places = np.argsort(self._places(epoch), kind="stable")
            part, epoch_pass, position = part[places], epoch_pass[places], position[places]
        return Epoch(part, epoch_pass, position)

    def pass_order(self, part: Part, epoch_pass: int) -> Ints:
        """Return the positions of one pass over a data set, int64 [num_samples]."""
        if not self.shuffle:
            return np.arange(part.num_samples, dtype=np.int64)
        rng = generator_for(self.seed, epoch_pass, part.name, "order")
        bounds = [0, *accumulate(part.shard_sizes)]
        order: list[Ints] = []
        window: list[Ints] = []
        shuffled: list[int] = rng.permutation(len(part.shard_sizes)).tolist()
        for shard in shuffled:
            window.append(np.arange(bounds[shard], bounds[shard + 1], dtype=np.int64))
            if sum(map(len, window)) >= self.window_samples:
                order.append(rng.permutation(np.concatenate(window)))
                window = []
        if window:
            order.append(rng.permutation(np.concatenate(window)))
        return np.concatenate(order)

    def _stretch(self, part: Part, epoch: int) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return pass and position of what an epoch takes of one data set's sequence."""
        start, end = epoch * part.num_per_epoch, (epoch + 1) * part.num_per_epoch
        passes: list[npt.NDArray[np.int32]] = []
        positions: list[Ints] = []
        size = part.num_samples
        for epoch_pass in range(start // size, -(-end // size)):
            first = epoch_pass * size
            taken = self.pass_order(part, epoch_pass)[max(start - first, 0) : end - first]
            passes.append(np.full(len(taken), epoch_pass, dtype=np.int32))
            positions.append(taken)
        return np.concatenate(passes), np.concatenate(positions)

    def _places(self, epoch: int) -> npt.NDArray[np.float64]:
        """Return where in the epoch (0..1) each sample goes: spread evenly, with jitter."""
        rng = generator_for(self.seed, epoch, *(part.name for part in self.parts), "mix")
        counts = [part.num_per_epoch for part in self.parts]
        return np.concatenate([(np.arange(count) + rng.random(count)) / count for count in counts])
