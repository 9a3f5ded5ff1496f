"""The words of a command line: what Hydra cannot read of them, and how it would."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from vipllava.processes import is_first_process
from vipllava.types import first_line

OPTIONS: Final = (
    ("--config-dir", "-cd"), ("--config-name", "-cn"), ("--config-path", "-cp"), ("--cfg", "-c"),
    ("--package", "-p"), ("--info", "-i"),
)  # fmt: skip
"""Hydra's own, which take a value."""
_TAKES_VALUE: Final = frozenset(name for names in OPTIONS for name in names)
_KEY: Final = re.compile(r"(?P<key>\+{0,2}[\w./@$:-]+)=(?P<value>.+)", re.DOTALL)
# Words are separated by zeros.
_SPACED: Final = re.compile(r"(?<![^\0])([^\0=]+)(?:\0=\0?|=\0)([^\0=]+)(?=\0|$)")


def quoted(text: str) -> str:
    """Return a text as Hydra takes it literally, whatever it holds."""
    return QuotedString(text, Quote.single).with_quotes()


def readable_words(words: Sequence[str]) -> list[str]:
    """Return a command line as Hydra reads it.

    Options may stand anywhere; Hydra takes no override behind one. A value that Hydra cannot read
    and that is the path of something that is there needs no quotes: the folders of sweeps are
    named KEY=VALUE, and shells complete them. The error stream says which were quoted.
    """
    overrides: list[str] = []
    options: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if word.startswith("-"):
            options += [word, *([next(waiting, "")] if word in _TAKES_VALUE else [])]
        else:
            overrides.append(_quoted_path(word))
    return [*overrides, *filter(None, options)]


def _quoted_path(word: str) -> str:
    found = _KEY.fullmatch(word)
    # Path.exists() raises where a value is too long for a name.
    if found is None or not os.path.exists(found["value"]) or _reading_error(word) is None:  # noqa: PTH110
        return word
    if is_first_process():
        sys.stderr.write(f"note: quoted, as it is the path of something that is there: {word}\n")
    return f"{found['key']}={quoted(found['value'])}"


def _reading_error(word: str) -> HydraException | None:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException as error:
        return error
    return None


def join_spaced(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return words with ``KEY = VALUE`` as one of them, and a problem for each such place."""
    text = "\0".join(words)
    problems = [
        f"`{found[0].replace(chr(0), ' ')}`: write it without spaces, {found[1]}={found[2]}"
        for found in _SPACED.finditer(text)
    ]
    return [word for word in _SPACED.sub(r"\1=\2", text).split("\0") if word], problems


def unreadable(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each word that is no override, and the problem."""
    for word in words:
        if word.startswith("="):  # Hydra reads a key without a name
            yield word, f"`{word}` is not KEY=VALUE: there is no KEY"
        if (error := _reading_error(word)) is None:
            continue
        found, why = _KEY.fullmatch(word), first_line(error)
        if found is None:
            yield word, f"`{word}` is not KEY=VALUE: {why}"
        else:
            yield word, f"`{word}`: {why}; quote a text: {quoting(found['key'], found['value'])}"


def quoting(key: str, value: str) -> str:
    """Return an override as a shell and Hydra take its value for a text: ``'KEY="VALUE"'``."""
    return shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
