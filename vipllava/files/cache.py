"""Files from addresses, kept in a folder of bounded size that several jobs share.

The folder holds whole files only, named ``DIGEST-NAME`` after the address. ``.incoming`` holds what
is under way, ``.locks`` one lock per address, held by who downloads it. ``.lock`` is held while a
file gets its final name and others are removed for it. A reader keeps an open descriptor, which
outlives the file's removal.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from vipllava.files.atomic import move
from vipllava.files.download import RefusedError
from vipllava.files.locks import locked
from vipllava.files.openers import CacheError, MissingError, transfer
from vipllava.files.retries import (
    PATIENT,
    BrokenError,
    GivenUpError,
    Patience,
    Trial,
    WrongError,
    retry,
)
from vipllava.types import ConfigError

log = logging.getLogger(__name__)

_PASSING: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
_POLL_S: Final = 0.05
_RESUMABLE_S: Final = 3600.0
"""How long the beginning of a file that nobody works on is kept to go on from."""
_OURS: Final = re.compile(r"([0-9a-f]{16}-.+)|\.([0-9a-f]{16}-.+)\.part(?:\.json)?")
_IN_COMMAND: Final = re.compile(r"[A-Za-z0-9._+-]+\.(?:tar|npz)\b")


class _DiskTrouble(BrokenError):
    """The cache's own disk failed; others may free it meanwhile."""


class ShardCache:
    """Whole files from addresses in a local folder, downloaded once for all who use the folder.

    See :mod:`vipllava.files.openers` for the schemes. All methods may be called from
    several processes and threads. An instance can be pickled and is cheap to make; nothing is
    touched before the first file is wanted.

    Args:
        directory: folder on a local disk; made when needed. Other files in it are left alone.
        max_bytes: what its whole files take up at most. The files under way come on top, one per
            thread that fetches. What was used longest ago goes first.
        patience: bounds on waiting and trying.

    Raises:
        ConfigError: ``max_bytes`` is not positive.
    """

    def __init__(self, directory: Path, max_bytes: int, patience: Patience = PATIENT) -> None:
        if max_bytes < 1:
            raise ConfigError(
                f"a shard cache of {max_bytes} bytes holds nothing; give it room for several tars"
            )
        self.directory = Path(directory).absolute()
        self.max_bytes = max_bytes
        self.patience = patience
        self._incoming = self.directory / ".incoming"
        self._ahead: _Ahead | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.directory, self.max_bytes, self.patience)

    def path(self, url: str) -> Path:
        """Return where the local copy of an address lies, if there is one; readers open it."""
        return self.directory / cache_name(url)

    def open(
        self, url: str, *, size: int | None = None, patience: Patience | None = None
    ) -> BinaryIO:
        """Return a whole local copy, open for reading; it stays readable whatever is removed.

        Args:
            size: bytes the file must have, where known.
            patience: instead of the cache's own.

        Raises:
            MissingError: there is nothing under the address.
            CacheError: the file cannot be had, has another size, or does not fit.
        """
        trial = Trial(patience or self.patience)
        has_turn = False
        with ExitStack() as turn:

            def attempt() -> BinaryIO:
                nonlocal has_turn
                try:
                    file = self._open_held(url, size)
                    if file is None and not has_turn:
                        turn.enter_context(self._turn(url, trial))
                        has_turn = True
                        file = self._open_held(url, size)  # another may have brought it meanwhile
                    return file or self._bring(url, size, trial)
                except OSError as error:
                    if error.errno in _PASSING:
                        raise _DiskTrouble(str(error)) from error
                    raise self._disk_error(url, error, trial) from error

            try:
                return retry(attempt, trial, url)
            except GivenUpError as error:
                if isinstance(error.__cause__, _DiskTrouble):
                    reason = cast("OSError", error.reason)
                    raise self._disk_error(url, reason, trial) from reason
                raise CacheError(
                    f"{error}. Check address and network, and that the file there is the one that "
                    f"its index or manifest describes (shard cache {self.directory})"
                ) from error

    def prefetch(self, urls: Sequence[str]) -> None:
        """Fetch files ahead, one after the other, on a thread of this process; returns at once.

        Replaces what an earlier call has not begun. Ends after files of half the cache's size, so
        that they do not drive each other out. What fails is logged and left to :meth:`open`, which
        tries again and raises.
        """
        self._ahead = _Ahead(self, urls, self._ahead)
        self._ahead.start()

    @contextmanager
    def _turn(self, url: str, trial: Trial) -> Generator[None]:
        """Hold the lock of a file; waits for who holds it as long as that one gets on."""
        lock = self._lock_of(cache_name(url))
        while True:
            with locked(lock, 0) as mine:
                if mine:
                    yield
                    return
            with suppress(FileNotFoundError):
                trial.moved_to(self._part(url).stat().st_size)
            if trial.left_s == 0:
                raise CacheError(
                    f"{url}: given up after {trial.patience.total_s:.0f} s of waiting for another "
                    f"process that holds {lock} and does not get on with it: see what that one "
                    "does, end it, and start again"
                )
            time.sleep(_POLL_S)

    def _open_held(self, url: str, size: int | None) -> BinaryIO | None:
        """Open a whole file and mark it as used; None if it is not there in that size."""
        try:
            file = self.path(url).open("rb")
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(file.fileno()).st_size != size:
            file.close()
            return None
        with suppress(PermissionError):  # another user's file
            _mark_used(file.fileno())
        return file

    def _bring(self, url: str, size: int | None, trial: Trial) -> BinaryIO:
        """Make one attempt to fetch a file whose lock is held; name it and open it."""

        def on_progress(received: int, total: int | None) -> None:
            self._check_fits(url, max(received, total or 0))
            if size is not None and total not in (None, size):
                raise WrongError(f"{total} bytes were announced where {size} were expected")

        self._check_fits(url, size or 0)
        self._incoming.mkdir(parents=True, exist_ok=True)
        with locked(self.directory / ".lock"):
            self._make_room(size or 0)
        part = self._part(url)
        note = part.with_name(f"{part.name}.json")
        try:
            received = transfer(url, part, trial, on_progress)
            if received == 0:
                raise WrongError("nothing came")
            if size not in (None, received):
                raise WrongError(f"{received} bytes came where {size} were expected")
            self._check_fits(url, received)
            with locked(self.directory / ".lock"):
                self._make_room(received)
                _mark_used(part)
                # Opened under the lock: nobody makes room in between.
                file = move(part, self.path(url)).open("rb")
            note.unlink(missing_ok=True)
            return file
        except RefusedError as error:
            raise _refusal(url, error, trial.num_failed + 1) from error
        except (CacheError, OSError, WrongError):  # of no use to go on from
            part.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            raise

    def _part(self, url: str) -> Path:
        return self._incoming / f".{cache_name(url)}.part"

    def _check_fits(self, url: str, size: int) -> None:
        if size > self.max_bytes:
            raise CacheError(
                f"{url} has {size} bytes or more, the shard cache {self.directory} may hold "
                f"{self.max_bytes}: allow it more (several tars, better some dozens)"
            )

    def _make_room(self, needed: int) -> None:
        """Remove beginnings that nobody continues, then what was used longest ago."""
        parts, whole = _held(self._incoming), _held(self.directory)
        total = sum(stat.st_size for *_, stat in (*parts, *whole))
        for path, name, stat in (*parts, *whole):
            is_part = path.parent == self._incoming
            outdated = is_part and stat.st_mtime < time.time() - _RESUMABLE_S
            if total + needed <= self.max_bytes and not outdated:
                continue
            with locked(self._lock_of(name), 0) as nobody_works:
                if nobody_works or not is_part:
                    path.unlink(missing_ok=True)
                if nobody_works:
                    self._lock_of(name).unlink(missing_ok=True)
            total -= stat.st_size  # gone, or under way: then it comes on top

    def _lock_of(self, name: str) -> Path:
        return self.directory / ".locks" / name

    def _disk_error(self, url: str, error: OSError, trial: Trial) -> CacheError:
        tried = f" ({trial})" if trial.num_failed else ""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return CacheError(
                f"{url}: the shard cache {self.directory} cannot be used{tried}: {error}. It takes "
                "a folder that this user may write, on a disk that knows file locks"
            )
        free, held = "?", "?"
        with suppress(OSError):
            free = str(shutil.disk_usage(self.directory).free)
            held = str(sum(stat.st_size for *_, stat in _held(self.directory)))
        return CacheError(
            f"{url}: no space left for it in the shard cache {self.directory}{tried}: {free} bytes "
            f"are free, the cache holds {held} of at most {self.max_bytes}. Free some space there, "
            "allow the cache less, or put it on another disk. Nothing partial was left"
        )


