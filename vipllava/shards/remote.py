"""The addresses of tars, and their indices by way of the cache."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import braceexpand

from vipllava.files.cache import CacheError, MissingError, ShardCache
from vipllava.files.download import RefusedError
from vipllava.files.pools import run_threads
from vipllava.shards.tar_index import (
    ShardError,
    ShardIndex,
    ensure_index,
    index_name,
    index_tar,
    read_index,
    save_index,
)

log = logging.getLogger(__name__)

_THREADS: Final = 8


def expand_address(pattern: str, name: str) -> list[str]:
    """Return the addresses that a pattern with braces names; ``name`` is the data set's.

    Raises:
        ShardError: it has a wildcard; there is no list of what lies at an address.
    """
    if not pattern.startswith("pipe:") and re.search(r"[*\[]", pattern):
        raise ShardError(
            f"`{name}`: {pattern} has a wildcard, and an address cannot be searched; name the tars "
            "with braces: shard-{000000..000041}.tar"
        )
    return list(braceexpand.braceexpand(pattern))


def index_address(tar: str) -> str | None:
    """Return where the index of a tar would lie; None where its address does not tell."""
    if tar.startswith("pipe:"):
        head, found, tail = tar.rpartition(".tar")
        unique = found and ".tar" not in head and not re.match(r"\w", tail)
        return f"{index_name(head)}{tail}" if unique else None
    path, mark, query = tar.partition("?")
    return f"{index_name(path)}{mark}{query}"


def load_indices(tars: Sequence[Path | str], cache: ShardCache, folder: Path) -> list[ShardIndex]:
    """Return the indices of tars; a tar at an address without an index is fetched and indexed.

    Indices of addresses are kept in ``folder``, so that an interrupted run goes on.
    """

    def load(tar: Path | str) -> ShardIndex:
        return ensure_index(tar) if isinstance(tar, Path) else _load(tar, cache, folder)

    return list(run_threads(load, tars, _THREADS, ordered=True))


def _load(tar: str, cache: ShardCache, folder: Path) -> ShardIndex:
    digest = hashlib.blake2b(tar.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    made = folder / f"{digest}.index.npz"
    with suppress(ShardError):
        return read_index(made, str(made), "delete it")
    index = _published_index(tar, cache)
    if index is None:
        log.info("%s has no index; fetching it to make one", tar)
        with cache.open(tar) as content:
            index = index_tar(content, tar)
    try:
        save_index(index, made)
    except OSError as error:
        log.warning("%s could not be written: %s", made, error)
    return index


def _published_index(tar: str, cache: ShardCache) -> ShardIndex | None:
    """Read the index beside a tar; None if there is none."""
    if (address := index_address(tar)) is None:
        return None
    patience = cache.patience
    if is_command := address.startswith("pipe:"):
        # One that fails does not tell why: no index there, most likely.
        patience = replace(patience, max_attempts=1)
    try:
        file = cache.open(address, patience=patience)
    except MissingError:
        return None
    except CacheError as error:
        cause = error.__cause__
        # Storages that do not list their files say so of missing ones, too.
        forbidden = isinstance(cause, RefusedError) and cause.status in (401, 403)
        if not (is_command or forbidden):
            raise
        log.info("%s", error)
        return None
    remake = "make it again with `vipllava shards index` and put it beside the tar"
    with file:
        try:
            return read_index(file, address, remake)
        except ShardError:
            cache.path(address).unlink(missing_ok=True)
            raise
