"""The tars that a manifest's patterns name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import braceexpand

from vipllava.shards.tar_index import ShardError


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


def expand_address(pattern: str, name: str) -> list[str]:
    """Return the addresses that a pattern names.

    Args:
        pattern: with braces; what follows ``?`` is a query.
        name: the data set's, for messages.

    Raises:
        ShardError: it has a wildcard; there is no list of what lies at an address.
    """
    if not pattern.startswith("pipe:") and re.search(r"[*\[]", pattern):
        raise ShardError(
            f"`{name}`: {pattern} has a wildcard, and an address cannot be searched; name the tars "
            "with braces: shard-{000000..000041}.tar"
        )
    return list(braceexpand.braceexpand(pattern))
