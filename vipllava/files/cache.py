"""Files from addresses, kept in a folder of bounded size that several jobs share.

The folder holds whole files only, named ``DIGEST-NAME`` after folder and name of the address.
``.incoming`` holds what is under way, ``.locks`` one lock per address, held by who downloads it.
``.lock`` is held while a file gets its final name and others are removed for it. A reader keeps an
open descriptor, which outlives the file's removal. Locks end with their process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import unquote

from vipllava.files.download import DiskError, DownloadError, RefusedError
from vipllava.files.openers import BrokenError, CacheError, MissingError, WrongError, transfer
from vipllava.files.retries import PATIENT, Patience, Trial
from vipllava.types import ConfigError

log = logging.getLogger(__name__)

_PASSING: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
_MOST_WRONG: Final = 5
_POLL_S: Final = 0.05
_RESUMABLE_S: Final = 3600.0
"""How long the beginning of a file that nobody works on is kept to go on from."""
_GONE: Final = (404, 410)
_OURS: Final = re.compile(r"[0-9a-f]{16}-.+")
_PART: Final = re.compile(r"\.(.+)\.part(?:\.json)?")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._+-]")
_PLACE: Final = re.compile(r"(?P<folder>[^?#]*/)(?P<name>[^/?#]+)(?P<rest>.*)", re.DOTALL)
_IN_COMMAND: Final = re.compile(r"[A-Za-z0-9._+-]+\.(?:tar|npz)\b")
_JOIN_S: Final = 1.0


class _StoppedError(Exception):
    """The cache was closed meanwhile."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Something that takes up space: a whole file, or the beginning of one."""

    name: str
    size: int
    used_ns: int
    paths: tuple[Path, ...]

    def remove(self) -> None:
        for path in self.paths:
            path.unlink(missing_ok=True)


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
        self._ahead: _Ahead | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.directory, self.max_bytes, self.patience)

    def get(self, url: str, *, size: int | None = None) -> Path:
        """Return the path of a whole local copy; fetches it if there is none.

        Another process may make room between this call and the opening of the path: readers use
        :meth:`open`.

        Args:
            url: address.
            size: bytes the file must have, where known.

        Raises:
            MissingError: there is nothing under the address.
            CacheError: the file cannot be had, has another size, or does not fit.
        """
        self.open(url, size=size).close()
        return self.directory / cache_name(url)

    def open(self, url: str, *, size: int | None = None) -> BinaryIO:
        """Return a whole local copy, open for reading; it stays readable whatever is removed.

        Args:
            url: address.
            size: bytes the file must have, where known.

        Raises:
            MissingError: there is nothing under the address.
            CacheError: the file cannot be had, has another size, or does not fit.
        """
        return self._fetch(url, size, threading.Event())

    def prefetch(self, urls: Sequence[str]) -> None:
        """Fetch files ahead, one after the other, on a thread of this process; returns at once.

        Replaces what an earlier call has not begun. Ends after files of half the cache's size, so
        that they do not drive each other out. What fails is logged and left to :meth:`open`, which
        tries again and raises.
        """
        if self._ahead is None or self._ahead.pid != os.getpid():  # a fork leaves threads behind
            self._ahead = _Ahead(self._bring_ahead, self.max_bytes // 2)
        self._ahead.replace(urls)

    def discard(self, url: str) -> None:
        """Remove the local copy, e.g. because it turned out to be damaged; the next use fetches it.

        Raises:
            CacheError: the folder cannot be written.
        """
        try:
            (self.directory / cache_name(url)).unlink(missing_ok=True)
        except OSError as error:
            raise self._disk_error(url, error) from error

    def close(self) -> None:
        """Stop prefetching; the cache can be used again afterwards.

        Does not wait for a silent server: the thread then ends by itself later.
        """
        if self._ahead is not None and self._ahead.pid == os.getpid():
            self._ahead.close()
        self._ahead = None

    # The way of one file.

    def _bring_ahead(self, url: str, stop: threading.Event) -> int:
        with self._fetch(url, None, stop) as file:
            return os.fstat(file.fileno()).st_size

    def _fetch(self, url: str, size: int | None, stop: threading.Event) -> BinaryIO:
        name = cache_name(url)
        trial = Trial(self.patience)
        while True:
            try:
                file = self._open_held(name, size)
                if file is not None:
                    return file
                self._incoming.mkdir(parents=True, exist_ok=True)
                self._locks.mkdir(exist_ok=True)
                with self._turn(url, name, trial, stop):
                    # Whoever held the lock before may have brought it.
                    return self._open_held(name, size) or self._bring(url, name, size, trial, stop)
            except OSError as error:
                # Others may free a full disk meanwhile; a folder that cannot be is none later on.
                pause_s = trial.pause_after_failure() if error.errno in _PASSING else None
                if pause_s is None:
                    raise self._disk_error(url, error, trial) from error
                log.warning("%s: %s; trying again in %.0f s", url, error, pause_s)
                if stop.wait(pause_s):
                    raise _StoppedError from error

    @contextmanager
    def _turn(self, url: str, name: str, trial: Trial, stop: threading.Event) -> Generator[None]:
        """Hold the lock of a file; waits for who holds it as long as that one gets on."""
        path = self._lock_of(name)
        while True:
            with _locked(path, wait=False) as mine:
                if mine:
                    yield
                    return
            for part in (name, f".{name}.part"):
                with suppress(FileNotFoundError):
                    trial.moved_to((self._incoming / part).stat().st_size)
            if trial.left_s == 0:
                raise CacheError(
                    f"{url}: given up after {self.patience.total_s:.0f} s of waiting for another "
                    f"process that holds {path} and does not get on with it: see what that one "
                    "does, end it, and start again"
                )
            if stop.wait(_POLL_S):
                raise _StoppedError

    def _open_held(self, name: str, size: int | None) -> BinaryIO | None:
        """Open a whole file and mark it as used; None if it is not there in that size."""
        try:
            file = (self.directory / name).open("rb")
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(file.fileno()).st_size != size:
            file.close()
            return None
        with suppress(PermissionError):  # another user's file
            os.utime(file.fileno(), ns=(time.time_ns(), time.time_ns()))
        return file

    def _bring(
        self, url: str, name: str, size: int | None, trial: Trial, stop: threading.Event
    ) -> BinaryIO:
        """Fetch a file whose lock is held, make room for it, name it and open it."""
        self._check_fits(url, size or 0)
        with _locked(self._directory_lock):
            self._make_room(size or 0)
        staged = self._incoming / name
        try:
            received = self._transfer_patiently(url, staged, size, trial, stop)
            self._check_fits(url, received)
            with _locked(self._directory_lock):
                self._make_room(received)
                os.utime(staged, ns=(time.time_ns(), time.time_ns()))
                staged.replace(self.directory / name)
                # Opened under the lock: nobody makes room in between.
                return (self.directory / name).open("rb")
        except DiskError as error:
            self._drop(name)
            cause = error.__cause__
            assert isinstance(cause, OSError)
            raise cause from None
        except RefusedError as error:
            raise self._refusal(url, error) from error
        except DownloadError as error:  # what came is kept to go on from
            raise CacheError(f"{error} (into the shard cache {self.directory})") from error
        except (CacheError, OSError):
            self._drop(name)
            raise

    def _transfer_patiently(
        self, url: str, staged: Path, size: int | None, trial: Trial, stop: threading.Event
    ) -> int:
        """Fetch a file into ``staged``; returns its bytes."""

        def on_progress(received: int, total: int | None) -> None:
            if stop.is_set():
                raise _StoppedError
            self._check_fits(url, max(received, total or 0))
            if size is not None and total not in (None, size):
                raise WrongError(f"{total} bytes were announced where {size} were expected")

        num_wrong = 0
        while True:
            try:
                received = transfer(url, staged, trial, on_progress)
                if received == 0:
                    raise WrongError("nothing came")
                if size not in (None, received):
                    raise WrongError(f"{received} bytes came where {size} were expected")
            except BrokenError as error:
                self._drop(staged.name)
                num_wrong += isinstance(error, WrongError)
                pause_s = trial.pause_after_failure()
                if pause_s is None or num_wrong == _MOST_WRONG:
                    raise CacheError(
                        f"{url}: given up after {trial}; the last one: {error}. Check "
                        "address and network, and that the file there is the one that its index "
                        "or manifest describes"
                    ) from error
                log.warning("%s: %s; trying again in %.0f s", url, error, pause_s)
                if stop.wait(pause_s):
                    raise _StoppedError from error
            else:
                return received

    # Room.

    def _check_fits(self, url: str, size: int) -> None:
        if size > self.max_bytes:
            raise CacheError(
                f"{url} has {size} bytes or more, the shard cache {self.directory} may hold "
                f"{self.max_bytes}: allow it more (several tars, better some dozens)"
            )

    def _make_room(self, needed: int) -> None:
        """Remove beginnings that nobody continues, then what was used longest ago."""
        whole, parts = self._whole(), self._parts()
        total = sum(held.size for held in (*whole, *parts))
        outdated_ns = time.time_ns() - int(_RESUMABLE_S * 1e9)
        for part in sorted(parts, key=lambda held: held.used_ns):
            if total + needed > self.max_bytes or part.used_ns < outdated_ns:
                with _locked(self._lock_of(part.name), wait=False) as nobody_works:
                    if nobody_works:
                        part.remove()
                        self._lock_of(part.name).unlink(missing_ok=True)
                total -= part.size  # gone, or under way: then it comes on top
        for file in sorted(whole, key=lambda held: held.used_ns):
            if total + needed <= self.max_bytes:
                break
            self._remove(file)
            total -= file.size

    def _remove(self, file: _Held) -> None:
        file.remove()
        with _locked(self._lock_of(file.name), wait=False) as nobody_works:
            if nobody_works:
                self._lock_of(file.name).unlink(missing_ok=True)

    def _whole(self) -> list[_Held]:
        """The whole files; what is not ours is not counted."""
        files: list[_Held] = []
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):
                if _OURS.fullmatch(path.name):
                    stat = path.stat()
                    files.append(_Held(path.name, stat.st_size, stat.st_mtime_ns, (path,)))
        return files

    def _parts(self) -> list[_Held]:
        """What lies in ``.incoming``, file by file."""
        paths: dict[str, list[Path]] = {}
        for path in self._incoming.iterdir():
            match = _PART.fullmatch(path.name)
            paths.setdefault(match[1] if match else path.name, []).append(path)
        parts: list[_Held] = []
        for name, found in paths.items():
            with suppress(FileNotFoundError):  # it has just become whole
                stats = [path.stat() for path in found]
                used_ns = max(stat.st_mtime_ns for stat in stats)
                parts.append(_Held(name, sum(s.st_size for s in stats), used_ns, tuple(found)))
        return parts

    def _drop(self, name: str) -> None:
        for part in (name, f".{name}.part", f".{name}.part.json"):
            (self._incoming / part).unlink(missing_ok=True)

    @property
    def _incoming(self) -> Path:
        return self.directory / ".incoming"

    @property
    def _locks(self) -> Path:
        return self.directory / ".locks"

    @property
    def _directory_lock(self) -> Path:
        return self.directory / ".lock"

    def _lock_of(self, name: str) -> Path:
        return self._locks / name

    # Errors.

    def _refusal(self, url: str, error: RefusedError) -> CacheError:
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

    def _disk_error(self, url: str, error: OSError, trial: Trial | None = None) -> CacheError:
        tried = f" ({trial})" if trial is not None and trial.num_failed else ""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return CacheError(
                f"{url}: the shard cache {self.directory} cannot be used{tried}: {error}. It takes "
                "a folder that this user may write, on a disk that knows file locks"
            )
        free, held = "?", "?"
        with suppress(OSError):
            free = str(shutil.disk_usage(self.directory).free)
            held = str(sum(file.size for file in self._whole()))
        return CacheError(
            f"{url}: no space left for it in the shard cache {self.directory}{tried}: {free} bytes "
            f"are free, the cache holds {held} of at most {self.max_bytes}. Free some space there, "
            "allow the cache less, or put it on another disk. Nothing partial was left"
        )


class _Ahead:
    """A queue of addresses and the thread that works it off; the thread ends when it is empty."""

    def __init__(self, bring: Callable[[str, threading.Event], int], max_bytes: int) -> None:
        self.pid = os.getpid()
        self._bring = bring
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._waiting: deque[str] = deque()
        self._bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def replace(self, urls: Sequence[str]) -> None:
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

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._stop.is_set() or not self._waiting or self._bytes >= self._max_bytes:
                    self._thread = None
                    return
                url = self._waiting.popleft()
            try:
                size = self._bring(url, self._stop)
            except _StoppedError:
                continue
            except CacheError as error:
                log.warning("prefetch: %s", error)
                continue
            except Exception:  # the thread goes on, and who needs the file says what is wrong
                log.warning("prefetch: %s could not be fetched", url, exc_info=True)
                continue
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


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Generator[bool]:
    """Hold the lock of a file; without ``wait`` it may be refused, which the value tells."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
        except BlockingIOError:
            os.close(descriptor)
            yield False
            return
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a lock that was removed while we waited for it
    try:
        yield True
    finally:
        # Closing alone would not do while a process forked meanwhile has the descriptor, too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
