"""The tars that a manifest's patterns name in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import braceexpand


class NamedTars(NamedTuple):
    """What one name stands for once the braces of its pattern are expanded.

    Attributes:
        pattern: as in the manifest.
        name: one of the names that its braces make, relative to the data root.
        tars: the files that it stands for, sorted; none if nothing is there.
    """

    pattern: str
    name: str
    tars: list[Path]


def match_patterns(patterns: Iterable[str], data_root: Path) -> Iterator[NamedTars]:
    """Yield what patterns with braces and wildcards stand for; for an address that is nothing."""
    for pattern in patterns:
        for name in braceexpand.braceexpand(pattern):
            paths = [data_root / name]
            if re.search(r"[*?\[]", name):
                paths = sorted(data_root.glob(name))
            yield NamedTars(pattern, name, [path for path in paths if path.is_file()])
