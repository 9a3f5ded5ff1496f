"""The tars that a manifest's patterns name in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import braceexpand


def match_patterns(
    patterns: Iterable[str], data_root: Path
) -> Iterator[tuple[str, str, list[Path]]]:
    """Yield a pattern, each name that its braces make, and the files that this one stands for.

    Names may have wildcards; the files are sorted, and none if nothing is there.
    """
    for pattern in patterns:
        for name in braceexpand.braceexpand(pattern):
            paths = [data_root / name]
            if re.search(r"[*?\[]", name):
                paths = sorted(data_root.glob(name))
            yield pattern, name, [path for path in paths if path.is_file()]
