"""Images that are published one by one (OCR-VQA), ending as real JPEG files.

The published way renames all to ``.jpg``, GIF, PNG and error pages included. Here the content
decides: what is no JPEG is encoded anew, what cannot be decoded is no image.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from vipllava.files.atomic import new_file
from vipllava.files.download import DiskError, DownloadError, disk_error, download
from vipllava.files.pools import run_threads
from vipllava.files.retries import Patience
from vipllava.ingest.image_format import format_of
from vipllava.records.image_decode import decode_image
from vipllava.records.json_values import parse_json
from vipllava.shards.sources import ImageList
from vipllava.types import RecordError, VipLlavaError

_EXTENSIONS: Final = frozenset({".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ""})
_QUALITY: Final = 95
_BRIEF: Final = Patience(max_attempts=3, timeout_s=30)
_SAFE: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")  # of a name's 255 letters


class ImageListError(VipLlavaError):
    """The list of images is missing, or is not such a list."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that could not be had."""

    name: str  # its id, or its file name where it was present already
    address: str | None  # where it was looked for; None if it was present
    reason: str  # what went wrong


@dataclass(frozen=True, slots=True)
class ImageListOutcome:
    """What became of a list."""

    num_listed: int
    num_converted: int  # images, present before or fetched now, that were no JPEG and are now
    failures: tuple[Failure, ...]  # by name


def fetch_images(
    images: ImageList,
    data_root: Path,
    *,
    num_workers: int = 8,
    patience: Patience = _BRIEF,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> ImageListOutcome:
    """Download what is not there, and make a real ``ID.jpg`` of that and of all that is there.

    Args:
        images: the list and where its images go, relative to ``data_root``.
        num_workers: downloads at a time.
        on_progress: told the number of images done and in all.

    Raises:
        ImageListError: the list is missing or has no addresses.
        DiskError: the folder cannot be written; other faults are in the outcome.
    """
    listed = read_image_list(data_root / images.file, images.url_field)
    into = data_root / images.into
    try:
        into.mkdir(parents=True, exist_ok=True)
        converted, unreadable = make_jpegs(into)
        present = {path.stem for path in into.glob("*.jpg")}
        present -= {Path(failure.name).stem for failure in unreadable}
        wanted = {key: url for key, url in listed.items() if key not in present}
        failures = [bad for bad in unreadable if Path(bad.name).stem not in wanted]
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=into) as scratch:

            def fetch(item: tuple[str, str]) -> bool | Failure:
                key, url = item
                raw = Path(scratch) / key
                try:
                    download(url, raw, patience=patience)
                    return _store(raw.read_bytes(), into / f"{key}.jpg", key)
                except DiskError:
                    raise
                except (DownloadError, RecordError) as error:
                    return Failure(key, url, str(error))
                finally:
                    raw.unlink(missing_ok=True)

            results = run_threads(fetch, wanted.items(), num_workers)
            for done, result in enumerate(results, start=len(listed) - len(wanted) + 1):
                if isinstance(result, Failure):
                    failures.append(result)
                else:
                    converted += result
                if on_progress is not None:
                    on_progress(done, len(listed))
    except OSError as error:
        raise disk_error(error, images.file, into) from error
    failures.sort(key=lambda failure: failure.name)
    return ImageListOutcome(len(listed), converted, tuple(failures))


def read_image_list(path: Path, url_field: str) -> dict[str, str]:
    """Read ids and addresses, in the list's order.

    Raises:
        ImageListError: the file is missing, no JSON object, or an entry is not usable.
    """
    try:
        raw: Any = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImageListError(f"{path} cannot be read as JSON ({error}); get it again") from error
    if not isinstance(raw, dict):
        raise ImageListError(f"{path} holds {type(raw).__name__}; expected an object of images")
    urls: dict[str, str] = {}
    for key, entry in cast("dict[str, Any]", raw).items():
        url = cast("dict[str, Any]", entry).get(url_field) if isinstance(entry, dict) else None
        if not isinstance(url, str) or not _SAFE.fullmatch(key):
            raise ImageListError(
                f"{path}: entry `{key}` has {url_field} {url!r}; expected an address, and an id of "
                "at most 200 letters, digits, `.`, `_` and `-`"
            )
        urls[key] = url
    return urls


def make_jpegs(folder: Path) -> tuple[int, list[Failure]]:
    """Convert every image of a folder that is not a JPEG called ``.jpg``.

    Returns:
        The number of converted images, and those that cannot be decoded; these stay as they are.
    """
    num_converted, failures = 0, list[Failure]()
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".")
        if hidden or path.suffix.lower() not in _EXTENSIONS or not path.is_file():
            continue
        target = path.with_suffix(".jpg")
        with path.open("rb") as file:
            if path == target and format_of(file.read(16)) == "jpg":
                continue
        try:
            num_converted += _store(path.read_bytes(), target, path.name)
        except RecordError as error:
            failures.append(Failure(path.name, None, str(error)))
            continue
        if path != target:
            path.unlink()
    return num_converted, failures


def _store(data: bytes, target: Path, name: str) -> bool:
    """Write an image as JPEG; returns whether it had to be encoded anew."""
    image = decode_image(data, name)
    converted = format_of(data) != "jpg"
    if converted:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
        data = buffer.getvalue()
    with new_file(target) as unfinished:
        unfinished.write_bytes(data)
    return converted
