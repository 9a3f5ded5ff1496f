"""The bytes of one address, whatever its scheme, in one attempt.

http and https go through :mod:`vipllava.files.download`, ``pipe:COMMAND`` through a shell, every
other scheme (s3, gs, ...) through fsspec.
"""

from __future__ import annotations

import os
import queue
import select
import subprocess
import threading
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

from vipllava.files.download import PartialFile, Progress
from vipllava.files.retries import BrokenError, Trial
from vipllava.types import StorageError

_CHUNK: Final = 4 << 20
_POLL_S: Final = 1.0


class CacheError(StorageError):
    """A file cannot be brought into the cache; the message names address, cause and remedy."""


class MissingError(CacheError):
    """There is nothing under the address."""


def transfer(url: str, path: Path, trial: Trial, on_progress: Progress) -> int:
    """Make one attempt to fetch a file; returns its bytes.

    What an attempt over http leaves in ``path``, the next one continues. What ``on_progress``
    raises ends the attempt.

    Raises:
        BrokenError: this attempt failed; the next one may not.
        CacheError, RefusedError: there is no use in another one.
        OSError: the local disk failed.
    """
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https"):
        return PartialFile(url, path, on_progress=on_progress).fetch(trial)
    trial.begin()
    received = 0
    try:
        chunks = _read_pipe(url, trial) if scheme == "pipe" else _read_fsspec(url, trial)
        with closing(chunks), path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                received += len(chunk)
                on_progress(received, None)
                trial.check(received)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return received


def _read_pipe(url: str, trial: Trial) -> Generator[bytes]:
    """Yield what a command prints; it has to end with status 0."""
    command = url.partition(":")[2]
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        printed = process.stdout.fileno()
        try:
            while True:
                timeout_s = trial.timeout_s
                if not select.select([printed], [], [], timeout_s)[0]:
                    raise BrokenError(f"the command printed nothing for {timeout_s:.3g} seconds")
                if not (chunk := os.read(printed, _CHUNK)):
                    break
                yield chunk
            if (status := process.wait(trial.timeout_s)) != 0:
                raise BrokenError(f"the command ended with status {status}; see what it printed")
        except subprocess.TimeoutExpired as error:
            raise BrokenError(
                f"the command does not end {error.timeout:.3g} seconds after its output"
            ) from error
        finally:
            process.kill()  # no harm if it has ended


def _read_fsspec(url: str, trial: Trial) -> Generator[bytes]:
    """Yield a file of any storage that fsspec knows.

    A thread reads: packages of storages have time limits of their own, or none.
    """
    handed: queue.Queue[bytes | Exception] = queue.Queue(maxsize=1)
    closed = threading.Event()

    def hand(piece: bytes | Exception) -> bool:
        while not closed.is_set():
            with suppress(queue.Full):
                handed.put(piece, timeout=_POLL_S)
                return True
        return False

    def read() -> None:
        try:
            import fsspec  # pyright: ignore[reportMissingTypeStubs]

            library: Any = fsspec
            with library.open(url, "rb") as file:
                while hand(chunk := file.read(_CHUNK)) and chunk:
                    pass
        except Exception as error:  # noqa: BLE001 - storages have errors of their own
            hand(error)

    threading.Thread(target=read, name="fsspec-reader", daemon=True).start()
    try:
        while True:
            timeout_s = trial.timeout_s
            try:
                piece = handed.get(timeout=timeout_s)
            except queue.Empty:
                raise BrokenError(f"the storage sent nothing for {timeout_s:.3g} seconds") from None
            if isinstance(piece, Exception):
                raise _storage_error(url, piece) from piece
            if not piece:
                return
            yield piece
    finally:
        closed.set()


def _storage_error(url: str, error: Exception) -> Exception:
    if isinstance(error, FileNotFoundError):
        return MissingError(
            f"{url}: there is nothing under this address (1 attempt); correct `shards` in the "
            "manifest, or the data root"
        )
    if isinstance(error, (ImportError, PermissionError, ValueError)):
        return CacheError(
            f"{url}: {error} (1 attempt). s3 needs `pip install 'vipllava-lightning[s3]'`, gs "
            "`[gs]`, others the package of their scheme, and credentials where that package looks "
            "for them"
        )
    return BrokenError(str(error) or type(error).__name__)
