"""Planning a window of packs from true lengths, once per node.

The lengths come from the texts alone: records are read and encoded, pictures are not decoded. On a
node of several ranks the first one plans and writes the result to a folder, the others read it
there; they need the same plan, and planning is the one part of the stream that costs real time
(about half a millisecond a sample).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from vipllava.data.batching import Row
from vipllava.data.faults import Fault
from vipllava.data.order import Item
from vipllava.data.packing import plan_packs
from vipllava.data.stream import VisualPromptDataset
from vipllava.types import ConfigError, VipLlavaError

log = logging.getLogger(__name__)

_POLL_S: Final = 0.02
_KEPT: Final = 8
"""Windows whose plans are kept; ranks are never so far apart."""


class PackPlanner:
    """Plans windows; see :class:`vipllava.data.batching.WindowPlanner`.

    Args:
        dataset: gives true lengths and, by its policy, substitutes.
        pack_length: ids of a row.
        max_images: pictures of a row at most: they bound the vision tower's memory.
        store: shares plans with the other ranks of the node; None plans for this one alone.
        on_faults: gets the bad samples of a window that this process planned.
    """

    def __init__(
        self,
        dataset: VisualPromptDataset,
        *,
        pack_length: int,
        max_images: int,
        store: PlanStore | None = None,
        on_faults: Callable[[list[Fault]], None] | None = None,
    ) -> None:
        longest = dataset.encoder.encoder.max_length
        if longest > pack_length:
            raise ConfigError(
                f"data.pack_length={pack_length} is less than stage.max_length={longest}: a sample "
                "of that length would fit into no pack; raise the one or lower the other"
            )
        if max_images < 1:
            raise ConfigError(f"data.max_images_per_pack={max_images} must be at least 1")
        self.dataset = dataset
        self.pack_length = pack_length
        self.max_images = max_images
        self.store = store
        self.on_faults = on_faults

    def __call__(
        self, items: Sequence[Item], rng: np.random.Generator, name: str
    ) -> tuple[Row, ...]:
        """Return the packs of a window, shuffled.

        Raises:
            VipLlavaError: a sample is bad and the policy is ``error``, or the rank that plans for
                this node failed or is gone.
        """
        if self.store is None:
            return self._plan(items, rng)
        return self.store.get(name, lambda: self._plan(items, rng))

    def _plan(self, items: Sequence[Item], rng: np.random.Generator) -> tuple[Row, ...]:
        measured = [self.dataset.measure(item) for item in items]
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


class PlanStore:
    """Plans in a folder that the ranks of one node share.

    Args:
        directory: on a disk of this node.
        identity: all that a plan depends on; plans of another identity are not seen.
        writes: whether this rank plans; one of the node does.
        timeout_s: seconds the others wait for a plan.
    """

    def __init__(
        self, directory: Path, identity: Any, *, writes: bool, timeout_s: float = 600.0
    ) -> None:
        digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
        self.directory = directory / digest
        self.writes = writes
        self.timeout_s = timeout_s
        self._kept: list[Path] = []
        if writes and self.directory.is_dir():  # an earlier run's; a plan would be the same
            for left in self.directory.glob("*.error"):
                left.unlink(missing_ok=True)

    def get(self, name: str, plan: Callable[[], tuple[Row, ...]]) -> tuple[Row, ...]:
        """Return the plan called ``name``, made here or by the rank that plans.

        Raises:
            VipLlavaError: planning failed, there or here, or no plan came in time.
        """
        path = self.directory / f"{name}.npz"
        failed = path.with_suffix(".error")
        if not self.writes:
            return self._wait(path, failed)
        if failed.is_file():
            failed.unlink()
        try:
            rows = plan()
        except VipLlavaError as error:
            message = str(error).encode()
            self._write(failed, lambda file: file.write(message))
            raise
        columns = np.array([item for row in rows for item in row], dtype=np.int64)
        ends = np.cumsum([len(row) for row in rows])
        self._write(path, lambda file: np.savez(file, items=columns, ends=ends))
        self._kept.append(path)
        while len(self._kept) > _KEPT:
            self._kept.pop(0).unlink(missing_ok=True)
        return rows

    def _wait(self, path: Path, failed: Path) -> tuple[Row, ...]:
        until = time.monotonic() + self.timeout_s
        while time.monotonic() < until:
            if path.is_file():
                try:
                    return _load(path)
                except (OSError, ValueError, zipfile.BadZipFile) as error:
                    raise VipLlavaError(f"the plan {path} cannot be read: {error}") from error
            if failed.is_file():
                raise VipLlavaError(
                    f"planning on this node failed: {failed.read_text(encoding='utf-8')}"
                )
            time.sleep(_POLL_S)
        raise VipLlavaError(
            f"no plan {path} after {self.timeout_s:.0f} s: the rank that plans for this node is "
            "gone, or the folder is not on a disk that its ranks share (data.plan_dir)"
        )

    def _write(self, path: Path, write: Callable[[Any], Any]) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                write(file)
            partial.replace(path)
        except OSError as error:
            raise VipLlavaError(
                f"{path} cannot be written ({error}); free its disk or set data.plan_dir"
            ) from error
        finally:
            with contextlib.suppress(OSError):  # gone already, or there never was a folder for it
                partial.unlink()


def _load(path: Path) -> tuple[Row, ...]:
    with np.load(path, allow_pickle=False) as stored:
        items = [Item(*row) for row in stored["items"].tolist()]
        ends = [0, *stored["ends"].tolist()]
    return tuple(tuple(items[a:b]) for a, b in pairwise(ends))
