"""Pictures that are published one by one (OCR-VQA), ending as real JPEG files.

The published way saves each picture under the extension of its address and then renames all to
``.jpg``; some of those are GIF or PNG inside, some are error pages. Here the content decides: what
is no JPEG is decoded and encoded anew, what cannot be decoded is no picture.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from vipllava.files.atomic import new_file
from vipllava.files.download import DiskError, DownloadError, disk_error, download
from vipllava.files.pools import run_threads
from vipllava.files.retries import Patience
from vipllava.records.image_decode import decode_image
from vipllava.shards.sources import PictureList
from vipllava.types import RecordError, VipLlavaError

_JPEG_START: Final = b"\xff\xd8\xff"
_EXTENSIONS: Final = frozenset({".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ""})
_QUALITY: Final = 95
_BRIEF: Final = Patience(max_attempts=3, timeout_s=30)
_SAFE: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class PictureListError(VipLlavaError):
    """The list of pictures is missing or is none."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A picture that could not be had.

    Attributes:
        name: its id, or its file name where it was present already.
        address: where it was looked for; None if it was present.
        reason: what went wrong.
    """

    name: str
    address: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class PictureOutcome:
    """What became of a list.

    Attributes:
        num_listed: entries of the list.
        num_present: pictures that were there before.
        num_fetched: pictures downloaded now.
        num_converted: of both, those that were no JPEG and are now.
        failures: the rest.
    """

    num_listed: int
    num_present: int
    num_fetched: int
    num_converted: int
    failures: tuple[Failure, ...]


def fetch_pictures(
    pictures: PictureList,
    data_root: Path,
    *,
    num_workers: int = 8,
    patience: Patience = _BRIEF,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> PictureOutcome:
    """Download what is not there, and make a real ``ID.jpg`` of everything.

    Pictures of an earlier run stay; pictures that somebody else's script left as ``ID.gif`` and the
    like, or as a ``.jpg`` that is none, are converted.

    Args:
        pictures: the list and where its pictures go.
        data_root: folder that its paths are relative to.
        num_workers: downloads at a time.
        patience: bounds on each.
        on_progress: told the number of pictures done and in all.

    Raises:
        PictureListError: the list is missing or has no addresses.
        DiskError: the folder cannot be written; other faults are in the outcome.
    """
    listed = read_picture_list(data_root / pictures.file, pictures.url_field)
    into = data_root / pictures.into
    try:
        into.mkdir(parents=True, exist_ok=True)
        converted, unreadable = make_jpegs(into)
        present = {path.stem for path in into.glob("*.jpg")}
        present -= {Path(failure.name).stem for failure in unreadable}
        wanted = {key: url for key, url in listed if key not in present}
        failures = [bad for bad in unreadable if Path(bad.name).stem not in wanted]
        done, fetched = len(listed) - len(wanted), 0
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=into) as scratch:

            def fetch(item: tuple[str, str]) -> bool | Failure:
                return _fetch_one(*item, Path(scratch), into, patience)

            for result in run_threads(fetch, wanted.items(), num_workers):
                done += 1
                if isinstance(result, Failure):
                    failures.append(result)
                else:
                    fetched += 1
                    converted += result
                if on_progress is not None:
                    on_progress(done, len(listed))
    except OSError as error:
        raise disk_error(error, pictures.file, into) from error
    failures.sort(key=lambda failure: failure.name)
    return PictureOutcome(
        len(listed), len(listed) - len(wanted), fetched, converted, tuple(failures)
    )


def read_picture_list(path: Path, url_field: str) -> list[tuple[str, str]]:
    """Read ids and addresses, in the list's order.

    Raises:
        PictureListError: the file is missing, no JSON object, or an entry is not usable.
    """
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PictureListError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PictureListError(f"{path} is not JSON ({error}); get it again") from error
    if not isinstance(raw, dict):
        raise PictureListError(f"{path} holds {type(raw).__name__}; expected an object of pictures")
    items: list[tuple[str, str]] = []
    for key, entry in cast("dict[str, Any]", raw).items():
        url = cast("Mapping[str, Any]", entry).get(url_field) if isinstance(entry, dict) else None
        if not isinstance(url, str) or not _SAFE.fullmatch(key):
            raise PictureListError(
                f"{path}: entry `{key}` has {url_field} {url!r}; expected an address, and an id of "
                "letters, digits, `.`, `_` and `-`"
            )
        items.append((key, url))
    return items


def make_jpegs(folder: Path) -> tuple[int, list[Failure]]:
    """Convert every picture of a folder that is not a JPEG called ``.jpg``.

    Returns:
        The number of converted pictures, and those that cannot be decoded; these stay as they are.
    """
    converted, failures = 0, list[Failure]()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in _EXTENSIONS:
            continue
        if not path.is_file():
            continue
        with path.open("rb") as file:
            real = file.read(len(_JPEG_START)) == _JPEG_START
        target = path.with_suffix(".jpg")
        if real and path == target:
            continue
        try:
            _store(path.read_bytes(), target, path.name)
        except RecordError as error:
            failures.append(Failure(path.name, None, str(error)))
            continue
        if path != target:
            path.unlink()
        converted += not real
    return converted, failures


def _fetch_one(key: str, url: str, scratch: Path, into: Path, patience: Patience) -> bool | Failure:
    raw = scratch / key
    try:
        download(url, raw, patience=patience)
        return _store(raw.read_bytes(), into / f"{key}.jpg", key)
    except DiskError:
        raise
    except (DownloadError, RecordError) as error:
        return Failure(key, url, str(error))
    finally:
        raw.unlink(missing_ok=True)


def _store(data: bytes, target: Path, name: str) -> bool:
    """Write a picture as JPEG; returns whether it had to be encoded anew."""
    picture = decode_image(data, name)
    converted = not data.startswith(_JPEG_START)
    if converted:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
        data = buffer.getvalue()
    with new_file(target) as unfinished:
        unfinished.write_bytes(data)
    return converted
