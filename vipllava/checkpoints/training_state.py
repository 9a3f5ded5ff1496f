"""Training checkpoints: weights out of Lightning's file, DeepSpeed's or FSDP2's folder, and parts.

For the run that ended before its export: the newest checkpoint has what trained. All are pickles in
part; the libraries' own readers would run code from them, and are held to plain values here.

A training state in parts, which stands in the place of DeepSpeed's own: each process writes what it
holds of every weight that trains into its own file, which says which stretch of which weight that
is, so that another number of processes, or another way of sharding, takes what belongs to each of
its own. They are mapped into memory: no process reads more than it needs.
"""

from __future__ import annotations

import importlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch

from vipllava.checkpoints.folders import write_json
from vipllava.checkpoints.names import HF_TO_HF, map_name
from vipllava.checkpoints.plain_pickles import (
    UNREADABLE,
    load_plain,
    plain_values_only,
    read_metadata,
)
from vipllava.files.atomic import sync
from vipllava.models.hub_models import read_json
from vipllava.models.tensor_files import ComputedTensor, LazyTensor
from vipllava.types import CheckpointError, first_line

INDEX: Final = "checkpoint.json"
"""Written last: the names of the folder's files and their sizes in bytes."""
JOB_FILE: Final = "job.yaml"
"""Of a run's folder, in whose ``checkpoints`` they lie: its whole configuration."""
RUN_STATE: Final = "meta.pt"
"""What all processes share: Lightning's state of the run, and how the weights are called."""
WEIGHT: Final = "fp32"
"""Among the tensors of a part: the weight itself; the others are the optimizer's, by its names."""
_WRAPPERS: Final = re.compile(r"^(?:_forward_module\.|module\.|state_dict\.)*")
_ATTRIBUTE: Final = "model."
"""Of the LightningModule, before the names in the network."""


def find_damage(path: Path) -> str | None:
    """Say what is missing or cut short in a checkpoint of a run, or None; no tensor is read.

    It is Lightning's file, or the folder written in its place under FSDP2 or DeepSpeed.
    """
    if not path.is_dir():
        return _find_cut(path)
    try:
        if (path / ".metadata").is_file():
            sizes: dict[str, int] = {}
            for stored in read_metadata(path).storage_data.values():
                end = stored.offset + stored.length
                sizes[stored.relative_path] = max(end, sizes.get(stored.relative_path, 0))
            archives = [RUN_STATE]
        elif (path / INDEX).is_file():
            sizes = file_sizes(path)
            archives = [*sizes]
        elif any(path.glob("**/*model_states.pt")):
            return (
                "it is in DeepSpeed's own format, which fits one number of processes: make a model "
                "of it with `vipllava convert` and start from that"
            )
        else:
            return "it has no index of its files"
    except CheckpointError as error:
        return str(error)
    for name, size in sizes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (found := (path / name).stat().st_size) < size:
            return f"{name} has {found} bytes of {size}"
    return next((cut for name in archives if (cut := _find_cut(path / name))), None)


def check_whole(path: Path) -> None:
    """Raise CheckpointError with what :func:`find_damage` finds."""
    if damage := find_damage(path):
        raise CheckpointError(f"{path} cannot be gone on from: {damage}")


def _find_cut(path: Path) -> str | None:
    """Look for the directory at the end of a file of ``torch.save``."""
    try:
        with zipfile.ZipFile(path):
            return None
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, zipfile.BadZipFile) as error:
        return f"{path.name} is empty or cut short ({first_line(error)})"


def read_training_state(path: Path) -> dict[str, LazyTensor]:
    """Read the weights of a training checkpoint, by the names of the Hugging Face format.

    It is Lightning's ``.ckpt`` file, or the folder that DeepSpeed (ZeRO-2, ZeRO-3) or FSDP2 writes
    in its place. Weights that did not train may be missing.

    Raises:
        CheckpointError: it is none of these, is damaged, or holds adapters.
    """
    tensors: Mapping[str, LazyTensor]
    if path.is_file():
        state: Any = load_plain(path, mapped=True).get("state_dict")
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} has no state_dict: it is no checkpoint of Lightning's")
        tensors = cast("dict[str, LazyTensor]", state)
    elif (path / ".metadata").is_file():
        tensors = _read_distributed(path)
    elif (path / INDEX).is_file():
        check_whole(path)
        tensors = read_weights(path)
    else:
        tensors = _read_deepspeed(path)
    named: dict[str, LazyTensor] = {}
    found = cast("Mapping[str, Any]", tensors)
    for name, tensor in found.items():
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


def _read_deepspeed(path: Path) -> dict[str, torch.Tensor]:
    try:
        zero_to_fp32: Any = importlib.import_module("deepspeed.utils.zero_to_fp32")
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a checkpoint of DeepSpeed, which is not installed: "
            'pip install "vipllava-lightning[deepspeed]"'
        ) from error
    read = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
    # Lightning keeps DeepSpeed's files under a tag of this name and may leave out `latest`.
    tag = "checkpoint" if (path / "checkpoint").is_dir() else None
    try:
        with plain_values_only():
            return dict(read(str(path), tag=tag))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds code, or something else that is no plain value ({first_line(error)})"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of DeepSpeed ({first_line(error)}): a rank's "
            "file is missing or cut short; use an earlier one"
        ) from error


