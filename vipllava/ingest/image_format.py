"""The real format of an encoded image, whatever its file is called."""

from __future__ import annotations

import re
from typing import Final

_SIGNATURES: Final = {
    "jpg": re.compile(rb"\xff\xd8\xff"),
    "png": re.compile(rb"\x89PNG\r\n"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "gif": re.compile(rb"GIF8"),
    "bmp": re.compile(rb"BM"),
}


def format_of(data: bytes) -> str | None:
    """Return the extension that belongs to the first bytes of an image; None if to no known one."""
    return next((name for name, start in _SIGNATURES.items() if start.match(data)), None)


def same_format(extension: str, found: str | None) -> bool:
    """Whether a file with an extension (without the dot) is called what it is."""
    return found == ("jpg" if extension == "jpeg" else extension)
