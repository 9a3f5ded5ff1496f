"""Weights out of a training checkpoint: Lightning's file, DeepSpeed's or FSDP2's folder.

A run's own export is the ordinary way out. This is for the run that ended early: the newest
checkpoint has what trained, and what it leaves out comes from what the run started from.

All of them are pickles in part. None is read in a way that could run code from it: the libraries'
own readers would, and are held to plain values here.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch

from vipllava.checkpoints.names import HF_TO_HF, map_name
from vipllava.models.tensor_files import LazyTensor
from vipllava.types import CheckpointError

_WRAPPERS: Final = re.compile(r"^(?:_forward_module\.|module\.|state_dict\.)*")
_ATTRIBUTE: Final = "model."
"""Of the LightningModule, before the names in the network."""


_DEEPSPEED_VALUES: Final = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
"""Plain classes in its checkpoints."""
_METADATA: Final = "torch.distributed.checkpoint.metadata"
_METADATA_VALUES: Final = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


PARTS_INDEX: Final = "checkpoint.json"
"""In a folder of parts, one of each process: the names of its files and their sizes in bytes."""


def find_damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint that a run wrote, without reading its tensors.

    Args:
        path: Lightning's file, or the folder that is written in its place under FSDP2 or DeepSpeed.

    Returns:
        What is missing or cut short, to be put behind the checkpoint's name; None if it seems
        whole.
    """
    if not path.is_dir():
        return _find_cut(path)
    if (path / ".metadata").is_file():
        try:
            sizes = _distributed_sizes(path)
        except Exception as error:  # noqa: BLE001 - whatever half of a pickle brings about
            return f"its index .metadata cannot be read ({_first_line(error)})"
        archives = ["meta.pt"]
    elif (path / PARTS_INDEX).is_file():
        try:
            sizes = _parts_sizes(path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return f"its index {PARTS_INDEX} cannot be read"
        archives = [*sizes]
    else:
        return "it has no index of its files: it is not whole, or DeepSpeed's own"
    for name, size in sizes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (found := (path / name).stat().st_size) < size:
            return f"{name} has {found} bytes of {size}"
    return next((cut for name in archives if (cut := _find_cut(path / name))), None)


def _distributed_sizes(path: Path) -> dict[str, int]:
    """Return how many bytes each file of a distributed checkpoint has at least."""
    sizes: dict[str, int] = {}
    for stored in _read_metadata(path).storage_data.values():
        end = stored.offset + stored.length
        sizes[stored.relative_path] = max(end, sizes.get(stored.relative_path, 0))
    return sizes


def _parts_sizes(path: Path) -> dict[str, int]:
    index = json.loads((path / PARTS_INDEX).read_text(encoding="utf-8"))
    return {str(name): int(size) for name, size in index["files"].items()}


def _find_cut(path: Path) -> str | None:
    """Look for the directory at the end of a file of ``torch.save``."""
    try:
        with zipfile.ZipFile(path):
            return None
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, zipfile.BadZipFile) as error:
        return f"{path.name} is empty or cut short ({_first_line(error)})"


def read_training_state(path: Path) -> dict[str, LazyTensor]:
    """Read the weights of a training checkpoint.

    Args:
        path: Lightning's ``.ckpt`` file, or the folder that DeepSpeed (ZeRO-2, ZeRO-3) or FSDP2
            writes in its place.

    Returns:
        By the names of the Hugging Face format; weights that did not train may be missing.

    Raises:
        CheckpointError: it is none of these, is damaged, or holds adapters.
    """
    if path.is_file():
        tensors = _read_lightning(path)
    elif (path / ".metadata").is_file():
        tensors = _read_distributed(path)
    else:
        tensors = _read_deepspeed(path)
    named: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        short = _WRAPPERS.sub("", name).removeprefix(_ATTRIBUTE)
        if ".lora_" in short:
            raise CheckpointError(
                f"{path} holds adapters ({short}), which do not say their scale here: start the "
                "run again and let it end, its `adapter` and `export` folders have them"
            )
        new = map_name(short, HF_TO_HF)
        if new is None:
            raise CheckpointError(f"{path} holds {name}, which is no weight of a VipLlava")
        named[new] = tensor
    if not named:
        raise CheckpointError(f"{path} holds no weights")
    return named


def _read_lightning(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of plain values and tensors "
            f"({_first_line(error)}): it is cut short, or holds code, which is not run"
        ) from error
    state = cast("dict[str, Any]", loaded).get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} has no state_dict: it is no checkpoint of Lightning's")
    return cast("dict[str, torch.Tensor]", state)


def _read_deepspeed(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        zero_to_fp32: Any = importlib.import_module("deepspeed.utils.zero_to_fp32")
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a checkpoint of DeepSpeed, which is not installed: "
            "pip install -e '.[deepspeed]'"
        ) from error
    read = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
    # Lightning keeps DeepSpeed's files under a tag of this name and may leave out `latest`.
    tag = "checkpoint" if (path / "checkpoint").is_dir() else None
    try:
        with _plain_values_only():
            return dict(read(str(path), tag=tag))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds code, or something else that is no plain value, and is not read "
            f"({_first_line(error)})"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of DeepSpeed ({_first_line(error)}): a rank's "
            "file is missing or cut short; use an earlier one"
        ) from error


@contextlib.contextmanager
def _plain_values_only() -> Generator[None]:
    """Hold every ``torch.load`` to ``weights_only``, DeepSpeed's own with its few classes."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    known: list[Any] = []
    for module, attribute in _DEEPSPEED_VALUES:
        with contextlib.suppress(ImportError):  # another release of it
            known += [getattr(importlib.import_module(module), attribute, None)]
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        plain = [value for value in known if value is not None]
        with torch.serialization.safe_globals([*plain, (_enum_member, "builtins.getattr")]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _enum_member(kind: object, name: str) -> enum.Enum:
    """Stand in for ``getattr``, as which early releases of Python 3.11 pickle an enum's member."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        members = cast("type[enum.Enum]", kind)
        return members[name]
    raise pickle.UnpicklingError(f"{name} of {kind} is no plain value")


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the index of a distributed checkpoint: its own classes, dtypes and paths only."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _enum_member
        if (module_name, global_name) in _METADATA_VALUES:
            return super().find_class(module_name, global_name)
        if module_name in (_METADATA, "torch") and "." not in global_name:
            found = super().find_class(module_name, global_name)
            if isinstance(found, torch.dtype) or getattr(found, "__module__", "") == _METADATA:
                return found
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no plain value")


def _read_metadata(path: Path) -> Any:
    with (path / ".metadata").open("rb") as file:
        return _MetadataUnpickler(file).load()


def _read_distributed(path: Path) -> Mapping[str, torch.Tensor]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    distributed: Any = checkpoint

    try:
        # Looked through here; the reader opens the same file again without such care.
        entries: dict[str, Any] = _read_metadata(path).state_dict_metadata
        reader = distributed.FileSystemReader(path)
        # Weights only: the optimizer's state is twice as large.
        state: dict[str, torch.Tensor] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
            and _WRAPPERS.sub("", name).startswith(_ATTRIBUTE)
        }
        with warnings.catch_warnings():
            # It says that one process reads what several wrote; that is what is wanted.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            distributed.load(state, storage_reader=reader, no_dist=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a distributed checkpoint ({_first_line(error)}): a rank's "
            "file is missing or cut short; use an earlier one"
        ) from error
    return state


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
