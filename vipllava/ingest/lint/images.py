"""The image beside a record: there, whole, and of the format that its extension says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from PIL import Image

from vipllava.ingest.lint.findings import Problem
from vipllava.records import RecordKind
from vipllava.records.fields import Fields
from vipllava.records.image_decode import decode_image
from vipllava.types import RecordError

_STARTS: Final = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
)
_SAME: Final = {"jpeg": "jpg"}


def format_of(data: bytes) -> str | None:
    """Return the extension that belongs to encoded bytes, or None if they are no image."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in _STARTS if data.startswith(start)), None)


def read_image(fields: Fields, kind: RecordKind) -> tuple[Image.Image | None, RecordError | None]:
    """Decode the whole image; return it, or what is wrong with it (None twice: text only)."""
    try:
        if kind.has_image:
            fields.require_image()
        if fields.image is None:
            return None, None
        return decode_image(fields.image, f"{fields.dataset}/{fields.key}"), None
    except RecordError as error:
        return None, error


def extension_problems(data: bytes, extension: str | None) -> Iterator[Problem]:
    """Yield a fault if an image's extension is not the one of its bytes."""
    found = format_of(data)
    if extension is None or found is None or _SAME.get(extension, extension) == found:
        return
    yield Problem(
        "image-extension",
        f"the image is called .{extension} and is a .{found}; it is read as what it is, other "
        f"programs may not: rename it, or store it as .{extension}",
    )
