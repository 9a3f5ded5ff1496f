"""Record kinds: foreign records to :class:`vipllava.types.Sample`.

A kind is one :class:`RecordKind` value. Those of the package are imported and listed here; a
program adds its own with :func:`register_kind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar, cast

import numpy as np

from vipllava.records.fields import Fields, check_version, list_or_empty
from vipllava.records.kind import CONVERSATIONS, NO_POLICY, RecordKind, present_fields
from vipllava.records.kinds.dialogues import IMAGE_LEVEL, TEXT_ONLY
from vipllava.records.kinds.flickr30k import FLICKR30K
from vipllava.records.kinds.pointqa_twice import POINTQA_TWICE
from vipllava.records.kinds.refcocog import REFCOCOG, REFCOCOG_GPT4V
from vipllava.records.kinds.regions import REGIONS
from vipllava.records.kinds.v7w import V7W
from vipllava.records.kinds.vcr import VCR
from vipllava.records.kinds.vg_rel import VG_REL, VG_REL_GPT4V
from vipllava.types import RecordError, Sample, VipLlavaError

__all__ = [
    "AUTO", "KINDS", "NO_POLICY", "Kinds", "RecordKind", "find_kind", "kind_of", "parse_record",
    "record_texts", "register_kind", "why_kind", "with_kinds",
]  # fmt: skip

AUTO: Final = "auto"
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

_OWN: Final = (
    IMAGE_LEVEL, TEXT_ONLY, REFCOCOG, REFCOCOG_GPT4V, VG_REL, VG_REL_GPT4V, FLICKR30K, VCR, V7W,
    POINTQA_TWICE, REGIONS,
)  # fmt: skip


class Kinds(dict[str, RecordKind]):
    """The known kinds by name, in the order in which messages list them.

    What is sent to another process holds them if it needs them there: unpickled, they add what was
    registered to the kinds of the process they arrive in, so that a spawned worker knows what a
    forked one inherits. The functions of a registered kind are found by their module's name.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (tuple(self.values())[len(_OWN) :],)


KINDS: Final = Kinds((kind.name, kind) for kind in _OWN)


def _arrive(registered: tuple[RecordKind, ...]) -> Kinds:
    for kind in registered:
        KINDS.setdefault(kind.name, kind)  # unpickling its functions may have registered it
    return KINDS


def with_kinds(work: Callable[[_Job], _Result]) -> Callable[[_Job], _Result]:
    """Return ``work`` for other processes, where it finds the kinds of this one."""
    return partial(_call, work, kinds=KINDS)


def _call(work: Callable[[_Job], _Result], job: _Job, kinds: Kinds) -> _Result:
    return work(job)


def register_kind(kind: RecordKind) -> None:
    """Add a record kind to those of this process and of the workers it starts.

    Jobs import the module that a manifest names as ``kind_module``: there the call belongs.

    Raises:
        VipLlavaError: another kind has its name or its prefix.
    """
    taken = kind.name in (AUTO, *KINDS)
    if taken or (kind.prefix and kind.prefix in {other.prefix for other in KINDS.values()}):
        what, value = ("name", kind.name) if taken else ("prefix", kind.prefix)
        raise VipLlavaError(
            f"record kind `{kind.name}`: a kind of {what} `{value}` exists; choose another {what} "
            f"(known kinds: {AUTO}, {', '.join(KINDS)})"
        )
    KINDS[kind.name] = kind


def kind_of(record: Mapping[str, Any], has_image: bool = False) -> str:
    """Return the kind of a record of a mix.

    A text ``id`` that starts with the prefix of a kind decides. Other ids: with ``bboxes`` (or
    ``bbox``) a user's region record, with ``image`` (or an image beside it) an image-level one,
    else text only. Null says nothing, nor does an empty list of boxes.
    """
    record = present_fields(record)
    identifier = record.get("id")
    if isinstance(identifier, str):
        prefixes = {kind.prefix: kind for kind in KINDS.values() if kind.prefix}
        fitting = [prefix for prefix in prefixes if f"{identifier}-".startswith(f"{prefix}-")]
        if fitting:
            return prefixes[max(fitting, key=len)].name
    if "bboxes" in record or "bbox" in record:
        return REGIONS.name
    return (IMAGE_LEVEL if has_image or "image" in record else TEXT_ONLY).name


