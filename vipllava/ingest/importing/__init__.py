"""Exports of annotation tools and data sets in their formats, made into records.

A format is one :class:`~vipllava.ingest.importing.source.ImportFormat` value in a file of its own;
they are listed here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vipllava.ingest.importing.coco import COCO
from vipllava.ingest.importing.label_studio import LABEL_STUDIO
from vipllava.ingest.importing.labelme import LABELME
from vipllava.ingest.importing.lvis import LVIS
from vipllava.ingest.importing.source import ImportFormat, ImportingError
from vipllava.ingest.importing.via import VIA
from vipllava.ingest.importing.yolo import YOLO

FORMATS: Final[Mapping[str, ImportFormat]] = {
    form.name: form for form in (COCO, LABELME, VIA, LABEL_STUDIO, YOLO, LVIS)
}
_HEAD: Final = 1 << 20
"""Letters of a file by which its format is recognised."""


def find_format(name: str) -> ImportFormat:
    """Return a format by its name.

    Raises:
        ImportingError: there is no such format; lists those that there are.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name.lower(), FORMATS, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ImportingError(f"format {name}: unknown{meant}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def recognise_head(head: str) -> ImportFormat | None:
    """Return the format of a file that begins with ``head``; None for none of them."""
    start = head.lstrip("\ufeff \t\r\n")
    return next((form for form in FORMATS.values() if form.is_head(start)), None)


def recognise(path: Path) -> ImportFormat | None:
    """Return the format of a file or folder; None for none of them, or where it cannot be read."""
    try:
        if path.is_dir():
            known = ((form, form.is_folder) for form in FORMATS.values())
            return next((form for form, fits in known if fits is not None and fits(path)), None)
        with path.open(encoding="utf-8", errors="replace") as file:
            return recognise_head(file.read(_HEAD))
    except OSError:
        return None


def import_command(form: ImportFormat, source: object) -> str:
    """Return what to type to import an export."""
    return f"vipllava import {form.name} {source} --output DIR"
