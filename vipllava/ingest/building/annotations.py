"""Published annotation lists, read record by record in bounded memory.

A ``.json`` file is one JSON list; a ``.jsonl`` file has one record a line. At most twice
``LONGEST_RECORD`` of a file is held, in practice a few megabytes: a list of 1.2 million records is
over a gigabyte. Processes read stretches of a list by their bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from vipllava.ingest.importing import import_command, recognise, recognise_head
from vipllava.ingest.importing.source import ImportFormat
from vipllava.records.json_values import check_depth
from vipllava.records.kind import CONVERSATIONS
from vipllava.types import VipLlavaError

LONGEST_RECORD: Final = 64 << 20
"""Bytes; what is longer is taken for damage."""
_PIECE: Final = 1 << 20
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_BOM: Final = b"\xef\xbb\xbf"
_DECODER: Final = json.JSONDecoder()
_AGAIN: Final = "get the file again (`vipllava data fetch` checks what it gets), or correct it"


class AnnotationError(VipLlavaError):
    """The annotation list is missing, is none, or is damaged."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One item of the list: its position, its first byte and its bytes in the file."""

    position: int
    start: int
    text: bytes
    record: Mapping[str, Any] | None  # the JSON object; None if the item is something else
    problem: str | None = None  # why it is no record; None for a record


@dataclass(frozen=True, slots=True)
class AnnotationRange:
    """A stretch of the list that becomes one shard."""

    first: int  # position of its first item
    num_samples: int  # selected items in it, broken ones included
    start: int  # its bytes in the file
    stop: int
    digest: str  # of its selected items' positions and bytes, hex


@dataclass(frozen=True, slots=True)
class AnnotationPlan:
    """The whole list of ``num_records`` items, those of other data sets included, in stretches."""

    ranges: tuple[AnnotationRange, ...]
    num_records: int

    @property
    def num_selected(self) -> int:
        """Items that belong to the data set."""
        return sum(part.num_samples for part in self.ranges)

    @property
    def digest(self) -> str:
        """Fingerprint of the selected items, hex."""
        text = "".join(part.digest for part in self.ranges)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


Select = Callable[[Mapping[str, Any]], bool]
"""Whether a record belongs to the data set."""


def iter_annotations(
    path: Path, *, start: int = 0, stop: int | None = None, first: int = 0
) -> Iterator[Annotation]:
    """Yield the items of a list, or of the stretch from byte ``start`` to ``stop``.

    A line of a ``.jsonl`` file that is no JSON, and an item that is no object, come out as items
    with a ``problem``. ``first`` is the position of the item at ``start``.

    Raises:
        AnnotationError: the file cannot be read or is no list; names byte and position.
    """
    try:
        with path.open("rb") as file:
            if start == 0 and file.read(len(_BOM)) == _BOM:
                start = len(_BOM)
            file.seek(start)
            if path.suffix == ".jsonl":
                yield from _iter_lines(file, path, start, stop, first)
            else:
                yield from _iter_list(_Window(file, path, start, stop), first, stop is None)
    except OSError as error:
        if (form := recognise(path)) is not None:  # a folder
            raise AnnotationError(_foreign(path, form)) from error
        raise AnnotationError(
            f"annotation list {path} cannot be read: {error.strerror or error}"
        ) from error


