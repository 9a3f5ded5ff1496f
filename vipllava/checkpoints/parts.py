"""A training state in parts: what each process holds of every weight that trains, in its own file.

Each file says which stretch of which weight it has, so that another number of processes, or another
way of sharding, takes what belongs to each of its own. They hold plain values and tensors, and are
mapped into memory: no process reads more than it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from vipllava.checkpoints.folders import write_json
from vipllava.checkpoints.plain_pickles import load_plain
from vipllava.files.atomic import sync
from vipllava.models.hub_models import read_json
from vipllava.models.tensor_files import ComputedTensor
from vipllava.types import CheckpointError, first_line

INDEX: Final = "checkpoint.json"
"""Written last: the names of the folder's files and their sizes in bytes."""
RUN_STATE: Final = "meta.pt"
"""What all processes share: Lightning's state of the run, and how the weights are called."""
WEIGHT: Final = "fp32"
"""Among the tensors of a part: the weight itself; the others are the optimizer's, by its names."""


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

    Returns:
        The file's name and size, for :func:`write_index`.
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
    """Return the size that each file of a folder has to have, by its name.

    Raises:
        CheckpointError: the index cannot be read.
    """
    try:
        files = read_json(folder / INDEX)["files"]
        return {Path(name).name: int(size) for name, size in files.items()}
    except (CheckpointError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"its index {INDEX} cannot be read ({error})") from error


def read_shared(folder: Path) -> Shared:
    """Read what all processes share.

    Raises:
        CheckpointError: the file is missing, cut short, or holds something else.
    """
    try:
        return Shared(**load_plain(folder / RUN_STATE))
    except TypeError as error:
        raise CheckpointError(f"{folder / RUN_STATE} is of another program ({error})") from error


def read_parts(folder: Path) -> list[dict[str, Part]]:
    """Open the files of all processes; tensors stay in them until they are used.

    Raises:
        CheckpointError: a file is missing, cut short, or holds code.
    """
    names = sorted(file_sizes(folder).keys() - {RUN_STATE})
    files = [load_plain(folder / name, mapped=True)["parts"] for name in names]
    return [{name: Part(**part) for name, part in parts.items()} for parts in files]


def read_weights(folder: Path) -> dict[str, ComputedTensor]:
    """Open the weights of a training state, by their names in the LightningModule.

    Raises:
        CheckpointError: as :func:`read_shared` and :func:`read_parts`.
    """
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

    Args:
        part: of a file.
        start: of the stretch in the weight.
        into: tensors of the stretch, by the names in the part; those that it lacks stay.
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
