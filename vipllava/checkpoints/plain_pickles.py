"""Pickles that are read without running code: plain values and tensors, or an error.

Checkpoints are pickles in part, and the libraries' own readers run what a pickle says.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import pickle
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final, cast

import torch

from vipllava.types import CheckpointError, first_line

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


def load_plain(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a file of ``torch.save``.

    Args:
        path: of a mapping with plain values and tensors.
        mapped: leave the tensors in the file until they are used.

    Returns:
        The mapping, tensors on the CPU.

    Raises:
        CheckpointError: it cannot be read, holds something else, or code, which is not run.
    """
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of plain values and tensors "
            f"({first_line(error)}): it is cut short, or holds code, which is not run"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}: it is no checkpoint")
    return cast("dict[str, Any]", loaded)


@contextlib.contextmanager
def plain_values_only() -> Generator[None]:
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


def read_metadata(folder: Path) -> Any:
    """Read the index of a distributed checkpoint: its own classes, dtypes and paths only.

    Args:
        folder: of the checkpoint.

    Returns:
        PyTorch's ``Metadata``.

    Raises:
        pickle.UnpicklingError: it holds something else; what half a pickle raises is open.
    """
    with (folder / ".metadata").open("rb") as file:
        return MetadataUnpickler(file).load()


class MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of a distributed checkpoint's index and no others."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return a known class; raise UnpicklingError for all others."""
        if (module_name, global_name) == ("builtins", "getattr"):
            return _enum_member
        if (module_name, global_name) in _METADATA_VALUES:
            return super().find_class(module_name, global_name)
        if module_name in (_METADATA, "torch") and "." not in global_name:
            found = super().find_class(module_name, global_name)
            if isinstance(found, torch.dtype) or getattr(found, "__module__", "") == _METADATA:
                return found
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no plain value")


def _enum_member(kind: object, name: str) -> enum.Enum:
    """Stand in for ``getattr``, as which early releases of Python 3.11 pickle an enum's member."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        members = cast("type[enum.Enum]", kind)
        return members[name]
    raise pickle.UnpicklingError(f"{name} of {kind} is no plain value")
