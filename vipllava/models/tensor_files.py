"""Files of weights, opened and not read: a tensor comes into memory when it is used.

safetensors and torch pickles, one file or several with an index; pickles may hold no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vipllava.config.machine_faults import disk_errno
from vipllava.models.hub_models import read_json, what_instead
from vipllava.types import CheckpointError, first_line

LazyTensor: TypeAlias = Any
"""A ``torch.Tensor`` (possibly mapped from a file), a slice of safetensors, read by ``[...]``, or a
:class:`ComputedTensor`."""

FLOATS: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a network is held and computed in, by the names of settings."""

_SHARD_BYTES: Final = 5 * 10**9
_INDICES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES: Final = ("model.safetensors", "pytorch_model.bin")
_DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def open_tensors(path: Path, role: str) -> dict[str, LazyTensor]:
    """Open a model folder's weights, or one file's, by their names in the files.

    The folder has ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards with an
    index; messages call it by the setting ``role``.

    Raises:
        CheckpointError: there are no weights, a file is missing, cut short, or holds code.
    """
    if not path.is_file():
        singles = (path / name for name in (*_INDICES, *_SINGLES))
        found = next((file for file in singles if file.is_file()), None)
        if found is None:
            raise CheckpointError(
                f"{role}={str(path)!r} has no weights ({', '.join(_SINGLES)}, or shards with an "
                "index): the download or the copy is incomplete"
            )
        path = found
    tensors = _open_file(path, role)
    if empty := [name for name, tensor in tensors.items() if 0 in shape_of(tensor)]:
        raise CheckpointError(
            f"{path} holds {len(empty)} tensors without a value, {empty[0]} first: it was written "
            "under ZeRO-3, where each process holds a part; gather the run's checkpoint with "
            f"DeepSpeed's zero_to_fp32.py, and use what that writes ({role})"
        )
    return tensors


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that is made of others when it is read, each time."""

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
    known = isinstance(lazy, (torch.Tensor, ComputedTensor))
    return tuple(lazy.shape if known else lazy.get_shape())


def dtype_of(lazy: LazyTensor) -> torch.dtype:
    """Return the dtype without reading."""
    known = isinstance(lazy, (torch.Tensor, ComputedTensor))
    return lazy.dtype if known else _DTYPES[lazy.get_dtype()]


def list_misfits(names: Mapping[str, Sequence[str]]) -> str:
    """Return each kind of misfit that there is, with the number of its names and 20 of them."""
    return "; ".join(
        f"{kind} ({len(found)}): {', '.join(found[:20])}{' ...' if len(found) > 20 else ''}"
        for kind, found in names.items()
        if found
    )


def write_tensors(
    directory: Path, tensors: Iterable[tuple[str, LazyTensor]], shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write ``model.safetensors``, in shards with an index where it is large, one at a time."""
    entries = dict(tensors)
    plan = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda lazy: torch.Size(shape_of(lazy)).numel() * dtype_of(lazy).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        values = {name: read_tensor(entries[name]).contiguous().cpu() for name in names}
        save_tensors(directory / file, values)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
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
    """Let what safetensors and torch say of a full disk be an OSError that names ``path``."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        number = disk_errno(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _open_shards(index: Path, role: str) -> dict[str, LazyTensor]:
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} is no index of weights: download it again")
    weight_map = cast("dict[str, str]", weight_map)
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{role}={str(index.parent)!r} lacks {', '.join(missing)}, which {index.name} names: "
            "the download or the copy is incomplete"
        )
    tensors: dict[str, LazyTensor] = {}
    for name in files:
        tensors.update(_open_file(index.parent / name, role))
    if lacking := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(
            f"the shards of {index} lack {len(lacking)} tensors that it names, {lacking[0]} "
            "first: they are of another model; download them again"
        )
    return tensors


def _open_file(path: Path, role: str) -> dict[str, LazyTensor]:
    if path.suffix == ".json":
        return _open_shards(path, role)
    if path.suffix == ".safetensors":
        try:
            opened: Any = safe_open(path, framework="pt", device="cpu")
            # A slice keeps its file open by itself.
            return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, "safetensors", role, error) from error
    try:
        loaded: Any = load_pickle(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            what_instead(path)
            or f"{path} holds more than tensors ({first_line(error)}): it was not opened, since a "
            f"pickle may run code; convert it to safetensors where you trust it ({role})"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise _unreadable(path, "torch weights", role, error) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor)
        for key, value in cast("dict[Any, Any]", loaded).items()
    ):
        raise CheckpointError(f"{path} is no dictionary of named tensors ({role})")
    return cast("dict[str, LazyTensor]", loaded)


def load_pickle(path: Path, *, mapped: bool = True) -> Any:
    """Read what ``torch.save`` wrote, plain values and tensors only; raises torch's errors.

    Tensors stay in the file until they are used if ``mapped``, but for files of before PyTorch 1.6.
    """
    mapped = mapped and zipfile.is_zipfile(path)
    with warnings.catch_warnings():
        # What it warns of it reads, or raises an error about.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _unreadable(path: Path, kind: str, role: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        what_instead(path)
        or f"{path} cannot be read as {kind} ({first_line(error)}): it is cut short or of another "
        f"kind; download or copy it again ({role})"
    )