def _read_distributed(path: Path) -> dict[str, torch.Tensor]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    distributed: Any = checkpoint
    refused = f"{path} cannot be read as a distributed checkpoint"
    try:
        # Looked through here; the reader opens the same file again without such care.
        entries: dict[str, Any] = read_metadata(path).state_dict_metadata
    except CheckpointError as error:
        raise error.at(refused) from error
    # Weights only: the optimizer's state is twice as large.
    state: dict[str, torch.Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
        and _WRAPPERS.sub("", name).startswith(_ATTRIBUTE)
    }
    try:
        with warnings.catch_warnings():
            # It says that one process reads what several wrote; that is what is wanted.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            distributed.load(state, checkpoint_id=path, no_dist=True)
    except checkpoint.api.CheckpointException as error:  # no Exception, whatever the reason
        reason, _ = next(iter(error.failures.values()))
        if not isinstance(reason, UNREADABLE):
            raise reason from error
        raise CheckpointError(
            f"{refused} ({first_line(reason)}): a rank's file is missing or cut short; use an "
            "earlier one"
        ) from error
    return state


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of one weight and of what the optimizer knows about it."""

    start: int  # of the stretch in the weight, which is taken as one row
    # ``WEIGHT``, and the optimizer's by its own names; one dimension, equal lengths
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shared:
    """What is not spread over the processes."""

    run: dict[str, Any]  # Lightning's checkpoint, without weights and optimizer
    # of every weight in the checkpoint, by its name in the LightningModule
    shapes: dict[str, list[int]]
    tied: dict[str, str]  # further names of these weights
    engine: dict[str, Any]  # counters of the strategy that wrote it, plain values


def write_part(folder: Path, rank: int, parts: Mapping[str, Part]) -> dict[str, int]:
    """Write what one process holds, by the weights' names, and bring it to the disk.

    Returns the file's name and size, for :func:`write_index`.
    """
    plain = {name: {"start": part.start, "tensors": part.tensors} for name, part in parts.items()}
    return _write(folder / f"rank-{rank:05d}.pt", {"parts": plain})


def write_shared(folder: Path, shared: Shared) -> dict[str, int]:
    """Write what all processes share; see :func:`write_part`."""
    return _write(folder / RUN_STATE, asdict(shared))


def write_index(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write the index, all files' sizes in bytes, which makes the folder a checkpoint."""
    write_json(folder / INDEX, {"version": 1, "files": dict(sizes)})


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size that each file of a folder has to have, by its name."""
    try:
        files = read_json(folder / INDEX)["files"]
        return {Path(name).name: int(size) for name, size in files.items()}
    except (CheckpointError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"its index {INDEX} cannot be read ({error})") from error


def read_shared(folder: Path) -> Shared:
    """Read what all processes share; a CheckpointError where the file is not whole."""
    try:
        return Shared(**load_plain(folder / RUN_STATE))
    except TypeError as error:
        raise CheckpointError(f"{folder / RUN_STATE} is of another program ({error})") from error


def read_parts(folder: Path) -> list[dict[str, Part]]:
    """Open the files of all processes; tensors stay in them until they are used."""
    names = sorted(file_sizes(folder).keys() - {RUN_STATE})
    files = [load_plain(folder / name, mapped=True)["parts"] for name in names]
    return [{name: Part(**part) for name, part in parts.items()} for parts in files]


def read_weights(folder: Path) -> dict[str, ComputedTensor]:
    """Open the weights of a training state, by their names in the LightningModule."""
    shared, files = read_shared(folder), read_parts(folder)
    found: dict[str, ComputedTensor] = {}
    for name, shape in shared.shapes.items():
        parts = [held[name] for held in files if name in held]
        join = partial(_join, name, tuple(shape), parts)
        found[name] = ComputedTensor(tuple(shape), torch.float32, join)
    return found | {name: found[first] for name, first in shared.tied.items()}


def _join(name: str, shape: tuple[int, ...], parts: list[Part]) -> torch.Tensor:
    whole = torch.empty(torch.Size(shape).numel())
    copied = sum(copy_overlap(part, 0, {WEIGHT: whole}) for part in parts)
    check_complete(name, copied, len(whole))
    return whole.view(shape)


def copy_overlap(part: Part, start: int, into: Mapping[str, torch.Tensor]) -> int:
    """Copy what a part has of a stretch; return the number of the weight's elements in it.

    The stretch begins at ``start`` in the weight; of the tensors of ``into``, by the names in the
    part, those that it lacks stay.
    """
    stop = part.start + len(part.tensors[WEIGHT])
    first, last = max(start, part.start), min(start + len(into[WEIGHT]), stop)
    if last <= first:
        return 0
    for name, tensor in part.tensors.items():
        if name in into:
            stretch = tensor[first - part.start : last - part.start]
            into[name][first - start : last - start] = stretch
    return last - first


def check_complete(name: str, copied: int, wanted: int) -> None:
    """Raise CheckpointError if files do not hold a stretch of a weight once, and whole."""
    if copied != wanted:
        raise CheckpointError(
            f"the checkpoint's files hold {copied} of {wanted} elements of {name}: they are not "
            "of one and the same checkpoint; use an earlier one"
        )


def _write(path: Path, value: dict[str, Any]) -> dict[str, int]:
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch's writer says so on a full disk
        raise OSError(first_line(error)) from error
    sync(path)
    return {path.name: path.stat().st_size}
