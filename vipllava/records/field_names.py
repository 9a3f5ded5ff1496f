"""What a field that no parser reads was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any, Final

_OTHER_NAMES: Final[Mapping[str, frozenset[str]]] = {
    "image": frozenset(("file", "file_name", "filename", "path", "picture", "photo", "video")),
    "bboxes": frozenset(("box", "objects", "regions", "annotations")),
    "segmentations": frozenset(("mask", "masks", "polygon", "polygons", "rle", "rles")),
    "conversations": frozenset(("messages", "dialogue", "turns")),
}
"""By field: what other formats call it, where the letters do not tell."""
_ALIKE: Final = 0.75
"""Least likeness of names, 0..1: ``img`` and ``image`` have it, ``message`` and ``image`` not."""
_IMAGE_SUFFIXES: Final = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"))


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known field that a name probably means, or None."""
    names, lower = sorted(known), name.lower()
    for meant, others in _OTHER_NAMES.items():
        if meant in names and (lower in others or (meant == "image" and meant in lower)):
            return meant
    return next(iter(get_close_matches(lower, names, 1, _ALIKE)), None)


def meant_for(record: Mapping[str, Any], name: str) -> str:
    """Say which of a record's fields is probably the one that it lacks; empty for none.

    A field may be called ``name`` in another way or, for ``image``, hold what looks like a file.
    """
    for other, value in record.items():
        file = name == "image" and isinstance(value, str) and len(value) < 1024
        if (file and PurePath(value).suffix.lower() in _IMAGE_SUFFIXES) or (
            nearest_name(str(other), (name,)) and other != name and value is not None
        ):
            return f"; `{other}` is probably meant: call it `{name}`"
    return ""
