"""Texts that a terminal is to show and not to obey.

A model or a server may say anything. A terminal obeys control characters (it moves the cursor, sets
titles, answers questions as if the person typed), so they are shown instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from vipllava.types import VipLlavaError

# C0 and C1 but tabs and line ends, what turns the direction of a line around, half characters.
_UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """Return a text whose control characters are shown: ESC is ``␛``, others as ``\\x9b``."""
    return _UNSAFE.sub(_shown, text.replace("\r\n", "\n"))


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def as_json(content: object, indent: int | None = None) -> str:
    """Return a value as JSON that no terminal obeys; what it says is unchanged."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


@contextmanager
def harmless_errors() -> Generator[None]:
    """Make the messages of errors harmless: a server may have written a part of them."""
    try:
        yield
    except VipLlavaError as error:
        error.args = (harmless(str(error)), *error.args[1:])
        raise
