"""Files that tests put into a shard cache, and what they find there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from vipllava.files.cache import ShardCache
from vipllava.files.retries import Patience

SIZE = 60_000
ROOMY = 1 << 30
QUICK = Patience(max_attempts=3, timeout_s=10, backoff_s=0)


def body(number: int) -> bytes:
    """Bytes that no other file has."""
    return hashlib.shake_256(str(number).encode()).digest(SIZE)


def names(folder: Path) -> list[str]:
    """Return the whole files, without digests."""
    return sorted(path.name[17:] for path in folder.iterdir() if path.is_file() and path.name[16:])


def parts(folder: Path) -> list[Path]:
    return list((folder / ".incoming").iterdir())


def fetch(cache: ShardCache, url: str, size: int | None = None) -> Path:
    cache.open(url, size=size).close()
    return cache.path(url)


def read(cache: ShardCache, url: str, size: int | None = None) -> bytes:
    with cache.open(url, size=size) as file:
        return file.read()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
