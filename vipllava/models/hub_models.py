"""A model's folder on this machine, downloaded from the Hugging Face Hub if need be.

Added to ``huggingface_hub`` is which files a model needs, and errors that say what to do.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

from vipllava.types import CheckpointError, first_line

logger = logging.getLogger(__name__)

_TEXTS: Final = ("*.json", "*.model", "*.txt", "*.jinja")
_PICKLES: Final = ("pytorch_model*.bin", "mm_projector.bin", "adapter_model.bin")
# Other frameworks' and other releases' copies of the same weights.
_LEFT_OUT: Final = ("*/*", "*.onnx", "consolidated*", "*optimizer*")
_NON_LORA: Final = "non_lora_trainables.bin"
_SUFFIXES: Final = (".bin", ".ckpt", ".gguf", ".json", ".pt", ".pth", ".safetensors")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


_FOLDERS: Final = ("runs", "models", "checkpoints", "data", "outputs", "weights")
"""What folders of models are called; nobody on the hub is."""


class UnreachableError(CheckpointError):
    """A model is not on this machine, and no hub can be asked for it."""


def local_folder(source: str, role: str, *, weights: bool = True) -> Path:
    """Return the folder or file that a source names, downloaded first if it is an id.

    What is in the cache and complete will do in offline mode (``HF_HUB_OFFLINE=1``) and, with a
    warning, where the hub cannot be reached. Without ``weights`` config and tokenizer are enough;
    ``role`` is the setting that names the source, for the message.

    Raises:
        CheckpointError: nothing is there, the hub refuses, or cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not is_hub_id(source):
        near = difflib.get_close_matches(path.name, _names_in(path.parent), n=1)
        hint = f" (did you mean {path.with_name(near[0])}?)" if near else ""
        raise CheckpointError(
            f"{role}={source!r} does not exist{hint}: give an existing folder or a Hugging Face id "
            "such as openai/clip-vit-large-patch14-336"
        )
    from huggingface_hub import HfApi, constants, errors

    offline = constants.HF_HUB_OFFLINE
    try:
        if not offline:
            # snapshot_download would take what is in the cache where this fails, and not say so.
            HfApi(endpoint=constants.ENDPOINT).model_info(source)
        return _snapshot(source, weights, offline)
    except Exception as error:  # the client's many kinds; what is not about the hub is raised again
        if _is_unreachable(error):
            with suppress(errors.LocalEntryNotFoundError):
                folder = _snapshot(source, weights, offline=True)
                logger.warning(
                    "%s=%s: the Hugging Face Hub cannot be reached (%s); the copy in the cache is "
                    "used, %s; HF_HUB_OFFLINE=1 saves the wait",
                    *(role, source, first_line(error), folder),
                )
                return folder
        raise _refusal(source, role, error) from error


def is_hub_id(source: str) -> bool:
    """Whether a source has the form of an id of the hub and not that of a path, there or not."""
    path = Path(source).expanduser()
    is_path = path.exists() or path.suffix in _SUFFIXES or path.parts[0] in _FOLDERS
    return not is_path and _HUB_ID.fullmatch(source) is not None


def content_digest(source: str) -> str | None:
    """Return a digest of a model's files here, wherever they lie; None where nothing is there.

    Of large files it reads 4 KiB of every 16 MiB: 0.03 % of them, and some of every large weight.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    digest = hashlib.blake2b(digest_size=16)
    for each in files:
        if each.suffix not in (*_SUFFIXES, ".model") or not each.is_file():
            continue
        size = each.stat().st_size
        digest.update(f"{each.relative_to(path)} {size}\n".encode())
        with each.open("rb") as file:
            step = 1 << 24
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(step if size <= 4 * step else 4096))
    return digest.hexdigest()


def _names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def what_instead(path: Path) -> str | None:
    """Say what a file is that cannot be read, and what to do, where its beginning tells."""
    try:
        with path.open("rb") as file:
            start = file.read(100).lstrip().lower()
    except OSError:
        return None
    if not start:
        return f"{path} is empty: download or copy it again"
    if start.startswith(b"version https://git-lfs"):
        return (
            f"{path} is a Git LFS pointer, which stands for the file: run `git lfs pull` in its "
            "folder, or download it with `hf download`"
        )
    if start.startswith((b"<!doctype", b"<html")):
        return f"{path} is a web page in place of the file: download it with `hf download`"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model; raises CheckpointError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            what_instead(path) or f"{path} cannot be read ({error}): write or download it again"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no JSON object: write or download it again")
    return cast("dict[str, Any]", raw)


def load_config(source: str, role: str) -> Any:
    """Read the config of a folder or id; a CheckpointError where there is none to be read."""
    from transformers import AutoConfig

    folder = local_folder(source, role, weights=False)
    if folder.is_file():
        raise CheckpointError(f"{role}={source!r} is a file: name the folder that holds it")
    if not (folder / "config.json").is_file():
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        if (folder / "export" / "config.json").is_file():
            meant = f"its model is {folder / 'export'}"
        else:
            meant = "name the folder that save_pretrained or a training stage's export wrote"
        raise CheckpointError(
            f"{role}={source!r} is a folder without config.json (it holds {names}): {meant}"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{role}={source!r} cannot be loaded ({first_line(error)}): its config.json is damaged "
            "or of another kind: write or download it again"
        ) from error


def _is_unreachable(error: BaseException) -> bool:
    from huggingface_hub import errors

    answered = isinstance(error, errors.HfHubHTTPError)
    return isinstance(error, (web_error(), ConnectionError, TimeoutError)) and not answered


def web_error() -> type[Exception]:
    """Return the base of the HTTP client's errors, which the installed hub release decides."""
    from huggingface_hub import errors

    return vars(errors)["HTTPError"]


def _snapshot(source: str, weights: bool, offline: bool) -> Path:
    """Return a model's folder in the cache, its weights there once."""
    import huggingface_hub

    download: Any = huggingface_hub.snapshot_download
    options = {"local_files_only": offline, "ignore_patterns": list(_LEFT_OUT)}
    folder = Path()
    for kind in (("*.safetensors",), _PICKLES):
        wanted = [*_TEXTS, *((*kind, _NON_LORA) if weights else ())]
        folder = Path(download(source, allow_patterns=wanted, **options))
        if not weights or any(next(folder.glob(pattern), None) for pattern in kind):
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


def _refusal(source: str, role: str, error: Exception) -> Exception:
    from huggingface_hub import errors

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
            f"could not be downloaded ({first_line(error)}): check the network and the free space "
            "of the cache (HF_HOME), then start again; what has come stays there"
        )
    else:
        return error
    return kind(f"{role}={source!r} {what}")
