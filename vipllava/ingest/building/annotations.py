"""Published annotation lists, read record by record in bounded memory.

A list of 1.2 million records is over a gigabyte as text and several as Python objects. Here no
more than one record and a piece of the file are held: at most twice ``LONGEST_RECORD``, in
practice a few megabytes. A ``.json`` file is one JSON list; a ``.jsonl`` file has one record a
line.

Records are known by their position in the list, and a stretch of them (``AnnotationRange``) by its
bytes, so that processes read their own part without reading what stands before it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from vipllava.types import VipLlavaError

LONGEST_RECORD: Final = 64 << 20
"""Bytes; what is longer is taken for damage."""
_PIECE: Final = 1 << 20
_SPACE: Final = " \t\n\r"
_BOM: Final = b"\xef\xbb\xbf"
_LOOKAHEAD: Final = 16  # a cut-off literal or escape is reported at most this far before the cut
_DECODER: Final = json.JSONDecoder()
_AGAIN: Final = "get the file again (`vipllava data fetch` checks what it gets), or mend it"


class AnnotationError(VipLlavaError):
    """The annotation list is missing, is none, or is damaged."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One item of the list.

    Attributes:
        position: in the list, from 0.
        start: its first byte in the file.
        text: its bytes.
        record: the JSON object; None if the item is none.
        problem: why it is no record; None for a record.
    """

    position: int
    start: int
    text: bytes
    record: Mapping[str, Any] | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class AnnotationRange:
    """A stretch of the list that becomes one shard.

    Attributes:
        number: of the stretch, from 0.
        first: position of its first item.
        num_samples: selected items in it, broken ones included.
        start, stop: its bytes in the file.
        digest: of its selected items' positions and bytes, hex.
    """

    number: int
    first: int
    num_samples: int
    start: int
    stop: int
    digest: str


@dataclass(frozen=True, slots=True)
class AnnotationPlan:
    """The whole list, cut into stretches.

    Attributes:
        ranges: in the list's order.
        num_records: items of the list.
        num_selected: those that belong to the data set.
    """

    ranges: tuple[AnnotationRange, ...]
    num_records: int
    num_selected: int

    @property
    def digest(self) -> str:
        """Fingerprint of the selected items, hex."""
        whole = hashlib.blake2b(digest_size=16)
        for part in self.ranges:
            whole.update(part.digest.encode())
        return whole.hexdigest()


Select = Callable[[Mapping[str, Any]], bool]


def iter_annotations(
    path: Path, *, start: int = 0, stop: int | None = None, first: int = 0
) -> Iterator[Annotation]:
    """Yield the items of a list, or of a stretch of it.

    A line of a ``.jsonl`` file that is no JSON, and an item that is no object, come out as items
    with a ``problem``. A ``.json`` list that breaks off or is no JSON raises: nothing behind the
    break can be told.

    Args:
        path: ``.json`` or ``.jsonl``.
        start, stop: bytes of the stretch; the whole list without ``stop``.
        first: position of the item at ``start``.

    Raises:
        AnnotationError: the file cannot be read or is no list; names byte and position.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            if path.suffix == ".jsonl":
                yield from _iter_lines(file, path, start, stop, first)
            else:
                window = _Window(file, path, start, stop)
                yield from _iter_list(window, first, whole=stop is None)
    except OSError as error:
        raise AnnotationError(
            f"annotation list {path} cannot be read: {error.strerror or error}"
        ) from error


