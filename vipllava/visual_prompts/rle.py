"""Masks as COCO's run lengths: checked, packed, unpacked and decoded.

A mask is run through column by column, from the top left: so many pixels out of it, so many in it,
and so on. COCO writes the lengths as a list, or packed into letters: six bits each, of which one
says whether another one follows, from the fourth length on as the difference to the last but one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from vipllava.types import RunLengths
from vipllava.visual_prompts.mark_places import Described, MarkError

Bits = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

MOST_RUNS: Final = 100_000
"""Lengths of one mask: several times those of a hairy outline in the largest photographs."""
LONGEST_SIDE: Final = 65_535
MOST_PIXELS: Final = 100_000_000
_LETTERS: Final = 7  # of one length: 35 bits hold more than any image has pixels
_FIRST: Final = 48  # the letter of zero
_MORE: Final = 0x20
_SIGN: Final = 0x10


def check_rle(value: object, name: str) -> RunLengths:
    """Return run lengths in their packed form.

    Args:
        value: ``{"size": [height, width], "counts": letters or a list}`` as of COCO, or the mask
            itself, an array of truth values [height, width].
        name: of the field, for errors.

    Raises:
        MarkError: naming what of it means nothing.
    """
    if isinstance(value, RunLengths):
        return value
    if isinstance(value, np.ndarray):
        array = cast("npt.NDArray[Any]", value)
        if array.dtype != np.bool_ or array.ndim != 2 or not array.size:
            found = Described(f"an array of {array.dtype}, {list(array.shape)}")
            raise MarkError(name, found, "truth values [height, width], e.g. mask > 0")
        return RunLengths((array.shape[0], array.shape[1]), _packed(_lengths(array)))
    expected = 'an object {"size": [height, width], "counts": letters or a list}'
    if not isinstance(value, Mapping):
        raise MarkError(name, value, expected)
    fields = cast("Mapping[Any, Any]", value)
    if set(fields) != {"size", "counts"}:
        raise MarkError(name, Described(f"an object of {sorted(map(str, fields))}"), expected)
    height, width = _checked_size(fields["size"], f"{name}.size")
    counts = fields["counts"]
    lengths = _checked_lengths(counts, f"{name}.counts")
    _check_total(lengths, (height, width), f"{name}.counts")
    # Letters stay as they came: most masks are packed already.
    return RunLengths((height, width), counts if isinstance(counts, str) else _packed(lengths))


def rle_of_mask(mask: Bits) -> dict[str, Any]:
    """Return COCO's packed run lengths of a mask, bool [height, width]."""
    rle = check_rle(np.asarray(mask), "mask")
    return {"size": list(rle.size), "counts": rle.counts}


def mask_of_rle(rle: RunLengths) -> Bits:
    """Return the mask, bool [height, width]."""
    height, width = rle.size
    lengths = _unpacked(rle.counts.encode("ascii"), "counts")
    _check_total(lengths, rle.size, "counts")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def runs_of_rle(rle: RunLengths) -> Ints:
    """Return the runs of pixels in a mask, counted down its columns from the left.

    Returns:
        int64 [n, 2]: the first pixel of each, and the one behind its last; ascending and apart.

    Raises:
        MarkError: the counts are not checked, and mean nothing.
    """
    lengths = _unpacked(rle.counts.encode("ascii"), "counts")
    _check_total(lengths, rle.size, "counts")
    # Where an even number of lengths ends, because some are 0, nothing changes.
    ends, times = np.unique(np.cumsum(lengths), return_counts=True)
    area = rle.size[0] * rle.size[1]
    changes = ends[(times % 2 == 1) & (ends < area)]
    if len(changes) % 2:
        changes = np.append(changes, area)
    return changes.reshape(-1, 2)


def rle_of_runs(runs: Ints, size: tuple[int, int]) -> RunLengths:
    """Return the packed form of runs; what :func:`runs_of_rle` returns, or runs that touch."""
    area = size[0] * size[1]
    changes, times = np.unique(runs, return_counts=True)
    changes = changes[(times == 1) & (changes < area)]
    return RunLengths(size, _packed(np.diff(changes, prepend=0, append=area)))


# Lengths.


