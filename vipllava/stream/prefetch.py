"""Fetches the remote shards that training reaches next, in the order in which it reaches them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vipllava.shards.tars import ShardSet
from vipllava.stream.order import SampleOrder
from vipllava.types import ConfigError


class ShardPrefetcher:
    """Keeps a window of samples ahead of what was consumed on this machine's disk.

    Every rank asks for the same shards at the same time; the cache fetches each once a node.

    Args:
        shard_sets: the data sets, in the order's own order. Local ones cost nothing.
        order: which samples come when.

    Raises:
        ConfigError: the cache is too small for what is read at once.
    """

    def __init__(self, shard_sets: Sequence[ShardSet], order: SampleOrder) -> None:
        self.order = order
        self._remote = {
            part: shards for part, shards in enumerate(shard_sets) if shards.cache is not None
        }
        self._asked: tuple[int, int] | None = None  # epoch, and up to which of its samples
        for shards in self._remote.values():
            # A window is read in any order; one that does not fit would fetch a shard per sample.
            assert shards.cache is not None
            per_window = math.ceil(order.window_samples * len(shards.paths) / len(shards))
            sizes = np.sort(shards.tar_sizes)[-per_window:]
            if (needed := int(sizes.sum())) > shards.cache.max_bytes:
                raise ConfigError(
                    f"cache_gb={shards.cache.max_bytes / 10**9:g} is less than the "
                    f"{needed / 10**9:.3g} GB of the {len(sizes)} shards of `{shards.name}` that "
                    "are shuffled together; raise it, or lower window_samples"
                )

    def consumed(self, epoch: int, samples: int) -> None:
        """Fetch on, once so many samples of an epoch were consumed."""
        if not self._remote:
            return
        horizon = self.order.window_samples
        if self._asked is not None:
            asked_epoch, reached = self._asked
            if asked_epoch == epoch and samples + horizon // 2 < reached:
                return
        coming = self.order.epoch(epoch)
        reach = slice(samples, samples + horizon)
        self._asked = epoch, samples + horizon
        for part, shards in self._remote.items():
            positions = coming.position[reach][coming.part[reach] == part]
            numbers = np.searchsorted(shards.shard_ends, positions, side="right")
            shards.prefetch(dict.fromkeys(numbers.tolist()))