class RangeDigest:
    """Fingerprint of items, by position and bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, item: Annotation) -> None:
        """Take one more item in."""
        self._hash.update(b"%d:%d:" % (item.position, len(item.text)))
        self._hash.update(item.text)

    def hex(self) -> str:
        """Return what identifies the items so far."""
        return self._hash.hexdigest()


def is_selected(item: Annotation, select: Select | None) -> bool:
    """Whether an item belongs to the data set; broken ones do, so that they are counted."""
    return item.record is None or select is None or select(item.record)


def plan_ranges(
    path: Path,
    max_samples: int,
    *,
    select: Select | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> AnnotationPlan:
    """Cut a list into stretches of ``max_samples`` selected items; the last may be shorter.

    Args:
        path: the list.
        max_samples: items per stretch.
        select: whether a record belongs to the data set; None for all.
        on_progress: told bytes read and bytes in all, once in a while.

    Raises:
        AnnotationError: the list cannot be read, is no list, or has no selected item.
    """
    if max_samples < 1:
        raise AnnotationError(f"max_samples is {max_samples}; a shard holds at least 1 sample")
    ranges: list[AnnotationRange] = []
    size = path.stat().st_size if path.is_file() else 0
    num_records = num_selected = count = start = stop = first = 0
    digest = RangeDigest()

    def close() -> None:
        nonlocal digest, count
        ranges.append(AnnotationRange(len(ranges), first, count, start, stop, digest.hex()))
        digest, count = RangeDigest(), 0

    for item in iter_annotations(path):
        num_records += 1
        if on_progress is not None and num_records % 1000 == 0:
            on_progress(item.start, size)
        if not is_selected(item, select):
            continue
        if count == 0:
            first, start = item.position, item.start
        digest.add(item)
        stop = item.start + len(item.text)
        count += 1
        num_selected += 1
        if count == max_samples:
            close()
    if count:
        close()
    if not ranges:
        what = "is an empty list" if num_records == 0 else "has no record of the data set's kinds"
        raise AnnotationError(f"annotation list {path} {what}; {_AGAIN}")
    if on_progress is not None:
        on_progress(size, size)
    return AnnotationPlan(tuple(ranges), num_records, num_selected)


def iter_range(
    path: Path, part: AnnotationRange, select: Select | None = None
) -> Iterator[Annotation]:
    """Yield the selected items of one stretch.

    Raises:
        AnnotationError: they are not those that the plan was made from.
    """
    digest = RangeDigest()
    for item in iter_annotations(path, start=part.start, stop=part.stop, first=part.first):
        if is_selected(item, select):
            digest.add(item)
            yield item
    if digest.hex() != part.digest:
        raise AnnotationError(
            f"annotation list {path} was changed while it was being read (records from "
            f"{part.first} on); run the same command again when it is finished"
        )


class _Window:
    """The piece of the file that is being read, as text.

    Attributes:
        text: the piece; what stands before ``at`` is done with.
        at: character that is read next.
        offset: its byte in the file.
    """

    def __init__(self, file: BinaryIO, path: Path, start: int, stop: int | None) -> None:
        self.path = path
        self.text = ""
        self.at = 0
        self.offset = start
        self._file = file
        self._left = stop - start if stop is not None else None
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read = start
        self._ended = False

    def peek(self) -> str:
        """Return the next character that is no space without passing it; empty at the end."""
        while True:
            start = self.at
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            self.offset += self.at - start
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._refill():
                return ""

    def skip(self) -> None:
        """Pass the character that ``peek`` returned, one of ``[ ] ,``."""
        self.at += 1
        self.offset += 1

    def value(self, position: int) -> tuple[Any, int, bytes]:
        """Return the JSON value that starts here, its byte, and its bytes."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._cut(error) and self._refill():
                    continue
                raise self.error(position, f"is not JSON ({error.msg})") from error
            except (RecursionError, ValueError) as error:  # ValueError: a number of 5000 digits
                raise self.error(position, f"cannot be read ({error})") from error
            # A number may go on behind the piece; an object has its brace.
            if end < len(self.text) or self.text[end - 1] == "}" or not self._refill():
                break
        try:
            text = self.text[self.at : end].encode()
        except UnicodeEncodeError as error:  # cannot come from UTF-8; kept for a clear message
            raise self.error(position, f"is not UTF-8 ({error})") from error
        start = self.offset
        self.at, self.offset = end, start + len(text)
        return value, start, text

    def error(self, position: int, what: str) -> AnnotationError:
        """Describe what is wrong at the present place."""
        return AnnotationError(
            f"annotation list {self.path}: record {position} (byte {self.offset}) {what}; {_AGAIN}"
        )

    def _cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may only lack what follows the piece."""
        return error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _LOOKAHEAD

    def _refill(self) -> bool:
        """Read on, dropping what is done; False at the end."""
        if self._ended:
            return False
        rest = self.text[self.at :]
        if len(rest) > LONGEST_RECORD:
            raise AnnotationError(
                f"annotation list {self.path}: no record ends within {LONGEST_RECORD} bytes from "
                f"byte {self.offset} on; it is no list of records, or it is damaged. {_AGAIN}"
            )
        # Twice as much each time: a long record is not parsed again for every piece of it.
        wanted = max(_PIECE, len(rest))
        wanted = wanted if self._left is None else min(wanted, self._left)
        data = self._file.read(wanted)
        if self._left is not None:
            self._left -= len(data)
        self._ended = len(data) < wanted or self._left == 0
        begins = self._read == 0
        if begins and data.startswith(_BOM):
            data = data[len(_BOM) :]
            self._read = self.offset = len(_BOM)
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, self._ended)
        except UnicodeDecodeError as error:
            raise AnnotationError(
                f"annotation list {self.path} is not UTF-8 at byte "
                f"{self._read - pending + error.start}; {_AGAIN}"
            ) from error
        self._read += len(data)
        self.text, self.at = rest + text, 0
        return bool(data)


def _iter_list(window: _Window, first: int, *, whole: bool) -> Iterator[Annotation]:
    if whole:
        found = window.peek()
        if found != "[":
            shown = f"starts with `{found}`" if found else "is empty"
            raise AnnotationError(
                f"annotation list {window.path} {shown}; expected a JSON list `[{{...}}, ...]`. "
                "One record a line is read from a file called .jsonl"
            )
        window.skip()
    position = first
    while True:
        char = window.peek()
        if not char and not whole:
            return
        if char == "]" and whole:
            window.skip()
            if window.peek():
                raise window.error(position, "is followed by more than the end of the list")
            return
        if position > first:
            if char != ",":
                cut = "is missing: the file breaks off" if not char else f"starts with `{char}`"
                raise window.error(position, cut)
            window.skip()
        if not window.peek():
            raise window.error(position, "is missing: the file breaks off")
        value, start, text = window.value(position)
        yield _annotation(position, start, text, value)
        position += 1


def _iter_lines(
    file: BinaryIO, path: Path, start: int, stop: int | None, first: int
) -> Iterator[Annotation]:
    position, offset = first, start
    while stop is None or offset < stop:
        line = file.readline(LONGEST_RECORD if stop is None else stop - offset)
        if not line:
            return
        if len(line) >= LONGEST_RECORD:
            raise AnnotationError(
                f"annotation list {path}: line at byte {offset} is longer than {LONGEST_RECORD} "
                f"bytes; {_AGAIN}"
            )
        at, offset = offset, offset + len(line)
        if at == 0 and line.startswith(_BOM):
            line, at = line[len(_BOM) :], len(_BOM)
        text = line.strip()
        if not text:
            continue
        at += line.index(text)
        try:
            value: Any = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            yield Annotation(position, at, text, None, f"is not JSON ({error})")
        else:
            yield _annotation(position, at, text, value)
        position += 1


def _annotation(position: int, start: int, text: bytes, value: object) -> Annotation:
    if isinstance(value, dict):
        return Annotation(position, start, text, cast("dict[str, Any]", value))
    problem = f"is {type(value).__name__}; a record is a JSON object"
    return Annotation(position, start, text, None, problem)
