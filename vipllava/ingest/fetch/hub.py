"""Files of a data set repository on the Hugging Face hub: listed, downloaded, compared.

``huggingface_hub`` lists the commit, addresses its files and knows the user's login. The bytes come
through :mod:`vipllava.files.download`: the hub's own client starts a file anew in each process.
"""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vipllava import __version__
from vipllava.files.download import DownloadError, Progress, RefusedError, download
from vipllava.files.retries import PATIENT, BrokenError, GivenUpError, Patience, Trial, retry
from vipllava.types import first_line

_TYPE: Final = "dataset"
_PAGE: Final = "https://huggingface.co/datasets/"
_LASTING: Final = (400, 401, 403, 404, 410)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of one commit."""

    repo: str
    commit: str
    path: str
    size: int  # bytes
    sha256: str | None  # of its bytes, for large files
    git_oid: str  # git's blob hash, for the others


def list_hub_files(
    repo: str, pattern: str, *, revision: str | None = None, patience: Patience = PATIENT
) -> list[HubFile]:
    """List the files of a repository that match, by path.

    Args:
        repo: ``owner/name``.
        pattern: a path, or one with ``*`` and ``?``, which match ``/`` too.
        revision: branch, tag or commit; the main branch if None.

    Raises:
        DownloadError: the repository cannot be read, or nothing matches.
    """
    from huggingface_hub import HfApi, constants, errors

    web_error: Any = vars(errors)["HTTPError"]  # of the HTTP client that this release uses

    def attempt() -> list[HubFile]:
        api: Any = HfApi(endpoint=constants.ENDPOINT)
        try:
            commit = str(api.repo_info(repo, repo_type=_TYPE, revision=revision).sha)
            tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=_TYPE)
            return [
                HubFile(repo, commit, f.path, f.size, f.lfs and f.lfs.sha256, f.blob_id)
                for f in tree
                if hasattr(f, "blob_id") and fnmatch.fnmatchcase(f.path, pattern)
            ]
        except errors.OfflineModeIsEnabled as error:
            raise DownloadError(
                f"{repo}: the hub is switched off by HF_HUB_OFFLINE; unset it to fetch"
            ) from error
        except web_error as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in _LASTING:
                raise DownloadError(f"{repo}: {_refusal(error, status)}") from error
            raise BrokenError(first_line(error)) from error

    try:
        found = retry(attempt, Trial(patience), repo)
    except GivenUpError as error:
        raise DownloadError(f"{error}. Run the same command again to go on") from error.reason
    if not found:
        raise DownloadError(
            f"{_PAGE}{repo} has no file `{pattern}` at {revision or 'its main branch'}; correct "
            "`file` or `revision` in the manifest's sources"
        )
    return sorted(found, key=lambda file: file.path)


def fetch_hub_file(
    file: HubFile,
    target: Path,
    *,
    patience: Patience = PATIENT,
    on_progress: Progress | None = None,
) -> None:
    """Download one file to ``target``, or take up its download again.

    Raises:
        DownloadError: the hub refuses or keeps failing, or the file is not the stated one.
        DiskError: the disk is full or cannot be written.
    """
    import huggingface_hub

    if _is_whole(target, file):
        return
    hub: Any = huggingface_hub
    place = {"repo_type": _TYPE, "revision": file.commit, "endpoint": hub.constants.ENDPOINT}
    url: str = hub.hf_hub_url(file.repo, file.path, **place)
    headers = hub.utils.build_hf_headers(library_name="vipllava", library_version=__version__)
    where = f"{file.path} of {_PAGE}{file.repo}"
    try:
        download(
            url, target, size=file.size, sha256=file.sha256, immutable=True, headers=headers,
            patience=patience, on_progress=on_progress,
        )  # fmt: skip
    except RefusedError as error:
        raise DownloadError(f"{where}: {_refusal(error, error.status)}") from error
    if not _is_whole(target, file):
        target.unlink()
        raise DownloadError(
            f"{where} is not the file that was meant (its git hash is not {file.git_oid}); it was "
            "discarded. Run the same command again"
        )


def _refusal(error: BaseException, status: int | None) -> str:
    if status in (401, 403):
        return (
            "the hub denies access; accept the data set's terms on its page and log in with "
            "`hf auth login`"
        )
    return f"{first_line(error)}; correct `hub` or `revision` in the manifest's sources"


def _is_whole(path: Path, file: HubFile) -> bool:
    """Whether the file is there; a large one was compared with its SHA-256 when it came."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return True
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    digest.update(path.read_bytes())
    return digest.hexdigest() == file.git_oid
