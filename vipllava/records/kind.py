"""All that the package knows of one kind of record, in one value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from vipllava.records.field_names import nearest_name
from vipllava.records.fields import VERSION_FIELD, Fields, Parsed, list_or_empty
from vipllava.types import VipLlavaError

NO_POLICY: Final = "none"
"""Policy name of kinds whose images get no marks; it is never looked up."""
CONVERSATIONS: Final = "conversations"
"""The field of a dialogue of ``human`` and ``gpt``; see :meth:`Fields.conversation`."""
OTHERS: Final = "others"
"""The field of a record to be asked that lists what it would say about other regions, each an
object of the fields that differ, e.g. ``{"bboxes": [[1, 2, 30, 40]], "answer": "cup"}``."""
_OF_ALL: Final = ("id", "image", "width", "height", "model", OTHERS, VERSION_FIELD)
_MAY_BE_EMPTY: Final = ("bbox", "bboxes", "segmentations", "visual_prompts")


class Outline(NamedTuple):
    """A box or polygon as it stands in a record, not checked."""

    # ``[x1, y1, x2, y2]``; a list of flat ``x, y, x, y`` lists, or run lengths as of COCO; or a
    # list of ``[x, y]`` points.
    form: Literal["box", "mask", "ring"]
    value: Any  # what the record has
    name: str  # the field, for messages
    extra: int = 0  # how many numbers may follow the four of a box
    may_be_empty: bool = False  # whether a box without area is one all the same


def boxes(record: Mapping[str, Any], *, may_be_empty: bool = False) -> Iterator[Outline]:
    """Yield ``bboxes``."""
    for number, box in enumerate(list_or_empty(record.get("bboxes"))):
        yield Outline("box", box, f"bboxes[{number}]", may_be_empty=may_be_empty)


def boxes_and_masks(record: Mapping[str, Any], *, all_masks: bool = False) -> Iterator[Outline]:
    """Yield ``bboxes`` and ``segmentations``; with ``all_masks`` null is a fault, not a gap."""
    yield from boxes(record)
    for number, mask in enumerate(list_or_empty(record.get("segmentations"))):
        if mask is not None or all_masks:
            yield Outline("mask", mask, f"segmentations[{number}]")


def no_outlines(record: Mapping[str, Any]) -> Iterable[Outline]:
    """Return nothing: the kind has no regions."""
    return ()


@dataclass(frozen=True, slots=True)
class RecordKind:
    """One kind of record.

    Attributes:
        name: what a manifest's ``record_kind`` says.
        parse: reads a record; the generator chooses wordings.
        texts: the fields that hold texts of the conversation (texts, or lists of them). From these
            the length of a sample is estimated.
        policy: the visual-prompt policy that marks the regions.
        prefix: dash-separated start of the ids by which ``record_kind: auto`` recognises the kind;
            the longest that fits counts.
        has_image: whether its records have an image.
        fields: those that it reads beside ``id`` and ``image``, for naming the others; empty if
            nothing is to be said of others.
        spellings: other names of fields, each with the field that it means where that is not there.
        outlines: all boxes and polygons that a parser may use, for lint: a parser stops at the
            first fault and may use only some.
        mentions: the field whose texts mention regions as ``<bboxN>``, and the field that lists
            what N counts (None: the kind has no regions); None if texts hold no placeholders.

    Raises:
        VipLlavaError: it names no text, so that its length could only be estimated as 0.
    """

    name: str
    parse: Callable[[Fields, np.random.Generator], Parsed]
    _: KW_ONLY
    texts: tuple[str, ...]
    policy: str = NO_POLICY
    prefix: str | None = None
    has_image: bool = True
    fields: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    outlines: Callable[[Mapping[str, Any]], Iterable[Outline]] = no_outlines
    mentions: tuple[str, str | None] | None = None

    def __post_init__(self) -> None:
        if not self.texts or isinstance(self.texts, str):
            raise VipLlavaError(
                f"record kind `{self.name}`: texts is {self.texts!r}; expected a tuple of the "
                "fields that hold the texts of its conversation"
            )

    def given(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a record says, under the names that are read: null says nothing."""
        given = present_fields(record)
        for other, name in self.spellings:
            if other in given and name not in given:
                given[name] = given.pop(other)
        return given

    def unread(self, given: Mapping[str, Any]) -> Iterator[str]:
        """Yield a message for each field that is not read, the same for all records."""
        for name in given if self.fields else ():
            if name not in self.fields and name not in _OF_ALL:
                known = ", ".join(self.fields)
                near = nearest_name(name, {*self.fields, *_OF_ALL, *_MAY_BE_EMPTY} - {name, "bbox"})
                meant = f"`{near}` is probably meant" if near else f"it reads {known}"
                yield f"field `{name[:60]}` is not read by record kind `{self.name}`: {meant}"


def present_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say something: data frames write null, and ``[]`` for no boxes."""
    return {
        name: value
        for name, value in record.items()
        if value is not None and not (value == [] and name in _MAY_BE_EMPTY)
    }