class _Ahead(threading.Thread):
    """Fetches a list of addresses, after the file that the one before it is at."""

    def __init__(self, cache: ShardCache, urls: Sequence[str], before: _Ahead | None) -> None:
        super().__init__(name="shard-prefetch", daemon=True)
        self._cache = cache
        self._urls = urls
        self._before = before
        self._replaced = False
        if before is not None:
            before._replaced = True

    def run(self) -> None:
        if self._before is not None:
            self._before.join()
            self._before = None
        fetched = 0
        for url in self._urls:
            if self._replaced or fetched >= self._cache.max_bytes // 2:
                return
            try:
                with self._cache.open(url) as file:
                    fetched += os.fstat(file.fileno()).st_size
            except CacheError as error:
                log.warning("prefetch: %s", error)
            except Exception:  # the next ones may come, and who needs this one says what is wrong
                log.warning("prefetch: %s could not be fetched", url, exc_info=True)


def _mark_used(file: int | Path) -> None:
    os.utime(file, ns=(time.time_ns(), time.time_ns()))  # finer than the kernel's own time


def _held(folder: Path) -> list[tuple[Path, str, os.stat_result]]:
    """Return our files in a folder and the names of their locks, the longest unused ones first."""
    found: list[tuple[Path, str, os.stat_result]] = []
    for path in folder.iterdir():
        if (match := _OURS.fullmatch(path.name)) is not None:
            with suppress(FileNotFoundError):  # it has just become whole, or made room
                found.append((path, match[1] or match[2], path.stat()))
    return sorted(found, key=lambda item: item[2].st_mtime_ns)


def _refusal(url: str, error: RefusedError, number: int) -> CacheError:
    gone = error.status in (404, 410)
    remedy = (
        "correct `shards` in the manifest, or the data root"
        if gone
        else "the address wants a login, has expired, or is not meant to be fetched"
    )
    return (MissingError if gone else CacheError)(
        f"{url}: the server answered {error.status} {error.reason} at attempt {number} and was not "
        f"asked again; {remedy}"
    )


def cache_name(url: str) -> str:
    """Return the name of the local copy of an address.

    >>> cache_name("https://host/set/0001.tar")
    '632d53b38e9c7297-0001.tar'
    """
    if url.startswith("pipe:"):
        name = (_IN_COMMAND.findall(url) or ["pipe"])[-1]
    else:
        name = re.split(r"[?#]", url)[0].rpartition("/")[2] or "file"
    digest = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{digest}-{re.sub(r'[^A-Za-z0-9._+-]', '_', name)[-100:]}"
