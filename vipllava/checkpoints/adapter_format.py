"""Adapters as folders: peft's own format, and that of the original's LoRA runs.

Ours is a plain peft folder with the projector in it (peft's ``modules_to_save``), so that
``PeftModel.from_pretrained(base, folder)`` restores the whole trained model without this package.
The original's has the projector beside it, in ``non_lora_trainables.bin``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import VipLlavaForConditionalGeneration

from vipllava.checkpoints.export_meta import ExportMeta, write_meta
from vipllava.checkpoints.folders import checkpoint_folder, write_json
from vipllava.checkpoints.llava_format import NON_LORA_FILES
from vipllava.checkpoints.model_card import CARD_NAME, model_card
from vipllava.checkpoints.names import HF_TO_LLAVA, hf_to_hf, rename
from vipllava.models.adapters import (
    AdapterSettings,
    adapter_parameters,
    adapter_targets,
    add_adapters,
    lora_config,
    target_pattern,
)
from vipllava.models.tensor_files import (
    LazyTensor,
    list_misfits,
    open_tensors,
    read_tensor,
    save_pickle,
    save_tensors,
    shape_of,
)
from vipllava.types import CheckpointError

_CONFIG: Final = "adapter_config.json"
_FILES: Final = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX: Final = "base_model.model."


def save_adapter(
    model: VipLlavaForConditionalGeneration,
    directory: str | Path,
    meta: ExportMeta,
    *,
    base: str,
    settings: AdapterSettings,
) -> Path:
    """Write a network's adapters and projector as a peft folder; an earlier one is replaced.

    ``base`` is the folder or id of the VipLlava under the adapters.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written.
    """
    directory = Path(directory)
    config = lora_config(
        settings,
        target_modules=target_pattern(model),
        modules_to_save=["multi_modal_projector"],
        base_model_name_or_path=base,
        inference_mode=True,
    )
    with checkpoint_folder(directory, "adapter folder", [_CONFIG]) as unfinished:
        config.save_pretrained(str(unfinished))
        _save_factors(unfinished, {**adapter_parameters(model), **_projector(model)})
        write_meta(unfinished, meta)
        card = model_card(meta, "lora", model.config, base=base)
        (unfinished / CARD_NAME).write_text(card, encoding="utf-8")
    return directory


def load_adapter(model: VipLlavaForConditionalGeneration, directory: Path) -> None:
    """Put a stored adapter, and the projector in it, on a network, in place.

    Args:
        model: the base, without adapters; unchanged if there is an error.
        directory: a peft folder of ours or of the original's LoRA runs.

    Raises:
        CheckpointError: the folder is incomplete, or was trained on another base: the message
            lists names and shapes that do not fit.
    """
    config = _read_config(directory)
    tensors = _read_tensors(directory)
    _check_base(model, tensors, directory, config.r)
    add_adapters(model, AdapterSettings(), config=config)
    present = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            inside = re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name)
            present[inside].copy_(read_tensor(tensor))


def write_llava_adapter(
    directory: Path, model: Any, settings: AdapterSettings, *, base: str
) -> None:
    """Write adapters and projector into a folder as the original's LoRA runs leave them.

    ``base`` is the folder or id of the language model.
    """
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "peft_type": "LORA",
        "r": settings.r,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in adapter_targets(model)}),
        "task_type": "CAUSAL_LM",
    }
    write_json(directory / _CONFIG, config)
    # On the language model alone.
    own = "model.language_model."
    factors = adapter_parameters(model).items()
    _save_factors(directory, {name.replace(own, "model.", 1): factor for name, factor in factors})
    projector = rename(hf_to_hf(_projector(model), "this model"), HF_TO_LLAVA, "this model")
    save_pickle(
        directory / NON_LORA_FILES[1],
        {_PREFIX + name: weight.detach().cpu().clone() for name, weight in projector.items()},
    )


def stored_settings(directory: Path) -> AdapterSettings:
    """Return the numbers of a stored adapter; CheckpointError if its config cannot be read."""
    config = _read_config(directory)
    return AdapterSettings(r=config.r, alpha=config.lora_alpha, dropout=config.lora_dropout)


def _read_config(directory: Path) -> Any:
    from peft import LoraConfig, PeftConfig

    read: Any = PeftConfig
    try:
        config: Any = read.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{directory}/{_CONFIG} cannot be read ({error}): write or download it again"
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
    # The original's runs put adapters on the language model alone.
    layers = re.compile(r"^(?:base_model\.model\.)?model\.layers\.")
    return {
        layers.sub("model.language_model.layers.", name).removeprefix(_PREFIX): tensor
        for name, tensor in open_tensors(path, "adapter").items()
    }


def _check_base(model: Any, tensors: Mapping[str, LazyTensor], directory: Path, rank: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for target in adapter_targets(model):
        layer: Any = model.get_submodule(target)
        shapes[f"{target}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"{target}.lora_B.weight"] = (layer.out_features, rank)
    projector = {name: tuple(weight.shape) for name, weight in _projector(model).items()}
    if not projector.keys().isdisjoint(tensors):
        shapes |= projector
    wrong = [
        f"{name} {found} (base {shapes[name]})"
        for name, tensor in tensors.items()
        if name in shapes and (found := shape_of(tensor)) != shapes[name]
    ]
    unknown, missing = sorted(set(tensors) - set(shapes)), sorted(set(shapes) - set(tensors))
    misfits = {"misshapen": wrong, "unknown": unknown, "missing": missing}
    if problems := list_misfits(misfits):
        raise CheckpointError(
            f"the adapter {directory} does not fit this base: {problems}. It was trained on "
            "another model: pass that one as base=FOLDER_OR_ID"
        )


def _projector(model: VipLlavaForConditionalGeneration) -> dict[str, nn.Parameter]:
    start = "model.multi_modal_projector."
    return {name: p for name, p in model.named_parameters() if name.startswith(start)}


def _save_factors(directory: Path, weights: Mapping[str, nn.Parameter]) -> None:
    tensors = {
        _PREFIX + name.replace(".default.", "."): weight.detach().cpu().contiguous().clone()
        for name, weight in weights.items()
    }
    save_tensors(directory / _FILES[0], tensors)
