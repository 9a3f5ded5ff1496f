"""Adapters as folders: peft's own format, and that of the original's LoRA runs.

Ours is a plain peft folder with the projector in it (peft's ``modules_to_save``), so that
``PeftModel.from_pretrained(base, folder)`` restores the whole trained model without this package.
The original's has the projector beside it, in ``non_lora_trainables.bin``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerFast, VipLlavaForConditionalGeneration

from vipllava.checkpoints.export_meta import META_NAME, ExportMeta
from vipllava.checkpoints.model_card import CARD_NAME, model_card
from vipllava.checkpoints.names import HF_TO_LLAVA, hf_to_hf, rename
from vipllava.files.atomic import new_folder
from vipllava.models.adapters import (
    AdapterSettings,
    adapter_parameters,
    adapter_targets,
    add_adapters,
    target_pattern,
)
from vipllava.models.tensor_files import (
    LazyTensor,
    open_tensors,
    read_tensor,
    save_pickle,
    save_tensors,
    shape_of,
)
from vipllava.types import CheckpointError

_FILES: Final = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX: Final = "base_model.model."
_PROJECTOR: Final = "model.multi_modal_projector."
_FACTOR: Final = re.compile(r"(.+)\.(lora_[AB])\.(?:default\.)?weight")
_SHOWN: Final = 5


def save_adapter(
    model: VipLlavaForConditionalGeneration,
    directory: str | Path,
    meta: ExportMeta,
    *,
    base: str,
    settings: AdapterSettings,
    state: Mapping[str, torch.Tensor] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write adapters and projector as a peft folder: beside its place first, then renamed.

    Args:
        model: with adapters.
        directory: the folder; an earlier adapter folder is replaced.
        meta: see :class:`ExportMeta`.
        base: folder or id of the VipLlava under the adapters.
        settings: of the adapters.
        state: the weights by their names in the network, where the network holds only a part of
            each; the network's own if not given.
        tokenizer: saved with them.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written.
    """
    from peft import LoraConfig

    directory = Path(directory)
    if directory.is_dir() and any(directory.iterdir()) and not _is_adapter(directory):
        raise CheckpointError(
            f"{directory} exists and is no adapter folder: choose another, or move it away"
        )
    names = [*adapter_parameters(model), *_projector_names(model)]
    own: Mapping[str, torch.Tensor] = state if state is not None else dict(model.named_parameters())
    tensors = {
        _PREFIX + name.replace(".default.", "."): own[name].detach().cpu().contiguous().clone()
        for name in names
    }
    make_config: Any = LoraConfig  # alpha need not be whole, whatever its annotation says
    config: Any = make_config(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=target_pattern(model),
        modules_to_save=["multi_modal_projector"],
        base_model_name_or_path=base,
        inference_mode=True,
    )
    try:
        with new_folder(directory, replace=True) as unfinished:
            config.save_pretrained(str(unfinished))
            save_tensors(unfinished / _FILES[0], tensors)
            if tokenizer is not None:
                saved: Any = tokenizer
                saved.save_pretrained(unfinished)
            text = json.dumps(asdict(meta), indent=2) + "\n"
            (unfinished / META_NAME).write_text(text, encoding="utf-8")
            card = model_card(meta, "lora", model.config, base=base)
            (unfinished / CARD_NAME).write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"the adapter could not be written to {directory} ({error}): free some space or "
            "choose another folder"
        ) from error
    return directory


def load_adapter(model: VipLlavaForConditionalGeneration, directory: Path) -> None:
    """Put a stored adapter, and the projector in it, on a network, in place.

    Args:
        model: the base, without adapters.
        directory: a peft folder of ours or of the original's LoRA runs.

    Raises:
        CheckpointError: the folder is incomplete, or was trained on another base: the message
            lists names and shapes that do not fit. The network is unchanged then.
    """
    config = _read_config(directory)
    tensors = _read_tensors(directory)
    _check_base(model, tensors, directory, rank=config.r)
    add_adapters(model, AdapterSettings(), config=config)
    present = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            match = _FACTOR.fullmatch(name)
            inside = f"{match[1]}.{match[2]}.default.weight" if match else name
            present[inside].copy_(read_tensor(tensor))


