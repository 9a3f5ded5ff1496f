"""Files from addresses, kept in a folder of bounded size that several jobs share.

The folder holds whole files only, named ``DIGEST-NAME`` after folder and name of the address.
``.incoming`` holds what is under way, ``.locks`` one lock per address, held by who downloads it.
``.lock`` is held while a file gets its final name and others are removed for it. A reader keeps an
open descriptor, which outlives the file's removal.
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
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, cast
from urllib.parse import unquote

from vipllava.files.atomic import move
from vipllava.files.download import DiskError, DownloadError, RefusedError
from vipllava.files.locks import locked
from vipllava.files.openers import CacheError, MissingError, WrongError, transfer
from vipllava.files.retries import (
    PATIENT,
    BrokenError,
    GivenUpError,
    Patience,
    StoppedError,
    Trial,
    retry,
)
from vipllava.types import ConfigError

log = logging.getLogger(__name__)

_PASSING: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
_MOST_WRONG: Final = 5
_POLL_S: Final = 0.05
_RESUMABLE_S: Final = 3600.0
"""How long the beginning of a file that nobody works on is kept to go on from."""
_GONE: Final = (404, 410)
_OURS: Final = re.compile(r"([0-9a-f]{16}-.+)|\.([0-9a-f]{16}-.+)\.part(?:\.json)?")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._+-]")
_PLACE: Final = re.compile(r"(?P<folder>[^?#]*/)(?P<name>[^/?#]+)(?P<rest>.*)", re.DOTALL)
_IN_COMMAND: Final = re.compile(r"[A-Za-z0-9._+-]+\.(?:tar|npz)\b")
_JOIN_S: Final = 1.0


@dataclass(slots=True)
class _Held:
    """Something that takes up space: a whole file, or the beginning of one in several parts."""

    name: str
    size: int = 0
    used_ns: int = 0
    paths: list[Path] = field(default_factory=list[Path])


class ShardCache:
    """Whole files from addresses in a local folder, downloaded once for all who use the folder.

    See :mod:`vipllava.files.openers` for the schemes. All methods may be called from
    several processes and threads. An instance can be pickled and is cheap to make; nothing is
    touched before the first file is wanted.
    """

    def __init__(self, directory: Path, max_bytes: int, patience: Patience = PATIENT) -> None:
        """Describe a cache.

        Args:
            directory: folder on a local disk; made when needed. Other files in it are left alone.
            max_bytes: what its whole files take up at most. The files under way come on top, one
                per thread that fetches. What was used longest ago goes first.
            patience: bounds on waiting and trying.

        Raises:
            ConfigError: ``max_bytes`` is not positive.
        """
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
        self,
        url: str,
        *,
        size: int | None = None,
        patience: Patience | None = None,
        stop: threading.Event | None = None,
    ) -> BinaryIO:
        """Return a whole local copy, open for reading; it stays readable whatever is removed.

        Args:
            url: address.
            size: bytes the file must have, where known.
            patience: instead of the cache's own.
            stop: ends the waiting when it is set.

        Raises:
            MissingError: there is nothing under the address.
            CacheError: the file cannot be had, has another size, or does not fit.
            StoppedError: ``stop`` was set.
        """
        stop = stop or threading.Event()
        trial = Trial(patience or self.patience)

        def attempt() -> BinaryIO:
            try:
                return self._open_held(url, size) or self._fetch(url, size, trial, stop)
            except OSError as error:
                if error.errno in _PASSING:  # others may free a full disk meanwhile
                    raise BrokenError(str(error)) from error
                raise self._disk_error(url, error, trial) from error

        try:
            return retry(attempt, trial, url, stop=stop)
        except GivenUpError as error:
            reason = cast("OSError", error.reason)  # `_bring` has its own attempts at the address
            raise self._disk_error(url, reason, trial) from reason

    def prefetch(self, urls: Sequence[str]) -> None:
        """Fetch files ahead, one after the other, on a thread of this process; returns at once.

        Replaces what an earlier call has not begun. Ends after files of half the cache's size, so
        that they do not drive each other out. What fails is logged and left to :meth:`open`, which
        tries again and raises.
        """
        if self._ahead is None or self._ahead.pid != os.getpid():  # a fork leaves threads behind
            self._ahead = _Ahead(self)
        self._ahead.fetch(urls)

    def close(self) -> None:
        """Stop prefetching; the cache can be used again afterwards.

        Does not wait for a silent server: the thread then ends by itself later.
        """
        if self._ahead is not None and self._ahead.pid == os.getpid():
            self._ahead.close()
        self._ahead = None

    # The way of one file.

    def _fetch(self, url: str, size: int | None, trial: Trial, stop: threading.Event) -> BinaryIO:
        with self._turn(url, trial, stop):
            # Whoever held the lock before may have brought it.
            return self._open_held(url, size) or self._bring(url, size, trial, stop)

    @contextmanager
    def _turn(self, url: str, trial: Trial, stop: threading.Event) -> Generator[None]:
        """Hold the lock of a file; waits for who holds it as long as that one gets on."""
        name = cache_name(url)
        while True:
            with locked(self._lock_of(name), 0) as mine:
                if mine:
                    yield
                    return
            for part in (name, f".{name}.part"):
                with suppress(FileNotFoundError):
                    trial.moved_to((self._incoming / part).stat().st_size)
            if trial.left_s == 0:
                raise CacheError(
                    f"{url}: given up after {trial.patience.total_s:.0f} s of waiting for another "
                    f"process that holds {self._lock_of(name)} and does not get on with it: see "
                    "what that one does, end it, and start again"
                )
            if stop.wait(_POLL_S):
                raise StoppedError

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

    def _bring(self, url: str, size: int | None, trial: Trial, stop: threading.Event) -> BinaryIO:
        """Fetch a file whose lock is held, make room for it, name it and open it."""
        self._check_fits(url, size or 0)
        self._incoming.mkdir(parents=True, exist_ok=True)
        with locked(self.directory / ".lock"):
            self._make_room(size or 0)
        staged = self._incoming / cache_name(url)
        try:
            received = self._transfer(url, staged, size, trial, stop)
            self._check_fits(url, received)
            with locked(self.directory / ".lock"):
                self._make_room(received)
                _mark_used(staged)
                # Opened under the lock: nobody makes room in between.
                return move(staged, self.path(url)).open("rb")
        except DiskError as error:
            self._drop(staged)
            cause = error.__cause__
            assert isinstance(cause, OSError)
            raise cause from None
        except RefusedError as error:
            raise _refusal(url, error) from error
        except DownloadError as error:  # what came is kept to go on from
            raise CacheError(f"{error} (into the shard cache {self.directory})") from error
        except (CacheError, OSError):
            self._drop(staged)
            raise

    def _transfer(
        self, url: str, staged: Path, size: int | None, trial: Trial, stop: threading.Event
    ) -> int:
        """Fetch a file into ``staged``; returns its bytes."""
        num_wrong = 0

        def on_progress(received: int, total: int | None) -> None:
            if stop.is_set():
                raise StoppedError
            self._check_fits(url, max(received, total or 0))
            if size is not None and total not in (None, size):
                raise WrongError(f"{total} bytes were announced where {size} were expected")

        def attempt() -> int:
            nonlocal num_wrong
            try:
                received = transfer(url, staged, trial, on_progress)
                if received == 0:
                    raise WrongError("nothing came")
                if size not in (None, received):
                    raise WrongError(f"{received} bytes came where {size} were expected")
            except BrokenError:
                self._drop(staged)
                raise
            except WrongError as error:
                self._drop(staged)
                num_wrong += 1
                if num_wrong == _MOST_WRONG:
                    raise GivenUpError(
                        f"{url}: given up after {num_wrong} answers of other files: {error}"
                    ) from error
                raise BrokenError(str(error)) from error
            return received

        try:
            return retry(attempt, trial, url, stop=stop)
        except GivenUpError as error:
            raise CacheError(
                f"{error}. Check address and network, and that the file there is the one that its "
                "index or manifest describes"
            ) from error

    def _drop(self, staged: Path) -> None:
        for name in (staged.name, f".{staged.name}.part", f".{staged.name}.part.json"):
            staged.with_name(name).unlink(missing_ok=True)

    # Room.

    def _check_fits(self, url: str, size: int) -> None:
        if size > self.max_bytes:
            raise CacheError(
                f"{url} has {size} bytes or more, the shard cache {self.directory} may hold "
                f"{self.max_bytes}: allow it more (several tars, better some dozens)"
            )

    def _make_room(self, needed: int) -> None:
        """Remove beginnings that nobody continues, then what was used longest ago."""
        whole, parts = _held(self.directory), _held(self._incoming)
        total = sum(held.size for held in (*whole, *parts))
        outdated_ns = time.time_ns() - int(_RESUMABLE_S * 1e9)
        for part in parts:
            if total + needed > self.max_bytes or part.used_ns < outdated_ns:
                self._remove(part, only_unlocked=True)
                total -= part.size  # gone, or under way: then it comes on top
        for file in whole:
            if total + needed <= self.max_bytes:
                break
            self._remove(file)
            total -= file.size

    def _remove(self, held: _Held, *, only_unlocked: bool = False) -> None:
        with locked(self._lock_of(held.name), 0) as nobody_works:
            if nobody_works or not only_unlocked:
                for path in held.paths:
                    path.unlink(missing_ok=True)
            if nobody_works:
                self._lock_of(held.name).unlink(missing_ok=True)

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
            held = str(sum(file.size for file in _held(self.directory)))
        return CacheError(
            f"{url}: no space left for it in the shard cache {self.directory}{tried}: {free} bytes "
            f"are free, the cache holds {held} of at most {self.max_bytes}. Free some space there, "
            "allow the cache less, or put it on another disk. Nothing partial was left"
        )


def _mark_used(file: int | Path) -> None:
    os.utime(file, ns=(time.time_ns(), time.time_ns()))  # finer than the kernel's own time


def _held(folder: Path) -> list[_Held]:
    """Return our files in a folder, those first that were used longest ago."""
    found: dict[str, _Held] = {}
    for path in folder.iterdir():
        match = _OURS.fullmatch(path.name)
        if match is None:
            continue
        with suppress(FileNotFoundError):  # it has just become whole, or made room
            stat = path.stat()
            name = match[1] or match[2]
            held = found.setdefault(name, _Held(name))
            held.size += stat.st_size
            held.used_ns = max(held.used_ns, stat.st_mtime_ns)
            held.paths.append(path)
    return sorted(found.values(), key=lambda held: held.used_ns)


def _refusal(url: str, error: RefusedError) -> CacheError:
    kind = MissingError if error.status in _GONE else CacheError
    remedy = (
        "correct `shards` in the manifest, or the data root"
        if error.status in _GONE
        else "the address wants a login, has expired, or is not meant to be fetched"
    )
    cause = getattr(error.__cause__, "reason", "")
    return kind(
        f"{url}: the server answered {error.status} {cause} at attempt 1 and was not asked "
        f"again; {remedy}"
    )


class _Ahead:
    """A queue of addresses and the thread that works it off; the thread ends when it is empty."""

    def __init__(self, cache: ShardCache) -> None:
        self.pid = os.getpid()
        self._cache = cache
        self._lock = threading.Lock()
        self._waiting: deque[str] = deque()
        self._bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self, urls: Sequence[str]) -> None:
        with self._lock:
            self._waiting = deque(urls)
            self._bytes = 0
            if self._thread is None and self._waiting:
                self._thread = threading.Thread(
                    target=self._run, name="shard-prefetch", daemon=True
                )
                self._thread.start()

    def close(self) -> None:
        self._stop.set()
        thread = self._thread
        if thread is not None:
            thread.join(_JOIN_S)

    def _next(self) -> str | None:
        with self._lock:
            full = self._bytes >= self._cache.max_bytes // 2
            if self._stop.is_set() or not self._waiting or full:
                self._thread = None
                return None
            return self._waiting.popleft()

    def _run(self) -> None:
        while (url := self._next()) is not None:
            try:
                with self._cache.open(url, stop=self._stop) as file:
                    size = os.fstat(file.fileno()).st_size
            except StoppedError:
                continue
            except CacheError as error:
                log.warning("prefetch: %s", error)
            except Exception:  # the thread goes on, and who needs the file says what is wrong
                log.warning("prefetch: %s could not be fetched", url, exc_info=True)
            else:
                with self._lock:
                    self._bytes += size


def cache_name(url: str) -> str:
    """Return the name of the local copy: files of one folder differ in their names only.

    >>> cache_name("https://host/set/0001.tar")
    'c1bebd6ffb2c04a3-0001.tar'
    """
    if url.startswith("pipe:"):
        names = _IN_COMMAND.findall(url)
        return f"{_digest(url)}-{names[-1] if names else 'pipe'}"
    match = _PLACE.fullmatch(url)
    if match is None:
        return f"{_digest(url)}-file"
    plain = unquote(match["name"])
    safe = _UNSAFE.sub("_", plain)[-100:]
    # Where the name is not kept as it is, the digest has to tell it from others.
    exact = safe == match["name"]
    return f"{_digest(match['folder'] + match['rest'] if exact else url)}-{safe}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
