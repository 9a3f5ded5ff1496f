"""One file over HTTP: resumed where it broke, checked, and only then under its final name.

Beside the target ``NAME`` lie, while it is under way, ``.NAME.part`` with the bytes so far and
``.NAME.part.json`` with what they belong to. A later call goes on from there if the server vouches
that the file is still the same one (``If-Range``), else it starts anew.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, cast
from urllib.parse import urlsplit

from vipllava import __version__
from vipllava.files.atomic import move
from vipllava.files.retries import PATIENT, BrokenError, GivenUpError, Patience, Trial, retry
from vipllava.types import StorageError

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes present and the bytes in all, None while unknown."""

_CHUNK: Final = 1 << 20
_TEMPORARY: Final = (408, 425, 429, 500, 502, 503, 504)
_RANGE: Final = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


class DownloadError(StorageError):
    """A file could not be fetched; the message names address, cause and remedy."""


class RefusedError(DownloadError):
    """The server answered that it will not send the file.

    Attributes:
        status: its HTTP status.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class DiskError(DownloadError):
    """The place a download was meant for cannot take it."""


class _StaleError(BrokenError):
    """The bytes so far are of another file than the server has now."""


@dataclass(slots=True)
class _Partial:
    """The bytes so far and what they belong to."""

    path: Path
    url: str
    immutable: bool = False
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    validator: str | None = None
    total: int | None = None

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def load(self) -> None:
        """Take up what an earlier call left; anything doubtful is dropped."""
        try:
            raw: Any = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raw = None
        known = cast("Mapping[str, Any]", raw) if isinstance(raw, dict) else dict[str, Any]()
        validator, total = known.get("validator"), known.get("total")
        if known.get("url") == self.url and (self.immutable or isinstance(validator, str)):
            self.validator, self.total = validator, total if isinstance(total, int) else None
        else:
            self.drop()

    def save(self) -> None:
        note = {"url": self.url, "validator": self.validator, "total": self.total}
        self.note.write_text(json.dumps(note), encoding="utf-8")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.validator = self.total = None


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    md5: str | None = None,
    sha256: str | None = None,
    immutable: bool = False,
    headers: Mapping[str, str] | None = None,
    patience: Patience = PATIENT,
    trial: Trial | None = None,
    on_progress: Progress | None = None,
) -> int:
    """Download one file.

    Args:
        url: http or https.
        target: final path; its folder is made. Replaced only by a whole, checked file.
        size: bytes it must have.
        md5, sha256: hex digests it must have.
        immutable: whether the address always has the same bytes, as a commit of a repository has;
            then a partial file is continued without the server's word.
        headers: further headers, e.g. of a login; not passed on when the server redirects.
        patience: bounds on waiting and trying.
        trial: the attempts so far, instead of ``patience``, if it has been tried before.
        on_progress: told about every megabyte or so.

    Returns:
        The file's bytes.

    Raises:
        RefusedError: the server will not send the file.
        DownloadError: the server keeps failing or sends another file than stated. What came so far
            stays in the partial file where it can be used again.
        DiskError: the disk is full or cannot be written.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url} is no http or https address")
    partial_path = target.with_name(f".{target.name}.part")
    part = _Partial(partial_path, url, immutable, headers or {})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.load()
        # One of thousands of pictures, or the one that somebody waits for.
        level = logging.INFO if trial is None else logging.WARNING
        trial = trial or Trial(patience, part.size())
        retry(partial(_attempt, part, size, trial, on_progress), trial, url, level=level)
        received = part.size()
        _check(part, received, size, {"md5": md5, "sha256": sha256})
        move(part.path, target)
        part.note.unlink(missing_ok=True)
    except GivenUpError as error:
        raise DownloadError(f"{error}. {_kept(part)}") from error
    except OSError as error:
        raise disk_error(error, url, target) from error
    return received


def _kept(part: _Partial) -> str:
    size = part.size()
    return (
        f"{size} bytes are kept in {part.path}: run the same command again to go on"
        if size
        else "Check the address and the network, then run the same command again"
    )


def _attempt(part: _Partial, size: int | None, trial: Trial, on_progress: Progress | None) -> None:
    try:
        _transfer(part, size, trial, on_progress)
    except BrokenError as error:
        error.size = part.size()  # a long download over a shaky line may break often, if it moves
        if isinstance(error, _StaleError):
            part.drop()
        raise