def _checked_size(value: object, name: str) -> tuple[int, int]:
    expected = f"[height, width] of the image, whole numbers from 1 to {LONGEST_SIDE}"
    is_list = isinstance(value, (list, tuple))
    sides: list[Any] = list(cast("list[Any]", value)) if is_list else []
    if len(sides) != 2 or not all(type(n) is int and 1 <= n <= LONGEST_SIDE for n in sides):
        raise MarkError(name, value, expected)
    if sides[0] * sides[1] > MOST_PIXELS:
        raise MarkError(name, value, f"at most {MOST_PIXELS} pixels")
    return sides[0], sides[1]


def _check_total(lengths: Ints, size: tuple[int, int], name: str) -> None:
    height, width = size
    if (total := int(lengths.sum())) != height * width:
        raise MarkError(
            name, Described(f"{len(lengths)} lengths of {total} pixels in all"),
            f"{height} x {width} = {height * width} pixels, as size says",
        )  # fmt: skip


def _checked_lengths(value: object, name: str) -> Ints:
    if isinstance(value, str):
        try:
            value = value.encode("ascii")
        except UnicodeEncodeError:
            raise MarkError(name, value, "COCO's letters, from `0` to `o` in ASCII") from None
    if isinstance(value, bytes):
        return _unpacked(value, name)
    expected = "letters, or a list of whole numbers of 0 or more"
    if not isinstance(value, (list, tuple)):
        raise MarkError(name, value, expected)
    lengths = cast("list[Any]", value)
    _check_count(len(lengths), name)
    for number, each in enumerate(lengths):
        if type(each) is not int or not 0 <= each <= MOST_PIXELS:
            raise MarkError(f"{name}[{number}]", each, f"a whole number from 0 to {MOST_PIXELS}")
    return np.array(lengths, dtype=np.int64)


def _check_count(count: int, name: str) -> None:
    if count > MOST_RUNS:
        expected = f"at most {MOST_RUNS}: smooth the mask, or remove its specks"
        raise MarkError(name, Described(f"of {count} lengths"), expected)


def _unpacked(text: bytes, name: str) -> Ints:
    _check_count(-(-len(text) // _LETTERS), name)  # at least, before any work
    letters = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - _FIRST
    wrong = np.flatnonzero((letters < 0) | (letters > 63))
    if len(wrong):
        at = int(wrong[0])
        raise MarkError(name, text, f"COCO's letters from `0` to `o`, not {text[at : at + 1]!r}")
    ends = np.flatnonzero((letters & _MORE) == 0)
    if len(text) != (ends[-1] + 1 if len(ends) else 0):
        raise MarkError(name, text, "a last length that ends: the text is cut off")
    _check_count(len(ends), name)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    used = ends - starts + 1
    if len(ends) and used.max() > _LETTERS:
        raise MarkError(name, text, f"at most {_LETTERS} letters a length")
    place = np.arange(len(letters)) - np.repeat(starts, used)
    parts = (letters & (_MORE - 1)) << (5 * place)
    values = np.add.reduceat(parts, starts) if len(starts) else parts
    values -= np.where(letters[ends] & _SIGN, 1 << (5 * used), 0)
    for start in (1, 2):  # differences to the last but one, from the fourth on
        values[start::2] = np.cumsum(values[start::2])
    wrong = np.flatnonzero((values < 0) | (values > MOST_PIXELS))
    if len(wrong):
        found = Described(f"a text whose length {int(wrong[0])} is {int(values[wrong[0]])}")
        raise MarkError(name, found, f"lengths from 0 to {MOST_PIXELS}")
    return values


def _packed(lengths: Ints) -> str:
    values = lengths.copy()
    values[3:] -= lengths[1:-2]
    table = np.zeros((len(values), _LETTERS), dtype=np.uint8)
    used = np.zeros((len(values), _LETTERS), dtype=np.bool_)
    more = np.ones(len(values), dtype=np.bool_)
    for place in range(_LETTERS):
        bits = values & (_MORE - 1)
        values >>= 5
        used[:, place] = more
        more = more & (values != np.where(bits & _SIGN, -1, 0))
        table[:, place] = _FIRST + bits + np.where(more, _MORE, 0)
    return table[used].tobytes().decode("ascii")


def _lengths(mask: Bits) -> Ints:
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = [[0, 0]] if flat[0] else [[0]]  # the first length is of pixels out of the mask
    lengths = np.diff(np.concatenate([*starts, changes, [flat.size]])).astype(np.int64)
    _check_count(len(lengths), "mask")
    return lengths
