"""A training state in parts: what each process holds of every weight that trains, in its own file.

The folder does not depend on how the state was spread. Each file says which stretch of which
weight it has, so that another number of processes, or another way of sharding, takes what belongs
to each of its own. Files are mapped into memory, no process reads more than it needs; they hold
plain values and tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from vipllava.checkpoints.plain_pickles import load_plain
from vipllava.types import CheckpointError

INDEX: Final = "checkpoint.json"
"""Written last: the names of the folder's files and their sizes in bytes."""
RUN_STATE: Final = "meta.pt"
"""What all processes share: Lightning's state of the run, and how the weights are called."""
WEIGHT: Final = "fp32"
"""Among the tensors of a part: the weight itself; the others are the optimizer's, by its names."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of one weight and of what the optimizer knows about it.

    Attributes:
        start: of the stretch in the weight, which is taken as one row.
        tensors: ``WEIGHT``, and the optimizer's by its own names; one dimension, equal lengths.
    """

    start: int
    tensors: dict[str, torch.Tensor]

    @property
    def stop(self) -> int:
        """End of the stretch."""
        return self.start + len(self.tensors[WEIGHT])


@dataclass(frozen=True, slots=True)
class Shared:
    """What is not spread over the processes.

    Attributes:
        run: Lightning's checkpoint, without weights and optimizer.
        shapes: of every weight in the checkpoint, by its name in the LightningModule.
        tied: further names of these weights.
        engine: counters of the strategy that wrote it, plain values.
    """

    run: dict[str, Any]
    shapes: dict[str, list[int]]
    tied: dict[str, str]
    engine: dict[str, Any]


def write_part(folder: Path, rank: int, parts: Mapping[str, Part]) -> dict[str, int]:
    """Write what one process holds, by the weights' names, and bring it to the disk.

    Returns:
        The file's name and size, for :func:`write_index`.

    Raises:
        OSError: it cannot be written.
    """
    plain = {name: {"start": part.start, "tensors": part.tensors} for name, part in parts.items()}
    return _write(folder / f"rank-{rank:05d}.pt", {"parts": plain})


def write_shared(folder: Path, shared: Shared) -> dict[str, int]:
    """Write what all processes share; see :func:`write_part`."""
    return _write(folder / RUN_STATE, asdict(shared))


def write_index(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write the index, which makes the folder a checkpoint.

    Args:
        folder: holds the files.
        sizes: of all files in bytes.
    """
    text = json.dumps({"version": 1, "files": dict(sizes)}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size that each file of a folder has to have, by its name.

    Raises:
        OSError, ValueError, KeyError, TypeError: the index cannot be read.
    """
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return {Path(str(name)).name: int(size) for name, size in index["files"].items()}


def read_shared(folder: Path) -> Shared:
    """Read what all processes share.

    Raises:
        CheckpointError: the file is missing, cut short, or holds something else.
    """
    loaded = load_plain(folder / RUN_STATE)
    try:
        return Shared(**loaded)
    except TypeError as error:
        raise CheckpointError(f"{folder / RUN_STATE} is of another program ({error})") from error


def read_parts(folder: Path) -> list[dict[str, Part]]:
    """Open the files of all processes; tensors stay in them until they are used.

    Raises:
        CheckpointError: a file is missing, cut short, or holds something else.
    """
    files: list[dict[str, Part]] = []
    for name in sorted(file_sizes(folder).keys() - {RUN_STATE}):
        loaded = load_plain(folder / name, mapped=True)
        try:
            files.append({key: Part(**value) for key, value in loaded["parts"].items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / name} is of another program ({error})") from error
    return files


class Spread:
    """A weight that lies in several files, put together when it is used, as ``spread[...]``."""

    def __init__(self, name: str, shape: list[int], parts: list[Part]) -> None:
        self.name = name
        self.shape = shape
        self.parts = parts

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return self.shape

    def get_dtype(self) -> str:
        """Return the dtype, by its name in safetensors."""
        return "F32"

    def __getitem__(self, key: Any) -> torch.Tensor:
        whole = torch.empty(torch.Size(self.shape).numel())
        copied = sum(copy_overlap(part, 0, {WEIGHT: whole}) for part in self.parts)
        check_complete(self.name, copied, len(whole))
        return whole.view(self.shape)[key]


def read_weights(folder: Path) -> dict[str, Spread]:
    """Open the weights of a training state, by their names in the LightningModule.

    Raises:
        CheckpointError: a file is missing, cut short, or holds something else.
    """
    shared, files = read_shared(folder), read_parts(folder)
    found = {
        name: Spread(name, shape, [parts[name] for parts in files if name in parts])
        for name, shape in shared.shapes.items()
    }
    return found | {name: found[first] for name, first in shared.tied.items()}


def copy_overlap(part: Part, start: int, into: Mapping[str, torch.Tensor]) -> int:
    """Copy what a part has of a stretch.

    Args:
        part: of a file.
        start: of the stretch in the weight.
        into: tensors of the stretch, by the names in the part; those that it lacks stay.

    Returns:
        The number of elements of the weight that were copied.
    """
    first, last = max(start, part.start), min(start + len(into[WEIGHT]), part.stop)
    if last <= first:
        return 0
    for name, tensor in part.tensors.items():
        if name in into:
            into[name][first - start : last - start] = tensor[
                first - part.start : last - part.start
            ]
    return last - first


def check_complete(name: str, copied: int, wanted: int) -> None:
    """Raise CheckpointError if files do not hold a stretch of a weight once, and whole."""
    if copied != wanted:
        raise CheckpointError(
            f"the checkpoint's files hold {copied} of {wanted} elements of {name}: they are not "
            "of one and the same checkpoint; use an earlier one"
        )


def _write(path: Path, value: dict[str, Any]) -> dict[str, int]:
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's writer says so on a full disk
            raise OSError(str(error).strip().split("\n", 1)[0]) from error
        file.flush()
        os.fsync(file.fileno())
    return {path.name: path.stat().st_size}
