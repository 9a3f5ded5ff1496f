"""The bytes of one address, whatever its scheme, in one attempt.

http and https go through :mod:`vipllava.files.download`, ``pipe:COMMAND`` through the opener of
webdataset, every other scheme (s3, gs, ...) through fsspec.
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

from vipllava.files.atomic import move
from vipllava.files.download import Progress, download
from vipllava.files.retries import BrokenError, Trial
from vipllava.types import StorageError

_CHUNK: Final = 4 << 20
_POLL_S: Final = 1.0


class CacheError(StorageError):
    """A file cannot be brought into the cache; the message names address, cause and remedy."""


class MissingError(CacheError):
    """There is nothing under the address."""


class WrongError(Exception):
    """A whole answer came, and it is not the file that is expected; more attempts rarely help."""


def transfer(url: str, staged: Path, trial: Trial, on_progress: Progress) -> int:
    """Fetch a file into ``staged``.

    Args:
        url: address.
        staged: path of the whole file.
        trial: the attempts at this file; http makes all that are left, others one.
        on_progress: told the bytes so far and in all; what it raises ends the attempt.

    Returns:
        The file's bytes.

    Raises:
        BrokenError: this attempt failed; the next one may not.
        CacheError: there is no use in another one.
        DownloadError: every attempt failed, or the disk did.
        OSError: the local disk failed.
    """
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https"):
        return download(url, staged, trial=trial, on_progress=on_progress)
    part = staged.with_name(f".{staged.name}.part")
    trial.begin()
    chunks = _read_pipe(url, trial) if scheme == "pipe" else _read_fsspec(url, trial)
    received = 0
    with closing(chunks), part.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            received += len(chunk)
            on_progress(received, None)
            trial.moved_to(received)
            if trial.overdue:
                raise BrokenError(f"only {received} bytes came in the time that it is tried")
        file.flush()
        os.fsync(file.fileno())
    move(part, staged)
    return received


def _read_pipe(url: str, trial: Trial) -> Generator[bytes]:
    """Yield what a command prints; it has to end with status 0."""
    from webdataset.gopen import gopen

    try:
        pipe: Any = gopen(url, "rb")
    except OSError as error:
        raise BrokenError(f"the command cannot be started: {error}") from error
    timeout_s = trial.timeout_s
    try:
        while True:
            timeout_s = trial.timeout_s
            if not select.select([pipe.stream], [], [], timeout_s)[0]:
                raise BrokenError(f"the command printed nothing for {timeout_s:.3g} seconds")
            # read1 goes past the buffer, of which select knows nothing.
            chunk: bytes = pipe.stream.read1(_CHUNK)
            if not chunk:
                break
            yield chunk
        # gopen's own check takes a command killed by a closed pipe for success.
        status = pipe.proc.wait(timeout_s)
        if status != 0:
            raise BrokenError(f"the command ended with status {status}; see what it printed")
    except subprocess.TimeoutExpired as error:
        raise BrokenError(
            f"the command does not end {timeout_s:.3g} seconds after its output"
        ) from error
    finally:
        pipe.proc.kill()  # no harm if it has ended
        with suppress(OSError):
            pipe.close()


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
