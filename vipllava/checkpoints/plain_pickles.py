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

from vipllava.models.hub_models import what_instead
from vipllava.models.tensor_files import load_pickle
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
UNREADABLE: Final = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)
"""What torch's readers raise of a file that is cut short, changed, or holds code."""
_CHANGED_BYTES: Final = (ImportError, AttributeError, LookupError, TypeError, ArithmeticError)
"""What a changed pickle raises besides, by 9000 changes of one."""


def load_plain(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a mapping of plain values and tensors, which come to the CPU, from ``torch.save``.

    Args:
        path: of the file.
        mapped: leave the tensors in the file until they are used.

    Raises:
        CheckpointError: it cannot be read, holds something else, or code, which is not run.
    """
    try:
        loaded: Any = load_pickle(path, mapped=mapped)
    except UNREADABLE as error:
        raise CheckpointError(
            what_instead(path)
            or f"{path} cannot be read as a checkpoint of plain values and tensors "
            f"({first_line(error)}): it is cut short, or holds code, which is not run"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}: it is no checkpoint")
    return cast("dict[str, Any]", loaded)


@contextlib.contextmanager
def plain_values_only() -> Generator[None]:
    """Hold every ``torch.load`` to ``weights_only``, DeepSpeed's own with its few classes."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    known: list[Any] = [(_enum_member, "builtins.getattr")]
    for module, attribute in _DEEPSPEED_VALUES:
        with contextlib.suppress(ImportError, AttributeError):  # another release of it
            known.append(getattr(importlib.import_module(module), attribute))
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def read_metadata(folder: Path) -> Any:
    """Read the index of a distributed checkpoint, PyTorch's ``Metadata``.

    Raises:
        CheckpointError: the index cannot be read or holds something else.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with (folder / ".metadata").open("rb") as file:
            index = MetadataUnpickler(file).load()
        if isinstance(index, Metadata) and index.storage_data is not None:
            return index
        reason = f"it holds a {type(index).__name__}"
    except (*UNREADABLE, *_CHANGED_BYTES, MemoryError) as error:
        reason = first_line(error)
    raise CheckpointError(f"its index .metadata cannot be read ({reason})")


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
        return cast("type[enum.Enum]", kind)[name]
    raise pickle.UnpicklingError(f"{name} of {kind} is no plain value")
