"""Writing samples as tars with their indices."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from webdataset.writer import TarWriter

from vipllava.files.atomic import new_file
from vipllava.records.image_decode import image_size
from vipllava.shards.tar_index import (
    ShardError,
    build_index,
    index_path,
    save_index,
)
from vipllava.shards.tar_members import IMAGE_EXTENSIONS
from vipllava.types import RecordError

_KEY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_/-]*")
_LONGEST_KEY: Final = 90  # with an extension below the 100 bytes of a plain tar header


def write_shards(
    samples: Iterable[tuple[str, Mapping[str, Any], bytes | None, str | None]],
    directory: str | Path,
    *,
    prefix: str = "shard",
    max_samples: int = 1000,
    max_bytes: int = 1 << 30,
    check_images: bool = True,
) -> list[Path]:
    """Write samples as tars with their indices; returns the tars' paths, in order.

    The same samples give the same bytes (fixed times and owners). A tar appears under its final
    name only when it is whole.

    Args:
        samples: key, record, encoded image or None, the image's extension or None. A key has
            letters, digits, ``_``, ``-`` and ``/`` only: WebDataset cuts names at the first dot.
        directory: made if missing; must hold no tars of this prefix yet.
        prefix: tars are called ``PREFIX-000000.tar`` and so on.
        max_samples, max_bytes: a tar is closed once its samples or members reach this.
        check_images: refuse an image whose header cannot be read.

    Raises:
        RecordError: a key, record or image that cannot be stored, naming the key.
        ShardError: the folder already holds tars of this prefix, or there is no sample.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if present := sorted(directory.glob(f"{prefix}-*.tar")):
        raise ShardError(
            f"{directory} already holds {len(present)} tars called {prefix}-*.tar; "
            "remove them or choose another folder: old and new would be read as one data set"
        )
    paths: list[Path] = []
    seen: set[str] = set()
    stream = iter(samples)
    item = next(stream, None)
    while item is not None:
        path = directory / f"{prefix}-{len(paths):06d}.tar"
        with new_file(path) as unfinished:
            with unfinished.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
                count = size = 0
                while item is not None and count < max_samples and size < max_bytes:
                    members = _members(*item, seen=seen, check_images=check_images)
                    size += writer.write(members)
                    count += 1
                    item = next(stream, None)
            index = build_index(unfinished, name=path.name)
        save_index(index, index_path(path))
        paths.append(path)
    if not paths:
        raise ShardError(f"no sample was given for {directory}; an empty data set is never meant")
    return paths


def _members(
    key: str,
    record: Mapping[str, Any],
    image: bytes | None,
    extension: str | None,
    *,
    seen: set[str],
    check_images: bool,
) -> dict[str, str | bytes]:
    if not _KEY.fullmatch(key) or len(key) > _LONGEST_KEY:
        raise RecordError(
            f"key `{key}` cannot be stored; use at most {_LONGEST_KEY} letters, digits, `_`, `-` "
            "and `/`"
        )
    if key in seen:
        raise RecordError(f"key `{key}` was given twice; keys are unique within a data set")
    seen.add(key)
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(f"record of key `{key}` is not JSON: {error}") from error
    members: dict[str, str | bytes] = {"__key__": key, "json": text.encode()}
    if image is None:
        return members
    if extension not in IMAGE_EXTENSIONS:
        raise RecordError(
            f"image of key `{key}` has extension {extension!r}; expected one of "
            f"{', '.join(IMAGE_EXTENSIONS)}"
        )
    if check_images:
        image_size(image, key=key)
    return {**members, extension: image}