def _transfer(part: _Partial, size: int | None, trial: Trial, on_progress: Progress | None) -> None:
    """Make one attempt; returns when every byte that the server announced is there."""
    start = part.size()
    if start and part.total is not None and start >= part.total:
        if start == part.total:
            return
        raise _StaleError(f"the partial file has {start} bytes, the server said {part.total}")
    headers = {"User-Agent": f"vipllava/{__version__}", "Accept-Encoding": "identity"}
    if start and part.immutable:
        headers["Range"] = f"bytes={start}-"
    elif start and part.validator is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": part.validator}
    trial.begin()
    request = urllib.request.Request(part.url, headers=headers)
    for name, value in part.headers.items():
        request.add_unredirected_header(name, value)
    try:
        response = urllib.request.urlopen(request, timeout=trial.timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            _refused(part, error)
    except (OSError, http.client.HTTPException) as error:
        raise BrokenError(_reason(error)) from error
    with response:
        start = _begin(part, response, start, size)
        _receive(part, response, start, trial, on_progress)


def _begin(part: _Partial, response: http.client.HTTPResponse, start: int, size: int | None) -> int:
    """Read the headers; return where the body belongs."""
    headers = response.headers
    length = headers.get("Content-Length", "")
    rest = int(length) if length.isdigit() else None
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        match = _RANGE.match(headers.get("Content-Range", ""))
        if match is None or match.group(1) is None or int(match.group(1)) != start:
            raise _StaleError(f"asked for bytes from {start}, got {headers.get('Content-Range')!r}")
        total = int(match.group(2)) if match.group(2) != "*" else None
        if total is not None and part.total not in (None, total):
            raise _StaleError(f"the file had {part.total} bytes and has {total} now")
        part.total = part.total if total is None else total
    else:  # the whole file, whether it was asked for or has changed
        start, part.total = 0, rest
        part.path.unlink(missing_ok=True)
    if part.total is not None and size not in (None, part.total):
        received = part.total
        part.drop()
        raise DownloadError(
            f"{part.url} has {received} bytes, the manifest says {size}: the publisher has changed "
            "the file, or the manifest is wrong. Check the address in a browser and correct `size` "
            "and the checksums"
        )
    etag = headers.get("ETag", "")
    weak = not etag or etag.startswith("W/")
    part.validator = (headers.get("Last-Modified") if weak else etag) or None
    part.save()
    free = shutil.disk_usage(part.path.parent).free
    if part.total is not None and free < part.total - start:
        raise OSError(errno.ENOSPC, f"{part.total - start} bytes are to come, {free} are free")
    return start


def _receive(
    part: _Partial,
    response: http.client.HTTPResponse,
    start: int,
    trial: Trial,
    on_progress: Progress | None,
) -> None:
    received = start
    with part.path.open("r+b" if start else "wb") as file:
        file.seek(start)
        while True:
            try:
                # read1 hands over what has come; read would lose it when the connection breaks.
                chunk = response.read1(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise BrokenError(f"{_reason(error)} (after {received} bytes)") from error
            if not chunk:
                break
            file.write(chunk)
            file.flush()  # so that a killed process leaves what it has got
            received += len(chunk)
            if on_progress is not None:
                on_progress(received, part.total)
            trial.moved_to(received)
            if trial.overdue:
                raise BrokenError(
                    f"too few bytes came in the time that it is tried ({received} now)"
                )
        os.fsync(file.fileno())
    if part.total is not None and received < part.total:
        raise BrokenError(f"the connection ended after {received} of {part.total} bytes")
    if part.total is not None and received > part.total:
        raise _StaleError(f"{received} bytes came where {part.total} were announced")


def _refused(part: _Partial, error: urllib.error.HTTPError) -> NoReturn:
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        raise _StaleError("the server no longer has a file of that length")
    message = f"the server answered {error.code} {error.reason}"
    if error.code in _TEMPORARY:
        after = error.headers.get("Retry-After", "")
        raise BrokenError(message, pause_s=float(after) if after.isdigit() else 0.0)
    remedy = {
        401: "it wants a login: get the file with a browser",
        403: "it denies access: get the file with a browser",
        404: "the file has moved: correct the address in the manifest's sources",
        410: "the file has been removed: correct the address in the manifest's sources",
    }.get(error.code, "check the address in a browser")
    raise RefusedError(f"{part.url}: {message}; {remedy}", error.code) from error


def _check(
    part: _Partial, received: int, size: int | None, digests: Mapping[str, str | None]
) -> None:
    """Compare the whole file with what is known of it; what differs is of no use later."""
    wrong: str | None = None
    if size is not None and received != size:
        wrong = f"it has {received} bytes, the manifest says {size}"
    for name, expected in digests.items():
        if expected is None or wrong:
            continue
        with part.path.open("rb") as file:
            digest = hashlib.file_digest(file, partial(hashlib.new, name, usedforsecurity=False))
        found = digest.hexdigest()
        if found != expected:
            wrong = f"its {name} is {found}, the manifest says {expected}"
    if wrong is None:
        return
    url = part.url
    part.drop()
    raise DownloadError(
        f"{url}: what came is not the file that was meant ({wrong}); it was discarded. Run the "
        "same command again; if this stays so, check the address and the manifest"
    )


def _reason(error: BaseException) -> str:
    cause: object = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "no byte came within the time limit"
    return str(cause) or type(cause).__name__


def disk_error(error: OSError, what: str, target: Path) -> DiskError:
    """Say why ``what`` could not be written to ``target``, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(
            f"{what}: no space left for {target} ({error.strerror}). Free some space there, or put "
            "the data root on another disk, and run the same command again: it goes on where it "
            "stopped"
        )
    return DiskError(f"{what}: cannot write {target}: {error}")
