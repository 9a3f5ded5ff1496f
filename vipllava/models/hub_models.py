"""A model's folder on this machine, downloaded from the Hugging Face Hub if need be.

``huggingface_hub`` does the work: its cache, its progress bars, its login. What is added is which
files a model needs, and errors that say what to do.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any, Final, cast

from vipllava.types import CheckpointError

logger = logging.getLogger(__name__)

_TEXTS: Final = ("*.json", "*.model", "*.txt", "*.jinja")
_SAFETENSORS: Final = "*.safetensors"
_PICKLES: Final = ("pytorch_model*.bin", "mm_projector.bin", "adapter_model.bin")
_LEFT_OUT: Final = ("*/*", "*.onnx", "consolidated*", "*optimizer*")
"""Other frameworks' and other releases' copies of the same weights."""
_NON_LORA: Final = "non_lora_trainables.bin"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class UnreachableError(CheckpointError):
    """A model is not on this machine, and no hub can be asked for it."""


def local_folder(source: str, role: str, *, weights: bool = True) -> Path:
    """Return the folder or file that a source names, downloaded first if it is an id.

    A model that is in the cache and complete is not asked for again in offline mode
    (``HF_HUB_OFFLINE=1``), and will do, with a warning, where the hub cannot be reached.

    Args:
        source: folder, file or Hugging Face id.
        role: the setting that names it, for the message.
        weights: else config and tokenizer are enough.

    Raises:
        CheckpointError: nothing is there, the hub refuses (a gated model, a misspelt id), or
            cannot be reached; the message says what to do.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{role}={source!r} does not exist: give an existing folder or a Hugging Face id "
            "such as openai/clip-vit-large-patch14-336"
        )
    import huggingface_hub
    from huggingface_hub import errors

    hub: Any = huggingface_hub
    try:
        if hub.constants.HF_HUB_OFFLINE:
            return _cached(source, weights)
        names = hub.HfApi(endpoint=hub.constants.ENDPOINT).list_repo_files(source)
        return Path(hub.snapshot_download(source, allow_patterns=_needed(names, weights)))
    except Exception as error:  # the client's many kinds; what is not about the hub is raised again
        if _is_unreachable(error) and (folder := _cached_or_none(source, weights)) is not None:
            logger.warning(
                "%s=%s: the Hugging Face Hub cannot be reached (%s); the copy in the cache is "
                "used, %s; HF_HUB_OFFLINE=1 saves the wait",
                role,
                source,
                reason_of(error),
                folder,
            )
            return folder
        raise _refusal(source, role, error, errors) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): write or download it again"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no JSON object: write or download it again")
    return cast("dict[str, Any]", raw)


def _is_unreachable(error: BaseException) -> bool:
    from huggingface_hub import errors

    answered = isinstance(error, errors.HfHubHTTPError)
    return isinstance(error, (web_error(), ConnectionError, TimeoutError)) and not answered


def _cached_or_none(source: str, weights: bool) -> Path | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _cached(source, weights)
    except LocalEntryNotFoundError:
        return None


def web_error() -> type[Exception]:
    """Return the base of the HTTP client's errors, which the installed hub release decides."""
    from huggingface_hub import errors

    known: Any = vars(errors)["HTTPError"]
    return known


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error of the hub says, or its kind where it says nothing."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def _cached(source: str, weights: bool) -> Path:
    """Find a model in the cache; other copies of its weights need not be there."""
    import huggingface_hub

    hub: Any = huggingface_hub
    folder = Path()
    for large in ((_SAFETENSORS,), _PICKLES):
        wanted = [*_TEXTS, *((*large, _NON_LORA) if weights else ())]
        found = hub.snapshot_download(
            source,
            local_files_only=True,
            allow_patterns=wanted,
            ignore_patterns=list(_LEFT_OUT),
        )
        folder = Path(found)
        if not weights or any(path for pattern in large for path in folder.glob(pattern)):
            break
    return folder


def draw_bars_on_terminals_only() -> None:
    """Keep the bars of transformers and huggingface_hub out of log files, for the whole process."""
    if sys.stderr.isatty():
        return
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()


def _needed(names: list[str], weights: bool) -> list[str]:
    """Choose a model's files: texts, and its weights once, safetensors if there are any."""
    top = [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in _LEFT_OUT)]
    chosen = [n for n in top if any(fnmatch.fnmatchcase(n, p) for p in _TEXTS)]
    if not weights:
        return chosen
    large = [n for n in top if fnmatch.fnmatchcase(n, _SAFETENSORS)]
    large = large or [n for n in top if any(fnmatch.fnmatchcase(n, p) for p in _PICKLES)]
    return [*chosen, *large, *(n for n in top if n == _NON_LORA)]


def _refusal(source: str, role: str, error: Exception, errors: Any) -> Exception:
    page = f"https://huggingface.co/{source}"
    kind = CheckpointError
    if isinstance(error, errors.GatedRepoError):
        what = (
            f"is gated: ask for access at {page}, then log in with `hf auth login` (or set "
            "HF_TOKEN), or name a folder that has it"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = (
            f"is no folder here and no public model of the Hugging Face Hub ({page}): check the "
            "spelling; for a private one log in with `hf auth login`"
        )
    elif _is_unreachable(error) or isinstance(
        error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    ):
        kind = UnreachableError
        what = (
            "is no folder here and not in the cache, and the Hugging Face Hub cannot be reached "
            f"(or HF_HUB_OFFLINE is set): run `hf download {source}` where there is a network, or "
            "name a folder"
        )
    elif isinstance(error, (OSError, errors.HfHubHTTPError)):
        what = (
            f"could not be downloaded ({reason_of(error)}): check the network and the free space "
            "of the cache (HF_HOME), then start again; what has come stays there"
        )
    else:
        return error
    return kind(f"{role}={source!r} {what}")
