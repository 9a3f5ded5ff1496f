"""Planning a window of packs from true lengths, once per job.

The lengths come from the texts alone: images are not decoded. Of several ranks the first one plans
for all: they need the same plan, also where one machine's copy of the data is damaged, and planning
costs real time (about half a millisecond a sample).
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from vipllava.stream.batching import Batching, BatchPlan, PackedBatches, Row, SampleBatches
from vipllava.stream.order import Item, SampleOrder
from vipllava.stream.quarantine import BadSample
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import ConfigError, RecordError, VipLlavaError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_POLL_S: Final = 0.05
_BEAT: Final = "planning"
_BEAT_S: Final = 1.0
_KEPT: Final = 8
"""Windows whose plans are kept; ranks are never so far apart."""


def plan_batches(
    batching: Batching,
    order: SampleOrder,
    rows_per_batch: int,
    dataset: VisualPromptDataset,
    *,
    pack_length: int,
    max_images: int,
    shared: SharedPlans | None = None,
    on_faults: Callable[[list[BadSample]], None] | None = None,
) -> BatchPlan:
    """Return the sequence of global batches of a way of batching; see :class:`PackPlanner`."""
    if batching != "packed":
        lengths = dataset.estimate_lengths if batching == "length_grouped" else None
        return SampleBatches(order, rows_per_batch, lengths)
    limits = {"pack_length": pack_length, "max_images": max_images}
    planner = PackPlanner(dataset, **limits, shared=shared, on_faults=on_faults)
    ahead = shared is None or shared.rank == 0
    return PackedBatches(order, rows_per_batch, planner, ahead=ahead, depends_on=limits)


@dataclass(eq=False)
class PackPlanner:
    """Plans windows; see :class:`vipllava.stream.batching.WindowPlanner`."""

    dataset: VisualPromptDataset  # gives true lengths and, by its policy, substitutes
    _: KW_ONLY
    pack_length: int  # ids of a row
    max_images: int  # images of a row at most: they bound the vision tower's memory
    shared: SharedPlans | None = None  # with the other ranks; None plans for this one alone
    # Gets the bad samples of a window that this process planned.
    on_faults: Callable[[list[BadSample]], None] | None = None

    def __post_init__(self) -> None:
        longest = self.dataset.sample_encoder.conversation_encoder.max_length
        if longest > self.pack_length:
            raise ConfigError(
                f"pack_length={self.pack_length} is less than max_length={longest}: a sample "
                "of that length would fit into no pack; raise the one or lower the other"
            )
        if self.max_images < 1:
            raise ConfigError(f"max_images={self.max_images} must be at least 1")

    def __call__(
        self, items: Sequence[Item], rng: np.random.Generator, name: str
    ) -> tuple[Row, ...]:
        """Return the packs of a window, shuffled; raises what measuring and sharing raise."""
        if self.shared is None:
            return self._plan(items, rng)
        return self.shared.get(name, lambda: self._plan(items, rng))

    def _plan(self, items: Sequence[Item], rng: np.random.Generator) -> tuple[Row, ...]:
        measured: list[tuple[int, Item, BadSample | None]] = []
        for item in items:
            measured.append(self.dataset.measure(item))
            if self.shared is not None:
                self.shared.beat()
        faults = [fault for _, _, fault in measured if fault is not None]
        if faults and self.on_faults is not None:
            self.on_faults(faults)
        used = [item for _, item, _ in measured]
        packs = plan_packs(
            np.array([length for length, _, _ in measured], dtype=np.int32),
            np.array([self.dataset.has_image(item) for item in used], dtype=bool),
            pack_length=self.pack_length,
            max_images=self.max_images,
        )
        shuffled: list[int] = rng.permutation(len(packs)).tolist()
        return tuple(tuple(used[int(n)] for n in packs[place]) for place in shuffled)


@dataclass(eq=False)
class SharedPlans:
    """Plans that rank 0 makes and all ranks of a job read, through the store that they met at.

    No collective: ranks ask when they get there, and rank 0 plans ahead in a thread.
    """

    store: Store  # of the job; a connection that nobody else uses
    _: KW_ONLY
    rank: int  # this process
    timeout_s: float  # seconds that rank 0 may take for one sample; then it is taken to be gone

    def __post_init__(self) -> None:
        self._kept: list[str] = []
        self._next_beat = 0.0

    def get(self, name: str, plan: Callable[[], tuple[Row, ...]]) -> tuple[Row, ...]:
        """Return the plan called ``name``, made here or by rank 0.

        Raises:
            VipLlavaError: planning failed, there or here, or rank 0 is gone.
        """
        if self.rank != 0:
            return self._receive(name)
        try:
            rows = plan()
        except Exception as error:
            self.store.set(name, json.dumps({"error": f"{type(error).__name__}: {error}"}))
            raise
        self.store.set(name, json.dumps({"rows": rows}))
        self._kept.append(name)
        while len(self._kept) > _KEPT:
            self.store.delete_key(self._kept.pop(0))
        return rows

    def beat(self) -> None:
        """Tell the others now and then that planning goes on."""
        if time.monotonic() >= self._next_beat:
            self.store.add(_BEAT, 1)
            self._next_beat = time.monotonic() + _BEAT_S

    def _receive(self, name: str) -> tuple[Row, ...]:
        heard, heard_at = -1, time.monotonic()
        try:
            while not self.store.check([name]):
                now = time.monotonic()
                if now - heard_at > _BEAT_S and (beat := self.store.add(_BEAT, 0)) != heard:
                    heard, heard_at = beat, now
                if now - heard_at > self.timeout_s:
                    raise VipLlavaError(
                        f"rank 0, which plans the packs of all ranks, measured no sample for "
                        f"{self.timeout_s:.0f} s: see what its own output says"
                    )
                time.sleep(_POLL_S)
            told: dict[str, Any] = json.loads(self.store.get(name))
        except RuntimeError as error:  # of torch's store: the connection broke
            raise VipLlavaError(
                f"rank 0, which plans the packs of all ranks, is gone ({error}): see what its own "
                "output says"
            ) from error
        if "error" in told:
            raise VipLlavaError(f"rank 0 could not plan the packs: {told['error']}")
        return tuple(tuple(Item(*item) for item in row) for row in told["rows"])


def plan_packs(
    lengths: npt.NDArray[np.int32],
    has_image: npt.NDArray[np.bool_],
    *,
    pack_length: int,
    max_images: int,
) -> list[npt.NDArray[np.int64]]:
    """Distribute whole samples over packs: which of them share a row.

    Best fit, longest first: each sample goes to the pack that it fills best, or opens a new one. On
    lengths like those of stage 2 (mean 774, a few short text-only samples) a window of 4096 samples
    fills rows of 4096 ids to about 96 % and rows of 8192 to about 99 %, in a few milliseconds.

    Args:
        lengths: ids of each sample, image included; int32 [samples].
        has_image: whether it has an image; bool [samples].
        pack_length: ids of a pack at most.
        max_images: images of a pack at most, 1 or more.

    Returns:
        The samples of each pack as indices, ascending; every sample is in exactly one.

    Raises:
        RecordError: a sample is longer than a pack; names its index and length.
    """
    if len(lengths) and int(lengths.max()) > pack_length:
        longest = int(lengths.argmax())
        raise RecordError(
            f"sample {longest} of the window has {int(lengths[longest])} ids, a pack holds "
            f"{pack_length}; raise pack_length or lower max_length",
            "too-long",
        )
    packs: list[list[int]] = []
    image_counts: list[int] = []
    # Free ids and number of the packs, ascending: those that take an image, those that do not.
    for_any: list[tuple[int, int]] = []
    for_text: list[tuple[int, int]] = []
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length, num_images = int(lengths[sample]), int(has_image[sample])
        choices = [
            (open_packs[at], at, open_packs)
            for open_packs in ((for_any,) if num_images else (for_any, for_text))
            if (at := bisect_left(open_packs, (length, -1))) < len(open_packs)
        ]
        if choices:
            (free, pack), at, open_packs = min(choices, key=lambda choice: choice[0])
            del open_packs[at]
        else:
            free, pack = pack_length, len(packs)
            packs.append([])
            image_counts.append(0)
        packs[pack].append(sample)
        image_counts[pack] += num_images
        if free > length:
            insort(for_any if image_counts[pack] < max_images else for_text, (free - length, pack))
    return [np.sort(np.array(pack, dtype=np.int64)) for pack in packs]
