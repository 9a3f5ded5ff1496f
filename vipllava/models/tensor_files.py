"""Files of weights, opened and not read: a tensor comes into memory when it is used.

safetensors and torch pickles, one file or several with an index. A pickle is read with
``weights_only``: it may hold tensors, not code.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vipllava.config.machine_faults import disk_errno
from vipllava.models.hub_models import read_json
from vipllava.types import CheckpointError, first_line

LazyTensor: TypeAlias = Any
"""A ``torch.Tensor`` (possibly mapped from a file), a slice of safetensors, read by ``[...]``, or a
:class:`ComputedTensor`."""

FLOATS: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What a network is held and computed in, by the names of settings."""

SHARD_BYTES: Final = 5 * 10**9
_INDICES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES: Final = ("model.safetensors", "pytorch_model.bin")
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_tensors(path: Path, role: str) -> dict[str, LazyTensor]:
    """Open a model folder's weights, or one file's.

    Args:
        path: a folder with ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards
            with an index, or one such file.
        role: the setting that names it, for messages.

    Returns:
        Every tensor of the files by its name in them.

    Raises:
        CheckpointError: there are no weights, a file is missing, cut short, or holds code.
    """
    if path.is_file():
        return _open_file(path, role)
    for name in _INDICES:
        if (path / name).is_file():
            return _open_shards(path / name, role)
    for name in _SINGLES:
        if (path / name).is_file():
            return _open_file(path / name, role)
    raise CheckpointError(
        f"{role}={str(path)!r} has no weights ({', '.join(_SINGLES)}, or shards with an index): "
        "the download or the copy is incomplete"
    )


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that is made of others when it is read, each time.

    Attributes:
        shape: what it will have.
        dtype: what it will have.
        compute: makes it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], torch.Tensor]


def read_tensor(lazy: LazyTensor) -> torch.Tensor:
    """Read a tensor into memory; one that is there already is returned as it is."""
    if isinstance(lazy, ComputedTensor):
        return lazy.compute()
    return lazy if isinstance(lazy, torch.Tensor) else lazy[...]


def shape_of(lazy: LazyTensor) -> tuple[int, ...]:
    """Return the shape without reading."""
    return tuple(lazy.shape if isinstance(lazy, _WITH_FACTS) else lazy.get_shape())


def dtype_of(lazy: LazyTensor) -> torch.dtype:
    """Return the dtype without reading."""
    return lazy.dtype if isinstance(lazy, _WITH_FACTS) else _DTYPES[lazy.get_dtype()]


_WITH_FACTS: Final = (torch.Tensor, ComputedTensor)


def write_tensors(
    directory: Path, tensors: Iterable[tuple[str, LazyTensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write ``model.safetensors``, in shards with an index where it is large.

    Args:
        directory: exists.
        tensors: names and tensors; read one shard at a time.
        shard_bytes: greatest size of a shard, unless one tensor is larger.
    """
    entries = list(tensors)
    shards: list[list[tuple[str, LazyTensor]]] = [[]]
    size = total = 0
    for name, lazy in entries:
        num_bytes = torch.Size(shape_of(lazy)).numel() * dtype_of(lazy).itemsize
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, lazy))
        size += num_bytes
        total += num_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {name: read_tensor(lazy).contiguous().cpu() for name, lazy in shard}
        save_tensors(directory / file, values)
        weight_map |= dict.fromkeys(values, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / _INDICES[0]).write_text(text, encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file; no two tensors may share memory."""
    with disk_errors(path):
        save_file(tensors, path, metadata={"format": "pt"})


def save_pickle(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as the released code reads them, by ``torch.save``."""
    with disk_errors(path):
        torch.save(tensors, path)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Let what safetensors and torch say of a full disk be an OSError like that of others.

    Args:
        path: what is written.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        number = disk_errno(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _open_shards(index: Path, role: str) -> dict[str, LazyTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} is no index of weights: download it again")
    weight_map = cast("dict[str, str]", weight_map)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{role}={str(index.parent)!r} lacks {', '.join(missing)}, which {index.name} names: "
            "the download or the copy is incomplete"
        )
    tensors: dict[str, LazyTensor] = {}
    for name in files:
        tensors.update(_open_file(index.parent / name, role))
    lacking = sorted(set(weight_map) - set(tensors))
    if lacking:
        raise CheckpointError(
            f"the shards of {index} lack {len(lacking)} tensors that it names, {lacking[0]} "
            "first: they are of another model; download them again"
        )
    return tensors


def _open_file(path: Path, role: str) -> dict[str, LazyTensor]:
    if path.suffix == ".safetensors":
        try:
            opened: Any = safe_open(path, framework="pt", device="cpu")
            # A slice keeps its file open by itself.
            return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read as safetensors ({error}): it is cut short or of another "
                f"kind; download or copy it again ({role})"
            ) from error
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors ({first_line(error)}): it was not opened, since a "
            f"pickle may run code; convert it to safetensors where you trust it ({role})"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as torch weights ({first_line(error)}): it is cut short or of "
            f"another kind; download or copy it again ({role})"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor)
        for key, value in cast("dict[Any, Any]", loaded).items()
    ):
        raise CheckpointError(f"{path} is no dictionary of named tensors ({role})")
    return cast("dict[str, LazyTensor]", loaded)
