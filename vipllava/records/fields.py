"""Reading a foreign record field by field, so that every complaint names place and remedy."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, cast

from vipllava.records.field_names import meant_for
from vipllava.records.image_decode import image_size
from vipllava.types import (
    BBox,
    DraftTurn,
    FixedVisualPrompt,
    Mention,
    Point,
    Polygon,
    RecordError,
    Region,
    RunLengths,
)
from vipllava.visual_prompts.mark_places import MarkError
from vipllava.visual_prompts.mask_pixels import MaskPixels, mask_fault
from vipllava.visual_prompts.rle import check_rle

_SHOWN: Final = 80
_POLYGONS: Final = "a list of polygons, each a flat list x, y, x, y of at least 3 points"
_MASK: Final = f"{_POLYGONS}; or run lengths {{size: [height, width], counts}}"
IMAGE_PLACEHOLDER: Final = "<image>"
REGION_PLACEHOLDER: Final = re.compile(r"<bbox(\d{0,9})>")
RECORD_VERSION: Final = 1
"""Of records without ``schema_version`` (published lists, tars of other tools), the only one so
far. Whoever changes what a field of a stored record means raises the number."""
VERSION_FIELD: Final = "schema_version"


def check_version(record: Mapping[str, Any], where: str) -> None:
    """Raise RecordError, beginning with ``where``, unless this release knows the version."""
    version = record.get(VERSION_FIELD, RECORD_VERSION)
    if type(version) is not int or version != RECORD_VERSION:
        raise RecordError(
            f"{where}: field `{VERSION_FIELD}` is {version!r}; this release reads version "
            f"{RECORD_VERSION}. Update the package, or build the shard again with this one"
        )


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a record kind makes of a record; becomes a :class:`vipllava.types.Sample`."""

    turns: tuple[DraftTurn, ...]
    regions: tuple[Region, ...] = ()
    fixed: tuple[FixedVisualPrompt, ...] = ()


