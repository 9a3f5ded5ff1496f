"""Weights out of a training checkpoint: Lightning's file, DeepSpeed's or FSDP2's folder.

For the run that ended before its export: the newest checkpoint has what trained. All are pickles in
part; the libraries' own readers would run code from them, and are held to plain values here.
"""

from __future__ import annotations

import importlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch

from vipllava.checkpoints.names import HF_TO_HF, map_name
from vipllava.checkpoints.parts import INDEX, RUN_STATE, file_sizes, read_weights
from vipllava.checkpoints.plain_pickles import (
    UNREADABLE,
    load_plain,
    plain_values_only,
    read_metadata,
)
from vipllava.models.tensor_files import LazyTensor
from vipllava.types import CheckpointError, first_line

_WRAPPERS: Final = re.compile(r"^(?:_forward_module\.|module\.|state_dict\.)*")
_ATTRIBUTE: Final = "model."
"""Of the LightningModule, before the names in the network."""


def find_damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint that a run wrote, without reading its tensors.

    Args:
        path: Lightning's file, or the folder that is written in its place under FSDP2 or DeepSpeed.

    Returns:
        What is missing or cut short, or None.
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
    """Read the weights of a training checkpoint.

    Args:
        path: Lightning's ``.ckpt`` file, or the folder that DeepSpeed (ZeRO-2, ZeRO-3) or FSDP2
            writes in its place.

    Returns:
        By the names of the Hugging Face format; weights that did not train may be missing.

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