def why_kind(kind: RecordKind) -> str:
    """Say by what ``record_kind: auto`` takes a record for one of ``kind``."""
    if kind.prefix:
        return f"its id begins with `{kind.prefix}-`"
    has = {REGIONS.name: "it has `bboxes`", IMAGE_LEVEL.name: "it has an image and no `bboxes`"}
    return has.get(kind.name, "it has neither `image` nor `bboxes`")


def find_kind(record: Mapping[str, Any], kind: str | RecordKind, has_image: bool) -> RecordKind:
    """Return the kind of a stored record, given itself, its name or ``auto``: see :func:`kind_of`.

    Raises:
        RecordError: the kind is unknown; lists the known ones.
    """
    if isinstance(kind, RecordKind):
        return kind
    name = kind_of(record, has_image) if kind == AUTO else kind
    if name not in KINDS:
        raise RecordError(f"unknown record kind `{name}`; known: {AUTO}, {', '.join(KINDS)}")
    return KINDS[name]


def record_texts(record: Mapping[str, Any]) -> list[Any]:
    """Return what holds the texts of a record of any kind, valid or not.

    The values of its conversation, or without one all fields that a known kind reads texts from.
    """
    if isinstance(record.get(CONVERSATIONS), list):
        turns = list_or_empty(record[CONVERSATIONS])
        return [cast("Any", turn).get("value") for turn in turns if isinstance(turn, dict)]
    names = dict.fromkeys(name for kind in KINDS.values() for name in kind.texts)
    return [record.get(name) for name in names if name != CONVERSATIONS]


def parse_record(
    record: Mapping[str, Any],
    *,
    key: str,
    dataset: str,
    image: bytes | None,
    kind: str | RecordKind = AUTO,
    rng: np.random.Generator,
    size: tuple[int, int] | None = None,
    upright: bool = True,
) -> Sample:
    """Check a record and draft its conversation.

    Args:
        record: the JSON object; never changed.
        key: its own in the data set of that manifest's name.
        dataset: see ``key``.
        image: encoded, from beside the record.
        kind: one of ``KINDS``, its name, or ``auto``; or one that is not registered.
        rng: chooses wordings; see :func:`vipllava.keyed_random.generator_for`.
        size: width and height of the image, pixels, where known already.
        upright: whether the image is turned as its EXIF block says.

    Raises:
        RecordError: naming data set, key, field, what was found and what is expected.
    """
    where = f"{dataset}/{key}"
    check_version(record, where)
    try:
        found = find_kind(record, kind, image is not None)
    except RecordError as error:
        raise error.at(where) from None
    fields = Fields(found.given(record), key, dataset, image, size, upright)
    try:
        parsed = found.parse(fields, rng)
    except RecordError as error:
        if kind != AUTO or error.fault != "record-invalid":
            raise
        other = IMAGE_LEVEL if found is REGIONS else REGIONS
        raise RecordError(
            f"{error} (record_kind: auto took it for `{found.name}`, because {why_kind(found)}; "
            f"if it is not one, name its kind in the manifest, e.g. record_kind: {other.name})"
        ) from error
    try:
        "".join(
            part for turn in parsed.turns for part in turn.parts if isinstance(part, str)
        ).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        fields.refuse(
            f"a text of the conversation has half of a character, {half}: a lone "
            "surrogate that no tokenizer reads; correct it"
        )
    identifier = record.get("id")
    return Sample(
        key, dataset, image, parsed.regions, parsed.turns, found.policy, parsed.fixed, upright,
        identifier if isinstance(identifier, str | int) else None,
    )  # fmt: skip