def write_llava_adapter(
    directory: Path,
    model: VipLlavaForConditionalGeneration,
    settings: AdapterSettings,
    *,
    base: str,
) -> None:
    """Write adapters and projector as the original's LoRA runs leave them.

    Args:
        directory: exists.
        model: with adapters.
        settings: of the adapters.
        base: folder or id of the language model.
    """
    kinds = sorted({name.rsplit(".", 1)[1] for name in adapter_targets(model)})
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "peft_type": "LORA",
        "r": settings.r,
        "target_modules": kinds,
        "task_type": "CAUSAL_LM",
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
    factors = {
        _PREFIX
        + name.replace("model.language_model.", "model.", 1).replace(".default.", "."): tensor
        for name, tensor in adapter_parameters(model).items()
    }
    save_tensors(
        directory / _FILES[0],
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in factors.items()},
    )
    present = dict(model.named_parameters())
    projector = {name: present[name].detach().cpu().clone() for name in _projector_names(model)}
    renamed = rename(hf_to_hf(projector, "this model"), HF_TO_LLAVA, "this model")
    save_pickle(
        directory / "non_lora_trainables.bin",
        {_PREFIX + name: tensor for name, tensor in renamed.items()},
    )


def stored_settings(directory: Path) -> AdapterSettings:
    """Return the numbers of a stored adapter.

    Raises:
        CheckpointError: its config cannot be read.
    """
    config = _read_config(directory)
    return AdapterSettings(r=config.r, alpha=config.lora_alpha, dropout=config.lora_dropout)


def _read_config(directory: Path) -> Any:
    from peft import LoraConfig, PeftConfig

    read: Any = PeftConfig
    try:
        config: Any = read.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{directory}/adapter_config.json cannot be read ({error}): write or download it again"
        ) from error
    if type(config) is not LoraConfig:
        raise CheckpointError(f"{directory} is no LoRA adapter but a {type(config).__name__}")
    if config.bias != "none":
        raise CheckpointError(
            f"{directory} has bias={config.bias!r}: adapters with biases cannot be read"
        )
    return config


def _read_tensors(directory: Path) -> dict[str, LazyTensor]:
    """Open the factors, and the projector if it is there, by names in the network."""
    path = next((directory / name for name in _FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory} lacks {' or '.join(_FILES)}: it is incomplete")
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in open_tensors(path, "adapter").items():
        short = name.removeprefix(_PREFIX)
        # On the language model alone, as the original's runs are.
        short = re.sub(r"^model\.layers\.", "model.language_model.layers.", short)
        tensors[short] = tensor
    return tensors


def _check_base(
    model: VipLlavaForConditionalGeneration,
    tensors: Mapping[str, LazyTensor],
    directory: Path,
    *,
    rank: int,
) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for target in adapter_targets(model):
        layer: Any = model.get_submodule(target)
        shapes[f"{target}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"{target}.lora_B.weight"] = (layer.out_features, rank)
    if any(name.startswith(_PROJECTOR) for name in tensors):
        shapes |= {name: tuple(p.shape) for name, p in _projector_names(model).items()}
    wrong = [
        f"{name} {found} (base {shapes[name]})"
        for name, tensor in tensors.items()
        if name in shapes and (found := shape_of(tensor)) != shapes[name]
    ]
    unknown = sorted(set(tensors) - set(shapes))
    missing = sorted(set(shapes) - set(tensors))
    problems = [
        f"{kind} ({len(names)}): {', '.join(names[:_SHOWN])}"
        for kind, names in (("misshapen", wrong), ("unknown", unknown), ("missing", missing))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the adapter {directory} does not fit this base: {'; '.join(problems)}. It was "
            "trained on another model: pass that one as base=FOLDER_OR_ID"
        )


def _projector_names(model: VipLlavaForConditionalGeneration) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.startswith(_PROJECTOR)}


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()