@dataclass(slots=True)
class Fields:
    """A record under reading."""

    record: Mapping[str, Any]  # the foreign object; never changed
    key: str  # the sample's
    dataset: str  # the manifest's name
    image: bytes | None  # encoded
    # Width and height of the stored image, pixels, once they are known.
    known_size: tuple[int, int] | None = None
    upright: bool = True  # whether the image is turned as its EXIF block says

    @property
    def where(self) -> str:
        """The sample's name in messages."""
        return f"{self.dataset}/{self.key}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the stored image, pixels."""
        if self.known_size is None:
            data = self.require_image()
            self.known_size = image_size(data, key=self.where, upright=self.upright)
        return self.known_size

    def refuse(self, reason: str, fault: str = "record-invalid") -> NoReturn:
        """Raise a RecordError about this record."""
        raise RecordError(f"{self.where}: {reason}", fault)

    def fail(
        self, name: str, found: object, expected: str, fault: str = "record-invalid"
    ) -> NoReturn:
        """Raise a RecordError about the value of field ``name``."""
        self.refuse(f"field `{name}` is {_shown(found)}; expected {expected}", fault)

    def require_image(self) -> bytes:
        """Return the image; refuse a record of one whose shard holds none."""
        if self.image is None:
            name = self.record.get("image")
            reason = (
                f"it has no field `image`{meant_for(self.record, 'image')}"
                if name is None
                else f"it names {_shown(name)}; expected KEY.jpg, .jpeg, .png or .webp in its shard"
            )
            self.refuse(f"no image beside the record: {reason}", "image-missing")
        return self.image

    def require(self, name: str, expected: str) -> Any:
        """Return a field that has to be there."""
        if name not in self.record:
            self.refuse(
                f"field `{name}` is missing; expected {expected}; "
                f"the record has: {', '.join(map(str, self.record)) or 'no fields'}"
            )
        return self.record[name]

    def text(self, name: str) -> str:
        """Return a field that is a text with something in it."""
        value = self.require(name, "a text")
        if not isinstance(value, str) or not value.strip():
            self.fail(name, value, "a text that is not empty")
        return value

    def texts(self, name: str) -> list[str]:
        """Return a field that is a text, or a list of texts of equal standing."""
        value = self.require(name, "a text, or a list of texts")
        texts: list[Any] = [value] if isinstance(value, str) else list_or_empty(value)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            self.fail(name, value, "a text, or a list of texts, none of them empty")
        return texts

    def answer(self, name: str = "answer") -> str:
        """Return a short answer; counts may be stored as numbers."""
        value = self.require(name, "a text or a whole number")
        return str(value) if type(value) is int else self.text(name)

    def items(self, name: str, expected: str, count: int | None = None) -> list[Any]:
        """Return a field that is a list, of ``count`` items where given."""
        return self.as_list(self.require(name, expected), name, expected, count)

    def as_list(
        self,
        value: object,
        name: str,
        expected: str,
        count: int | None = None,
        fault: str = "record-invalid",
    ) -> list[Any]:
        """Check that ``value`` is a list, of ``count`` items where given."""
        if not isinstance(value, list):
            self.fail(name, value, expected, fault)
        values = cast("list[Any]", value)
        if count is not None and len(values) != count:
            self.refuse(f"field `{name}` is a list of {len(values)}; expected {expected}")
        return values

    def index(self, name: str, length: int) -> int:
        """Return a field that is an index into ``length`` things."""
        expected = f"an index from 0 to {length - 1}"
        value = self.require(name, expected)
        if type(value) is not int or not 0 <= value < length:
            self.fail(name, value, expected)
        return value

    # Geometry.

    def bbox(self, value: object, name: str, extra: int = 0, *, may_be_empty: bool = False) -> BBox:
        """Check one box ``[x1, y1, x2, y2]`` of field ``name`` and clip it to the image.

        ``extra`` numbers may follow (a score), which are ignored. A box wholly outside, reversed,
        not finite or, unless it ``may_be_empty``, without area is refused.
        """
        expected = "a box [x1, y1, x2, y2] in pixels" + (" and a score" if extra else "")
        numbers = self.as_list(value, name, expected, fault="box-invalid")
        if len(numbers) not in (4, 4 + extra) or not all(map(is_number, numbers[:4])):
            self.fail(name, numbers, expected, "box-invalid")
        x1, y1, x2, y2 = (float(number) for number in numbers[:4])
        if x2 < x1 or y2 < y1:
            corners = f"[{x1:g}, {y1:g}, {x1 + x2:g}, {y1 + y2:g}]"
            expected = "x1 <= x2 and y1 <= y2: this box is reversed"
            if x2 > 0 and y2 > 0:
                expected += f"; if it says x, y, width and height, write {corners}"
            self.fail(name, numbers, expected, "box-reversed")
        is_empty = x1 == x2 or y1 == y2
        if is_empty and not may_be_empty:
            self.fail(name, numbers, "a box with an area: this one is empty", "box-empty")
        width, height = self.size
        x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
        if min(x2 - x1, y2 - y1) < 0 or (min(x2 - x1, y2 - y1) == 0 and not is_empty):
            self.fail(name, numbers, f"a box inside the {width} x {height} image", "box-outside")
        return x1, y1, x2, y2

    def flats(self, value: object, name: str) -> list[tuple[str, object]]:
        """Return name and value of each flat ``x, y, x, y`` list of a segmentation, maybe none."""
        flats = self.as_list(value, name, _MASK, fault="polygon-invalid")
        return [(f"{name}[{number}]", flat) for number, flat in enumerate(flats)]

    def points(self, flat: object, name: str) -> list[list[Any]]:
        """Return the points of one flat list."""
        expected = _POLYGONS
        if is_rle(flat):
            expected += "; run lengths stand in place of that list, not in it"
        numbers = self.as_list(flat, name, expected, fault="polygon-invalid")
        if len(numbers) % 2:
            expected = f"an even count of coordinates, not {len(numbers)}"
            self.fail(name, numbers, expected, "polygon-invalid")
        return [numbers[start : start + 2] for start in range(0, len(numbers), 2)]

    def polygon(self, points: Sequence[Any], name: str) -> Polygon:
        """Check one ring of at least three ``[x, y]`` and move points outside to the image's edge.

        One wholly outside is refused.
        """
        right, bottom = map(float, self.size)
        checked: list[Point] = []
        for point in points:
            pair = list_or_empty(point)
            if len(pair) != 2 or not all(map(is_number, pair)):
                self.fail(name, point, "finite x, y coordinates in pixels", "polygon-invalid")
            checked.append((float(pair[0]), float(pair[1])))
        if len(checked) < 3:
            expected = f"at least 3 points, not {len(checked)}"
            self.fail(name, list(points), expected, "polygon-invalid")
        xs, ys = zip(*checked, strict=True)
        if max(xs) <= 0 or max(ys) <= 0 or min(xs) >= right or min(ys) >= bottom:
            expected = f"a polygon inside the {right:.0f} x {bottom:.0f} image"
            self.fail(name, list(points), expected, "polygon-outside")
        return tuple((min(max(x, 0.0), right), min(max(y, 0.0), bottom)) for x, y in checked)

    def run_lengths(self, value: object, name: str) -> RunLengths:
        """Check a mask in run lengths, as COCO has them: of the image's size, and not empty."""
        try:
            rle = check_rle(value, name)
            MaskPixels.in_image(rle, self.size, name)
        except MarkError as error:
            found = str(error).removeprefix(error.field)
            self.refuse(f"field `{error.field}`{found}", mask_fault(error))
        return rle

    def regions(
        self, *, count: int | None = None, masks: bool | None = None, may_be_empty: bool = False
    ) -> tuple[Region, ...]:
        """Read ``bboxes``, ``count`` of them where given, and ``segmentations``.

        ``masks`` says whether the latter have to be there; None reads them where they are. For
        ``may_be_empty`` see :meth:`bbox`.
        """
        many = "any number" if count is None else str(count)
        boxes = self.items("bboxes", f"a list of boxes [x1, y1, x2, y2], {many} of them", count)
        segmentations: list[Any] = [None] * len(boxes)
        if masks or (masks is None and self.record.get("segmentations") is not None):
            expected = f"one list of polygons per box ({len(boxes)}), or its run lengths"
            segmentations = self.items("segmentations", expected, len(boxes))
        regions: list[Region] = []
        for number, (box, mask) in enumerate(zip(boxes, segmentations, strict=True)):
            bbox = self.bbox(box, f"bboxes[{number}]", may_be_empty=may_be_empty)
            name = f"segmentations[{number}]"
            if is_rle(mask):
                regions.append(Region(bbox, rle=self.run_lengths(mask, name)))
                continue
            rings = self.flats(mask, name) if masks or mask is not None else []
            polygons = (self.polygon(self.points(flat, name), name) for name, flat in rings)
            regions.append(Region(bbox, tuple(polygons)))
        return tuple(regions)

    # Conversations.

    def conversation(self, num_regions: int | None = None) -> tuple[DraftTurn, ...]:
        """Read ``conversations`` of ``human`` and ``gpt``.

        ``<image>`` in a human text moves to that turn's front; a record with an image and no
        ``<image>`` gets it in the first turn. With an image, more than one ``<image>`` or one in an
        answer is refused: it would vanish, or be learnt as letters. See :func:`kept_turns` for what
        is left out. Region placeholders become mentions of ``num_regions`` regions; None leaves
        them as text.
        """
        expected = "a list of {from: human|gpt, value: text}, taking turns"
        items = self.items("conversations", expected)
        said = kept_turns([self._said(item, f"conversations[{n}]") for n, item in enumerate(items)])
        if not said:
            self.fail("conversations", items, "at least one question and its answer")
        speakers = [speaker for _, speaker, _ in said]
        if speakers != ["human", "gpt"] * (len(said) // 2):
            self.fail("conversations", speakers, "human and gpt taking turns")
        named: list[int] = []
        for number, (where, speaker, value) in enumerate(said if self.image is not None else ()):
            if not (count := value.count(IMAGE_PLACEHOLDER)):
                continue
            found = f"field `{where}.value` has {IMAGE_PLACEHOLDER}"
            if speaker == "gpt":
                self.refuse(
                    f"{found} in an answer, where it would be learnt as letters; remove it, or "
                    "move it to the question that shows the image"
                )
            if count > 1:
                self.refuse(f"{found} {count} times and the record one image; keep one of them")
            named.append(number)
        if len(named) > 1:
            found = f"{IMAGE_PLACEHOLDER} in turns {named}"
            self.fail("conversations", found, "one image a record")
        turns: list[DraftTurn] = []
        for number, (where, speaker, value) in enumerate(said):
            has_image = self.image is not None and number == (named[0] if named else 0)
            if has_image:
                value = value.replace(IMAGE_PLACEHOLDER, "").strip()
            parts: tuple[str | Mention, ...] = (value,)
            if num_regions is not None:
                parts = self.mentions(value, num_regions, f"{where}.value")
            turns.append(DraftTurn("user" if speaker == "human" else "assistant", parts, has_image))
        return tuple(turns)

    def _said(self, item: object, where: str) -> tuple[str, Any, str]:
        """Return place, speaker and text of one entry of ``conversations``."""
        if not isinstance(item, Mapping):
            self.fail(where, item, "an object {from, value}")
        turn = cast("Mapping[str, Any]", item)
        speaker, value = turn.get("from"), turn.get("value")
        if speaker not in ("human", "gpt"):
            self.fail(f"{where}.from", speaker, "human or gpt")
        if not isinstance(value, str):
            self.fail(f"{where}.value", value, "a text")
        return where, speaker, value

    def mentions(self, text: str, num_regions: int, name: str) -> tuple[str | Mention, ...]:
        """Split a text at ``<bboxN>``; a bare ``<bbox>`` means the only region."""
        parts: list[str | Mention] = []
        start = 0
        for match in REGION_PLACEHOLDER.finditer(text):
            region, expected = int(match.group(1) or 0), ""
            if num_regions == 0:
                expected = f"no mark: the record has no `bboxes`{meant_for(self.record, 'bboxes')}"
            elif not match.group(1) and num_regions != 1:
                expected = f"<bbox0> to <bbox{num_regions - 1}>: bare is unclear"
            elif region >= num_regions:
                expected = f"a region of this record, which has {num_regions} boxes"
            if expected:
                self.fail(name, match.group(), expected, "placeholder-without-region")
            parts += [text[start : match.start()], Mention(region)]
            start = match.end()
        parts.append(text[start:])
        return tuple(part for part in parts if part != "")


def kept_turns(turns: list[tuple[str, Any, str]]) -> list[tuple[str, Any, str]]:
    """Remove (place, speaker, text) of answers before the first question, and of a last question.

    As in the released data: they carry nothing to learn.
    """
    while turns and turns[0][1] == "gpt":
        turns.pop(0)
    if turns and turns[-1][1] == "human":
        turns.pop()
    return turns


def is_rle(value: object) -> bool:
    """Tell whether a mask is written as run lengths, right or wrong, and not as polygons."""
    return isinstance(value, Mapping)


def list_or_empty(value: object) -> list[Any]:
    """Return a list as it is, nothing for anything else: that is the parser's to refuse."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def is_number(value: object) -> bool:
    """Tell whether a value can be a coordinate: finite, and no truth value."""
    if not isinstance(value, (int, float)) or type(value) is bool:
        return False
    # A whole number may have more digits than a float can hold; no coordinate has.
    return abs(value) <= sys.float_info.max
