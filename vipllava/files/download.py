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
from typing import Any, Final, NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

from vipllava import __version__
from vipllava.files.atomic import move
from vipllava.files.retries import PATIENT, BrokenError, GivenUpError, Patience, Trial, retry
from vipllava.types import StorageError

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes present and the bytes in all, None while unknown."""

_CHUNK: Final = 1 << 20
_TEMPORARY: Final = (408, 425, 429, 500, 502, 503, 504)
_KEPT: Final = "%/:=&?~#+!$,;'@()*[]"
"""What has a meaning in an address, or stands there escaped already."""
_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class DownloadError(StorageError):
    """A file could not be fetched; the message names address, cause and remedy."""


class RefusedError(DownloadError):
    """The server answered that it will not send the file, with an HTTP status and a reason."""

    def __init__(self, message: str, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class DiskError(DownloadError):
    """The place a download was meant for cannot take it."""


class _StaleError(BrokenError):
    """The bytes so far are of another file than the server has now."""


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
    on_progress: Progress | None = None,
) -> int:
    """Download one file.

    Args:
        target: final path; its folder is made. Replaced only by a whole, checked file.
        size: bytes it must have.
        md5, sha256: hex digests it must have.
        immutable: whether the address always has the same bytes, as a commit of a repository has;
            then a partial file is continued without the server's word.
        headers: further headers, e.g. of a login; not passed on when the server redirects.
        patience: bounds on waiting and trying.
        on_progress: told about every megabyte or so.

    Returns:
        The file's bytes.

    Raises:
        RefusedError: the server will not send the file.
        DownloadError: the server keeps failing or sends another file than stated. What came so far
            stays in the partial file where it can be used again.
        DiskError: the disk is full or cannot be written.
    """
    _as_sent(url)
    path = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = PartialFile(url, path, size, immutable, headers, on_progress)
        trial = Trial(patience, part.num_bytes)
        # One of thousands of images: only the end of the attempts is worth a warning.
        received = retry(partial(part.fetch, trial), trial, url, level=logging.INFO)
        part.check({"md5": md5, "sha256": sha256})
        move(path, target)
        part.note.unlink(missing_ok=True)
    except GivenUpError as error:
        kept = path.stat().st_size if path.exists() else 0
        remedy = (
            f"{kept} bytes are kept in {path}: run the same command again to go on"
            if kept
            else "Check the address and the network, then run the same command again"
        )
        raise DownloadError(f"{error}. {remedy}") from error
    except OSError as error:
        raise disk_error(error, url, target) from error
    return received


@dataclass
class PartialFile:
    """A file under way; takes up what an earlier call left, and drops what is doubtful of it."""

    url: str
    path: Path  # of the bytes so far; beside it lies a note of what they belong to
    size: int | None = None
    immutable: bool = False
    headers: Mapping[str, str] | None = None
    on_progress: Progress | None = None
    _validator: str | None = field(default=None, init=False)
    _total: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        try:
            known: Any = json.loads(self.note.read_text(encoding="utf-8"))
            if known["url"] != self.url or not (self.immutable or known["validator"]):
                raise ValueError("of another file")
            self._validator, self._total = known["validator"], known["total"]
        except (OSError, ValueError, LookupError, TypeError):
            self.drop()

    @property
    def note(self) -> Path:
        """Where it is written what the bytes belong to."""
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def num_bytes(self) -> int:
        """The bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def drop(self) -> None:
        """Remove what came so far."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self._validator = self._total = None

    def fetch(self, trial: Trial) -> int:
        """Make one attempt at the rest; returns the file's bytes, all that the server announced.

        Raises:
            BrokenError: this attempt failed; the next one may not.
            RefusedError: the server will not send the file.
            DownloadError: it has another size than stated.
            OSError: the disk is full or cannot be written.
        """
        try:
            self._fetch(trial)
        except BrokenError as error:
            error.size = self.num_bytes  # a shaky line may break often, if the file grows
            if isinstance(error, _StaleError):
                self.drop()
            raise
        return self.num_bytes

    def check(self, digests: Mapping[str, str | None]) -> None:
        """Compare the whole file with what is known of it; what differs is of no use later."""
        received = self.num_bytes
        wrong = None
        if self.size not in (None, received):
            wrong = f"it has {received} bytes, the manifest says {self.size}"
        for name, expected in digests.items():
            if expected is None or wrong is not None:
                continue
            create = partial(hashlib.new, name, usedforsecurity=False)
            with self.path.open("rb") as file:
                found = hashlib.file_digest(file, create).hexdigest()
            if found != expected:
                wrong = f"its {name} is {found}, the manifest says {expected}"
        if wrong is not None:
            self.drop()
            raise DownloadError(
                f"{self.url}: what came is not the file that was meant ({wrong}); it was "
                "discarded. Run the same command again; if this stays so, check the address and "
                "the manifest"
            )

    def _fetch(self, trial: Trial) -> None:
        start = self.num_bytes
        if start and self._total is not None and start >= self._total:
            if start == self._total:
                return
            raise _StaleError(f"the partial file has {start} bytes, the server said {self._total}")
        headers = {"User-Agent": f"vipllava/{__version__}", "Accept-Encoding": "identity"}
        if start and (self.immutable or self._validator is not None):
            headers["Range"] = f"bytes={start}-"
            if not self.immutable:
                headers["If-Range"] = self._validator or ""
        trial.begin()
        request = urllib.request.Request(_as_sent(self.url), headers=headers)
        for name, value in (self.headers or {}).items():
            request.add_unredirected_header(name, value)
        try:
            response = urllib.request.urlopen(request, timeout=trial.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error)
        except (OSError, http.client.HTTPException) as error:
            raise BrokenError(_reason(error)) from error
        with response:
            self._receive(response, self._begin(response, start), trial)

    def _begin(self, response: http.client.HTTPResponse, start: int) -> int:
        """Read the headers; return where the body belongs."""
        headers = response.headers
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            match = _RANGE.match(headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start:
                got = headers.get("Content-Range")
                raise _StaleError(f"asked for bytes from {start}, got {got!r}")
            total = self._total if match[2] == "*" else int(match[2])
            if self._total not in (None, total):
                raise _StaleError(f"the file had {self._total} bytes and has {total} now")
        else:  # the whole file, whether it was asked for or has changed
            length = headers.get("Content-Length", "")
            start, total = 0, int(length) if length.isdigit() else None
            self.path.unlink(missing_ok=True)
        if total is not None and self.size not in (None, total):
            self.drop()
            raise DownloadError(
                f"{self.url} has {total} bytes, the manifest says {self.size}: the publisher has "
                "changed the file, or the manifest is wrong. Check the address in a browser and "
                "correct `size` and the checksums"
            )
        self._total = total
        etag = headers.get("ETag", "")
        weak = not etag or etag.startswith("W/")
        self._validator = (headers.get("Last-Modified") if weak else etag) or None
        note = {"url": self.url, "validator": self._validator, "total": total}
        self.note.write_text(json.dumps(note), encoding="utf-8")
        rest, free = (total or 0) - start, shutil.disk_usage(self.path.parent).free
        if free < rest:
            raise OSError(errno.ENOSPC, f"{rest} bytes are to come, {free} are free")
        return start

    def _receive(self, response: http.client.HTTPResponse, received: int, trial: Trial) -> None:
        with self.path.open("r+b" if received else "wb") as file:
            file.seek(received)
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
                if self.on_progress is not None:
                    self.on_progress(received, self._total)
                trial.check(received)
            os.fsync(file.fileno())
        if self._total is not None and received < self._total:
            raise BrokenError(f"the connection ended after {received} of {self._total} bytes")
        if self._total is not None and received > self._total:
            raise _StaleError(f"{received} bytes came where {self._total} were announced")

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _StaleError("the server no longer has a file of that length")
        message = f"the server answered {error.code} {error.reason}"
        if error.code in _TEMPORARY:
            after = error.headers.get("Retry-After", "")
            raise BrokenError(message, pause_s=float(after) if after.isdigit() else 0.0)
        remedy = "check the address in a browser"
        if error.code in (401, 403):
            remedy = "it wants a login or denies access: get the file with a browser"
        elif error.code in (404, 410):
            remedy = "the file has moved or is gone: correct the address in the manifest's sources"
        text = f"{self.url}: {message}; {remedy}"
        raise RefusedError(text, error.code, error.reason) from error


def _as_sent(url: str) -> str:
    """Return an address in ASCII: the host as IDNA, letters and spaces behind it in per cent.

    One that is ASCII stays as it is.
    """
    reason = ""
    try:
        parts = urlsplit(url)
        user, at, place = parts.netloc.rpartition("@")
        host, colon, port = place.partition(":")
        if not host.isascii():
            host = host.encode("idna").decode()
        if parts.scheme in ("http", "https"):
            if re.fullmatch("[!-~]+", url):
                return url
            netloc = f"{quote(user, _KEPT)}{at}{host}{colon}{port}"
            rest = (quote(part, _KEPT) for part in parts[2:])
            return urlunsplit((parts.scheme, netloc, *rest))
    except ValueError as error:  # Unicode's, or a bracket too few
        reason = f" ({error})"
    shown = url.encode(errors="backslashreplace").decode()
    raise DownloadError(f"{shown} is no http or https address{reason}; correct it")


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
