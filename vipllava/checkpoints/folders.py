"""Checkpoint folders: written so that only one of the same kind gives way, and uploaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vipllava.files.atomic import new_folder
from vipllava.models.hub_models import web_error
from vipllava.types import CheckpointError, first_line

_ENDS: Final = 1 << 20


def check_replaceable(directory: Path, what: str, marks: Sequence[str]) -> None:
    """Raise CheckpointError if a folder is a file, or holds something else; as below."""
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file: name a folder to write")
    is_used = directory.is_dir() and any(directory.iterdir())
    if is_used and not any((directory / mark).is_file() for mark in marks):
        raise CheckpointError(
            f"{directory} exists and is no {what} (it has no {' or '.join(marks)}): choose another "
            "folder, or move it away"
        )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a config as transformers and peft do."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def checkpoint_folder(directory: Path, what: str, marks: Sequence[str]) -> Generator[Path]:
    """Have a folder filled beside its place, so that no half of one is ever found; yields that.

    An earlier one of the same kind, known by one of the files ``marks``, is replaced; ``what``
    is written, for the message.

    Raises:
        CheckpointError: the place is taken, or there is no room.
    """
    check_replaceable(directory, what, marks)
    try:
        with new_folder(directory, replace=True) as unfinished:
            yield unfinished
    except OSError as error:
        raise CheckpointError(
            f"{directory} could not be written ({error}): free some space or choose another "
            "folder; nothing there was changed"
        ) from error


def upload(directory: Path, repository: str, *, private: bool = True) -> str:
    """Upload every file of a folder to a repository, made if it is not there.

    Args:
        directory: of a model; its README.md becomes the page.
        repository: ``owner/name``.
        private: of a repository that is made.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: the hub refuses or cannot be reached; the folder stays.
    """
    import huggingface_hub

    hub: Any = huggingface_hub
    api = hub.HfApi(endpoint=hub.constants.ENDPOINT)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(directory))
    except (web_error(), OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} could not be uploaded to {repository} ({first_line(error)}): log in "
            f"with `hf auth login` and a token that may write, then `hf upload {repository} "
            f"{directory}`; the folder itself is finished"
        ) from error
    return str(address)


def content_digest(source: Path) -> str | None:
    """Return a digest of a checkpoint's content, wherever it lies; None if it lies on the hub.

    Of every file it takes the size and a megabyte at both ends: a 26 GB model takes milliseconds,
    and a trained tensor at either end changes with every step.
    """
    if not source.exists():
        return None
    digest = hashlib.blake2b(digest_size=8)
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
    for path in files:
        size, name = path.stat().st_size, path.relative_to(source).as_posix()
        if name.startswith(".") or path.suffix == ".md":
            continue
        digest.update(f"{name if path != source else ''} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()
