"""The pixels of a mask in run lengths, without decoding it: bounds, boxes, pieces, points.

A mask is kept as upright runs, column by column; a photograph's objects have hundreds of them where
they have hundred thousands of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from vipllava.types import BBox, Point, Polygon, RunLengths
from vipllava.visual_prompts.mark_places import Described, MarkError
from vipllava.visual_prompts.mask_outlines import outlines_of_mask
from vipllava.visual_prompts.rle import Bits, Ints, rle_of_runs, runs_of_rle


@dataclass(frozen=True, eq=False, slots=True)
class MaskPixels:
    """The pixels of a mask as upright runs, from the left, and downwards in each column.

    Where there are none, there are neither bounds nor points.
    """

    size: tuple[int, int]  # height and width of the image, pixels: in COCO's order
    x: Ints  # the column of each run
    top: Ints  # its first row
    bottom: Ints  # its last row

    @classmethod
    def of(cls, rle: RunLengths) -> Self:
        """Unpack run lengths; see :func:`vipllava.visual_prompts.rle.check_rle`.

        Raises:
            MarkError: they mean nothing.
        """
        height, _ = rle.size
        first, last = (runs_of_rle(rle) - (0, 1)).T
        columns = last // height - first // height + 1  # that a run reaches into
        before = np.repeat(np.cumsum(columns) - columns, columns)
        x = np.repeat(first // height, columns) + np.arange(len(before)) - before
        top = np.maximum(np.repeat(first, columns) - x * height, 0)
        bottom = np.minimum(np.repeat(last, columns) - x * height, height - 1)
        return cls(rle.size, x, top, bottom)

    @classmethod
    def in_image(cls, rle: RunLengths, size: tuple[int, int], name: str) -> Self:
        """Unpack the mask of an image.

        Args:
            rle: as :meth:`of`.
            size: width and height of the image, pixels.
            name: of the field, for errors.

        Raises:
            MarkError: the mask is of another size, or without a pixel.
        """
        if rle.size != size[::-1]:
            expected = f"[{size[1]}, {size[0]}], height and width of the image"
            if rle.size == size:
                expected += ": these are width and height, or those before its EXIF rotation"
            raise MarkError(f"{name}.size", list(rle.size), expected)
        pixels = cls.of(rle)
        if not len(pixels.x):
            raise MarkError(name, Described("a mask without a pixel"), "a mask of something")
        return pixels

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int((self.bottom - self.top + 1).sum())

    @property
    def bounds(self) -> BBox:
        """The first and the last column and row with a pixel: x1, y1, x2, y2, whole numbers."""
        ends = self.x[0], self.top.min(), self.x[-1], self.bottom.max()
        x1, y1, x2, y2 = map(float, ends)
        return x1, y1, x2, y2

    def boxes(self) -> list[BBox]:
        """Return boxes that together cover these pixels and no others.

        Returns:
            x1, y1, x2, y2 of the first and the last pixel of each, whole numbers.
        """
        order = np.lexsort((self.x, self.bottom, self.top))
        x, top, bottom = self.x[order], self.top[order], self.bottom[order]
        goes_on = (np.diff(x) == 1) & (np.diff(top) == 0) & (np.diff(bottom) == 0)
        first = np.concatenate([[True], ~goes_on])[: len(x)]
        last = np.concatenate([~goes_on, [True]])[: len(x)]
        corners = np.stack([x[first], top[first], x[last], bottom[last]], axis=1)
        return [(x1, y1, x2, y2) for x1, y1, x2, y2 in corners.astype(float).tolist()]

    def outlines(self) -> tuple[Polygon, ...]:
        """Return rings around pieces and holes; see :func:`outlines_of_mask`."""
        left, top, *_ = self.bounds
        rings = outlines_of_mask(self._decoded())
        return tuple(tuple((x + left, y + top) for x, y in ring) for ring in rings)

    def _decoded(self) -> Bits:
        """Return what lies within the bounds, bool [height, width]."""
        left, upper, right, lower = map(int, self.bounds)
        height, width = lower - upper + 1, right - left + 1
        start = (self.x - left) * height + self.top - upper
        ends = np.stack([start, start + self.bottom - self.top + 1], axis=1).ravel()
        lengths = np.diff(ends, prepend=0, append=height * width)
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T

    def largest_piece(self) -> Self:
        """Return the piece with most pixels; pieces are what touches by sides."""
        height, _ = self.size
        first, last = self._flat()
        # A run touches those of the next column that end at or below its top, and begin at or
        # above its bottom.
        touched = zip(
            np.searchsorted(last, first + height).tolist(),
            np.searchsorted(first, last + height, side="right").tolist(),
            strict=True,
        )
        parents = list(range(len(first)))

        def root(run: int) -> int:
            while parents[run] != run:
                parents[run] = parents[parents[run]]
                run = parents[run]
            return run

        for run, (start, stop) in enumerate(touched):
            for other in range(start, stop):
                parents[root(other)] = root(run)
        piece = np.array([root(run) for run in parents])
        kept = piece == np.bincount(piece, weights=last - first + 1).argmax()
        return type(self)(self.size, self.x[kept], self.top[kept], self.bottom[kept])

    def contains(self, points: npt.NDArray[np.float64]) -> Bits:
        """Tell which of ``points`` [n, 2] lie on these pixels."""
        height, _ = self.size
        place = np.floor(points).astype(np.int64)
        y = place[:, 1]
        flat: Ints = place[:, 0] * height + y
        first, last = self._flat()
        run = np.searchsorted(first, flat, side="right") - 1
        return (y >= 0) & (y < height) & (run >= 0) & (flat <= last[run])

    def nearest(self, point: Point) -> Point:
        """Return the middle of the pixel that is nearest to a point."""
        x = self.x + 0.5
        y = np.clip(point[1], self.top + 0.5, self.bottom + 0.5)
        at = int(np.hypot(x - point[0], y - point[1]).argmin())
        return float(x[at]), float(np.floor(y[at]) + 0.5)

    def sample(self, count: int, rng: np.random.Generator) -> list[Point]:
        """Draw ``count`` pixels, all with the same chance; return their middles."""
        ends = np.cumsum(self.bottom - self.top + 1)
        drawn = rng.integers(ends[-1], size=count)
        run = np.searchsorted(ends, drawn, side="right")
        pixels = np.stack([self.x[run], self.bottom[run] + 1 - (ends[run] - drawn)], axis=1)
        return [(x, y) for x, y in (pixels + 0.5).tolist()]

    def _flat(self) -> tuple[Ints, Ints]:
        """Return the first and the last pixel of each run, counted down the columns."""
        start = self.x * self.size[0]
        return start + self.top, start + self.bottom


def moved_mask(rle: RunLengths, by: tuple[float, float]) -> RunLengths:
    """Return a mask moved to the right and down by whole pixels, and not out of its image."""
    pixels, (height, width) = MaskPixels.of(rle), rle.size
    x1, y1, x2, y2 = map(int, pixels.bounds)
    dx = min(max(round(by[0]), -x1), width - 1 - x2)
    dy = min(max(round(by[1]), -y1), height - 1 - y2)
    start = (pixels.x + dx) * height + pixels.top + dy
    return rle_of_runs(np.stack([start, start + pixels.bottom - pixels.top + 1], axis=1), rle.size)


def mask_fault(error: MarkError) -> str:
    """Return the class of a fault of run lengths, as records' errors carry it."""
    return "mask-size" if ".size" in error.field else "mask-invalid"