def plan_ranges(
    path: Path,
    max_samples: int,
    *,
    select: Select | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> AnnotationPlan:
    """Cut a list into stretches.

    Args:
        path: the list.
        max_samples: selected items per stretch; the last may have fewer.
        select: whether a record belongs to the data set; None for all.
        on_progress: told bytes read and bytes in all.

    Raises:
        AnnotationError: the list cannot be read, is no list, or has no selected item.
    """
    if max_samples < 1:
        raise AnnotationError(f"max_samples is {max_samples}; a shard holds at least 1 sample")
    size = path.stat().st_size if path.is_file() else 0
    num_records = 0
    ranges: list[AnnotationRange] = []
    digest = hashlib.blake2b(digest_size=16)
    for num_records, item in enumerate(iter_annotations(path), start=1):
        if on_progress is not None and num_records % 1000 == 0:
            on_progress(item.start, size)
        if not _is_selected(item, select):
            continue
        if not ranges or ranges[-1].num_samples == max_samples:
            digest = hashlib.blake2b(digest_size=16)
            ranges.append(AnnotationRange(item.position, 0, item.start, 0, ""))
        _add_to(digest, item)
        count, stop = ranges[-1].num_samples + 1, item.start + len(item.text)
        ranges[-1] = replace(ranges[-1], num_samples=count, stop=stop, digest=digest.hexdigest())
    if not ranges:
        what = "is an empty list" if num_records == 0 else "has no record of the data set's kinds"
        raise AnnotationError(f"annotation list {path} {what}; {_AGAIN}")
    if on_progress is not None:
        on_progress(size, size)
    return AnnotationPlan(tuple(ranges), num_records)


def iter_range(
    path: Path, part: AnnotationRange, select: Select | None = None
) -> Iterator[Annotation]:
    """Yield the selected items of one stretch.

    Raises:
        AnnotationError: they are not those that the plan was made from.
    """
    digest = hashlib.blake2b(digest_size=16)
    for item in iter_annotations(path, start=part.start, stop=part.stop, first=part.first):
        if _is_selected(item, select):
            _add_to(digest, item)
            yield item
    if digest.hexdigest() != part.digest:
        raise AnnotationError(
            f"annotation list {path} was changed while it was being read (records from "
            f"{part.first} on); run the same command again when it is finished"
        )


def _is_selected(item: Annotation, select: Select | None) -> bool:
    """Whether an item belongs to the data set; broken ones do, so that they are counted."""
    return item.record is None or select is None or select(item.record)


def _add_to(digest: hashlib.blake2b, item: Annotation) -> None:
    digest.update(b"%d:%d:" % (item.position, len(item.text)))
    digest.update(item.text)


class _Window:
    """The piece of the file that is being read.

    It is held as Latin-1, in which a character is a byte: the JSON scanner then says at which
    byte a value ends. Values that are not ASCII are read once more, as UTF-8.
    """

    def __init__(self, file: BinaryIO, path: Path, start: int, stop: int | None) -> None:
        self.path = path
        self._file, self._stop = file, stop
        self._text, self._at = "", 0
        self._start = start  # byte of the text's first character

    def peek(self) -> str:
        """Return the next character that is no space without passing it; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._refill():
                return ""

    @property
    def held(self) -> str:
        """The text that is held at present."""
        return self._text

    def take(self) -> str:
        """Return what ``peek`` returns and pass it."""
        char = self.peek()
        self._at += len(char)
        return char

    def item(self, position: int) -> Annotation:
        """Return the JSON value that starts here as the list's item at ``position``."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._refill():  # it may only lack what follows the piece
                    continue
                within = f" within {LONGEST_RECORD} bytes" if self._is_full else ""
                raise self.error(position, f"is not JSON{within} ({error.msg})") from error
            except (RecursionError, ValueError) as error:  # ValueError: a number of 5000 digits
                raise self.error(position, f"cannot be read ({error})") from error
            # A number may go on behind the piece; an object has its brace.
            if end < len(self._text) or self._text[end - 1] == "}" or not self._refill():
                break
        text = self._text[self._at : end].encode("latin-1")
        start = self._start + self._at
        if not text.isascii():
            try:
                value, _ = _DECODER.raw_decode(text.decode())
            except UnicodeDecodeError as error:
                raise AnnotationError(
                    f"annotation list {self.path} is not UTF-8 at byte {start + error.start}; "
                    f"{_AGAIN}"
                ) from error
        self._at = end
        return _annotation(position, start, text, value)

    def error(self, position: int, what: str) -> AnnotationError:
        """Describe what is wrong at the present place."""
        at = self._start + self._at
        return AnnotationError(
            f"annotation list {self.path}: record {position} (byte {at}) {what}; {_AGAIN}"
        )

    @property
    def _is_full(self) -> bool:
        return len(self._text) - self._at > LONGEST_RECORD

    def _refill(self) -> bool:
        """Read on, dropping what is done; False at the end, and where no record is so long."""
        if self._is_full:
            return False
        rest = self._text[self._at :]
        self._start += self._at
        # Twice as much each time: a long record is not parsed again for every piece of it.
        wanted = max(_PIECE, len(rest))
        if self._stop is not None:
            wanted = min(wanted, self._stop - self._start - len(rest))
        data = self._file.read(wanted)
        self._text, self._at = rest + data.decode("latin-1"), 0
        return bool(data)


def _iter_list(window: _Window, first: int, whole: bool) -> Iterator[Annotation]:
    """Yield the items of a ``whole`` list, or of a stretch of it, which has no brackets."""
    if whole and (found := window.take()) != "[":
        if (form := recognise_head(window.held)) is not None:
            raise AnnotationError(_foreign(window.path, form))
        shown = f"starts with `{found}`" if found else "is empty"
        raise AnnotationError(
            f"annotation list {window.path} {shown}; expected a JSON list `[{{...}}, ...]`. One "
            "record a line is read from a file called .jsonl"
        )
    head = window.held if whole else ""
    position = first
    while (char := window.peek()) or whole:
        if char == "]" and whole:
            window.take()
            if window.peek():
                raise window.error(position, "is followed by more than the end of the list")
            return
        if position > first:
            if char and char != ",":
                raise window.error(position, f"starts with `{char}`")
            window.take()
        if not window.peek():
            raise window.error(position, "is missing: the file breaks off")
        item = window.item(position)
        if head:
            form = recognise_head(head)
            if form is not None and CONVERSATIONS not in (item.record or {CONVERSATIONS: None}):
                raise AnnotationError(_foreign(window.path, form))
            head = ""
        yield item
        position += 1


def _foreign(path: Path, form: ImportFormat) -> str:
    """Say of which format a file is, and what makes records of it."""
    return (
        f"annotation list {path} is of {form.title}, and holds no records; they are made of it by "
        f"`{import_command(form, path)}`, which writes the manifest, too"
    )


def _iter_lines(
    file: BinaryIO, path: Path, start: int, stop: int | None, first: int
) -> Iterator[Annotation]:
    position, offset = first, start
    while line := file.readline(LONGEST_RECORD if stop is None else stop - offset):
        if len(line) >= LONGEST_RECORD:
            raise AnnotationError(
                f"annotation list {path}: line at byte {offset} is longer than {LONGEST_RECORD} "
                f"bytes; {_AGAIN}"
            )
        at, offset = offset, offset + len(line)
        if not (text := line.strip()):
            continue
        at += line.index(text)
        try:
            item = _annotation(position, at, text, json.loads(text.decode()))
        except (ValueError, RecursionError) as error:
            item = Annotation(position, at, text, None, f"is not JSON ({error})")
        yield item
        position += 1


def _annotation(position: int, start: int, text: bytes, value: object) -> Annotation:
    problem = f"is {type(value).__name__}; a record is a JSON object"
    if isinstance(value, dict):
        record = cast("dict[str, Any]", value)
        try:
            check_depth(record)
            return Annotation(position, start, text, record)
        except ValueError as error:
            problem = f"has {error}"
    return Annotation(position, start, text, None, problem)
