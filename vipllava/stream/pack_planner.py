"""Planning a window of packs from true lengths, once per job.

The lengths come from the texts alone: records are read and encoded, images are not decoded. Of
several ranks the first one plans, the others get the result from it: all need the same plan, also
where one machine's copy of the data is damaged, and planning is the one part of the stream that
costs real time (about half a millisecond a sample).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vipllava.stream.batching import Row
from vipllava.stream.order import Item
from vipllava.stream.packing import plan_packs
from vipllava.stream.quarantine import BadSample
from vipllava.stream.visual_prompt_dataset import VisualPromptDataset
from vipllava.types import ConfigError, VipLlavaError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_POLL_S: Final = 0.05
_BEAT: Final = "planning"
_BEAT_S: Final = 1.0
_KEPT: Final = 8
"""Windows whose plans are kept; ranks are never so far apart."""


class PackPlanner:
    """Plans windows; see :class:`vipllava.stream.batching.WindowPlanner`.

    Args:
        dataset: gives true lengths and, by its policy, substitutes.
        pack_length: ids of a row.
        max_images: images of a row at most: they bound the vision tower's memory.
        shared: shares plans with the other ranks; None plans for this one alone.
        on_faults: gets the bad samples of a window that this process planned.
    """

    def __init__(
        self,
        dataset: VisualPromptDataset,
        *,
        pack_length: int,
        max_images: int,
        shared: SharedPlans | None = None,
        on_faults: Callable[[list[BadSample]], None] | None = None,
    ) -> None:
        longest = dataset.sample_encoder.conversation_encoder.max_length
        if longest > pack_length:
            raise ConfigError(
                f"pack_length={pack_length} is less than max_length={longest}: a sample "
                "of that length would fit into no pack; raise the one or lower the other"
            )
        if max_images < 1:
            raise ConfigError(f"max_images={max_images} must be at least 1")
        self.dataset = dataset
        self.pack_length = pack_length
        self.max_images = max_images
        self.shared = shared
        self.on_faults = on_faults

    def __call__(
        self, items: Sequence[Item], rng: np.random.Generator, name: str
    ) -> tuple[Row, ...]:
        """Return the packs of a window, shuffled.

        Raises:
            VipLlavaError: a sample is bad and the policy is ``error``, storage failed, or rank 0
                failed or is gone.
        """
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
        indices: list[list[int]] = [pack.tolist() for pack in packs]
        return tuple(tuple(used[n] for n in indices[place]) for place in shuffled)


class SharedPlans:
    """Plans that rank 0 makes and all ranks of a job read, through the store that they met at.

    No collective: ranks ask when they get there, and rank 0 plans ahead in a thread.

    Args:
        store: of the job; a connection that nobody else uses.
        rank: this process.
        timeout_s: seconds that rank 0 may take for one sample; then it is taken to be gone.
    """

    def __init__(self, store: Store, *, rank: int, timeout_s: float) -> None:
        self.store = store
        self.plans = rank == 0
        self.timeout_s = timeout_s
        self._kept: list[str] = []
        self._next_beat = 0.0

    def get(self, name: str, plan: Callable[[], tuple[Row, ...]]) -> tuple[Row, ...]:
        """Return the plan called ``name``, made here or by rank 0.

        Raises:
            VipLlavaError: planning failed, there or here, or rank 0 is gone.
        """
        if not self.plans:
            return self._receive(name)
        try:
            rows = plan()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.store.set(name, json.dumps({"error": text}))
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
