"""Record kinds: foreign records to :class:`vipllava.types.Sample`.

Adding a kind is one file with a ``parse_`` function and one line in ``KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from vipllava.records.fields import Fields, Parsed
from vipllava.records.kinds.flickr30k import parse_flickr30k
from vipllava.records.kinds.image_level import parse_image_level
from vipllava.records.kinds.pointqa_twice import parse_pointqa_twice
from vipllava.records.kinds.refcocog import parse_refcocog
from vipllava.records.kinds.refcocog_gpt4v import parse_refcocog_gpt4v
from vipllava.records.kinds.regions import parse_regions
from vipllava.records.kinds.text_only import parse_text_only
from vipllava.records.kinds.v7w import parse_v7w
from vipllava.records.kinds.vcr import parse_vcr
from vipllava.records.kinds.vg_rel import parse_vg_rel
from vipllava.records.kinds.vg_rel_gpt4v import parse_vg_rel_gpt4v
from vipllava.records.version import check_version
from vipllava.types import RecordError, Sample

__all__ = ["AUTO", "KINDS", "NO_POLICY", "RecordKind", "kind_of", "parse_record"]

AUTO: Final = "auto"
NO_POLICY: Final = "none"
"""Policy name of kinds whose pictures get no marks; it is never looked up."""

_GPT4V: Final = "gpt4v"


@dataclass(frozen=True, slots=True)
class RecordKind:
    """One schema.

    Attributes:
        parse: reads the record; the generator chooses wordings.
        policy: the visual-prompt policy that marks its regions.
        prefix: first dash-separated part of the ids of the released data, or None.
    """

    parse: Callable[[Fields, np.random.Generator], Parsed]
    policy: str
    prefix: str | None = None


KINDS: Final[dict[str, RecordKind]] = {
    "image_level": RecordKind(parse_image_level, NO_POLICY),
    "text_only": RecordKind(parse_text_only, NO_POLICY),
    "refcocog": RecordKind(parse_refcocog, "refcocog", "refcocog"),
    "refcocog-gpt4v": RecordKind(parse_refcocog_gpt4v, "refcocog", "refcocog"),
    "vg_rel": RecordKind(parse_vg_rel, "vg_rel", "vg_rel"),
    "vg_rel-gpt4v": RecordKind(parse_vg_rel_gpt4v, "vg_rel-gpt4v", "vg_rel"),
    "flickr30k": RecordKind(parse_flickr30k, "flickr30k", "flickr30k"),
    "vcr": RecordKind(parse_vcr, "vcr", "vcr"),
    "v7w": RecordKind(parse_v7w, "v7w", "v7w"),
    "pointQA_twice": RecordKind(parse_pointqa_twice, "pointQA_twice", "pointQA_twice"),
    "regions": RecordKind(parse_regions, "regions"),
}

_PREFIXES: Final = frozenset(kind.prefix for kind in KINDS.values() if kind.prefix)


def kind_of(record: Mapping[str, Any]) -> str:
    """Return the kind of a record of a mix.

    The first dash-separated part of a text ``id`` names the data set, the second matters only
    where it is ``gpt4v``. Other ids: with ``bboxes`` a user's region record, with ``image`` an
    image-level one, else text only.
    """
    identifier = record.get("id")
    parts = identifier.split("-") if isinstance(identifier, str) else [""]
    if parts[0] in _PREFIXES:
        variant = f"{parts[0]}-{_GPT4V}"
        return variant if parts[1:2] == [_GPT4V] and variant in KINDS else parts[0]
    if "bboxes" in record:
        return "regions"
    return "image_level" if "image" in record else "text_only"


def parse_record(
    record: Mapping[str, Any],
    *,
    key: str,
    dataset: str,
    image: bytes | None,
    kind: str = AUTO,
    rng: np.random.Generator,
    size: tuple[int, int] | None = None,
) -> Sample:
    """Check a record and draft its conversation.

    Args:
        record: the JSON object; never changed.
        key: its key in the data set.
        dataset: the manifest's name.
        image: the encoded picture beside the record, or None.
        kind: one of ``KINDS``, or ``auto``.
        rng: chooses wordings; see :func:`vipllava.keyed_random.generator_for`.
        size: width and height of the upright picture, pixels, if they are known already; read
            from its header otherwise.

    Raises:
        RecordError: naming data set, key, field, what was found and what is expected.
    """
    check_version(record, f"{dataset}/{key}")
    name = kind
    if kind == AUTO:
        name = kind_of(record)
        if name == "text_only" and image is not None:
            name = "image_level"  # the picture in the shard says so, too
    try:
        schema = KINDS[name]
    except KeyError:
        raise RecordError(
            f"{dataset}/{key}: unknown record kind `{kind}`; known: {AUTO}, {', '.join(KINDS)}"
        ) from None
    parsed = schema.parse(Fields(record, key, dataset, image, size), rng)
    return Sample(key, dataset, image, parsed.regions, parsed.turns, schema.policy, parsed.fixed)
