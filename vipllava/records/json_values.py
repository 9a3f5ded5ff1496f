"""JSON from elsewhere, bounded: what is nested without end would end whoever walks through it."""

from __future__ import annotations

import json
from typing import Any, Final, cast

DEEPEST: Final = 64
"""Levels of lists and objects; the deepest record kind has seven."""


def parse_json(text: str | bytes) -> Any:
    """Return a JSON value; raises ValueError for what is none, and as :func:`check_depth`."""
    try:
        value: Any = json.loads(text)
    except RecursionError as error:
        raise _too_deep() from error
    check_depth(value)
    return value


def check_depth(value: object) -> None:
    """Raise ValueError for what has more than ``DEEPEST`` levels."""
    level: list[Any] = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += cast("dict[str, Any]", item).values()
            elif isinstance(item, list):
                inner += cast("list[Any]", item)
        if not inner:
            return
        level = inner
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"lists and objects within each other over more than {DEEPEST} levels")
