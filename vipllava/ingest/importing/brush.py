"""Label Studio's own run lengths of a brushed mask (``rle-pack``), read.

A stream of bits, the highest of each byte first: how many values follow (32 bits), how many bits a
value has, less one (5), four lengths of counts, less one (4 each); then runs, until all values are
there: a bit that says whether one value is repeated, two bits that choose the length of the count,
the count less one, and the one value or as many values. They are the channels red, green, blue and
opacity of the picture's pixels, row by row; the mask is where opacity is not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vipllava.types import RecordError
from vipllava.visual_prompts.rle import Bits

_CHANNELS: Final = 4
_FAULT: Final = "mask-invalid"


def mask_of_brush(values: Sequence[Any], width: int, height: int) -> Bits:
    """Return a brushed mask.

    Args:
        values: the bytes, 0 to 255 each.
        width, height: of the picture, pixels.

    Returns:
        bool [height, width].

    Raises:
        RecordError: the bytes break off or run over, or are those of another size.
    """
    try:
        data = np.array(values, dtype=np.uint8)
    except (ValueError, TypeError, OverflowError) as error:
        raise RecordError(f"its rle is no list of bytes ({error})", _FAULT) from error
    stream = _Stream(np.unpackbits(data))
    count = stream.number(32)
    wanted = width * height * _CHANNELS
    if count != wanted:
        raise RecordError(
            f"its rle holds {count} values; a picture of {width} x {height} has {wanted}: it is of "
            "another size than its picture",
            "mask-size",
        )
    num_bits = stream.number(5) + 1
    lengths = [stream.number(4) + 1 for _ in range(4)]
    out = np.zeros(count, dtype=np.int64)
    at = 0
    while at < count:
        repeats = stream.number(1)
        stop = at + 1 + stream.number(lengths[stream.number(2)])
        if stop > count:
            raise RecordError(f"a run of its rle ends at value {stop} of {count}", _FAULT)
        out[at:stop] = stream.numbers(1 if repeats else stop - at, num_bits)
        at = stop
    return out.reshape(height, width, _CHANNELS)[..., _CHANNELS - 1] > 0


class _Stream:
    """Bits that are read from the front."""

    def __init__(self, bits: npt.NDArray[np.uint8]) -> None:
        self._bits, self._at = bits, 0

    def number(self, num_bits: int) -> int:
        """Read one number."""
        return int(self.numbers(1, num_bits)[0])

    def numbers(self, count: int, num_bits: int) -> npt.NDArray[np.int64]:
        """Read so many numbers of so many bits each."""
        stop = self._at + count * num_bits
        if stop > len(self._bits):
            raise RecordError(
                f"its rle breaks off: {stop} bits are wanted, {len(self._bits)} are there", _FAULT
            )
        bits = self._bits[self._at : stop].reshape(count, num_bits).astype(np.int64)
        self._at = stop
        return bits @ (1 << np.arange(num_bits - 1, -1, -1, dtype=np.int64))
