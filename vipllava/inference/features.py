"""Image features, kept for images that are asked about again.

The tower takes longer than a short answer. What is kept is bounded in bytes, by the digest of the
pixels that the tower reads, so that two files of one image are one.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Picture:
    """One image as the tower reads it."""

    pixels: torch.Tensor  # uint8 [3, height, width], on the host
    digest: bytes

    @classmethod
    def of(cls, pixels: torch.Tensor) -> Picture:
        """Return the picture of pixels, uint8 [3, height, width]."""
        return cls(pixels, hashlib.blake2b(pixels.numpy().data, digest_size=16).digest())


class ImageFeatures:
    """Features of images, the latest of them kept; threads may share it.

    Args:
        compute: from uint8 [num_images, 3, height, width] to [num_images, image_seq_length, width].
        max_bytes: of features that are kept; 0 keeps none.
    """

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor], max_bytes: int) -> None:
        self._compute = compute
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.num_bytes = 0  # of what is kept
        self.num_hits = 0  # images that the tower did not have to see
        self.num_misses = 0  # those that it saw

    def of(self, pictures: Sequence[Picture]) -> list[torch.Tensor]:
        """Return [image_seq_length, width] for each; what is new goes through the tower at once."""
        with self._lock:
            return self._of(pictures)

    def _of(self, pictures: Sequence[Picture]) -> list[torch.Tensor]:
        found = {each.digest: self._kept.get(each.digest) for each in pictures}
        new = {each.digest: each.pixels for each in pictures if found[each.digest] is None}
        self.num_misses += len(new)
        self.num_hits += len(pictures) - len(new)
        if new:
            features = self._compute(torch.stack(list(new.values())))
            # Copies: a view would keep the features of its neighbours, too.
            for digest, one in zip(new, features, strict=True):
                found[digest] = one if len(new) == 1 else one.clone()
        whole = {digest: one for digest, one in found.items() if one is not None}
        for digest, one in whole.items():
            self._keep(digest, one)
        return [whole[each.digest] for each in pictures]

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0

    def _keep(self, digest: bytes, features: torch.Tensor) -> None:
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return
        if features.nbytes > self._max_bytes:
            return
        self._kept[digest] = features
        self.num_bytes += features.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.nbytes
