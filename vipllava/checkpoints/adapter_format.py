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
from vipllava.checkpoints.names import HF_TO_HF, HF_TO_LLAVA, hf_to_hf, map_name, rename
from vipllava.models.adapters import (
    AdapterSettings,
    adapter_parameters,
    add_adapters,
    lora_config,
    target_pattern,
)
from vipllava.models.building import name_in_memory
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
_WITHIN: Final = re.compile(r"\.(?:modules_to_save\.default|modules_to_save|default)\.")
"""What peft has in its names in memory, and some trainers in their files."""
_FACTOR: Final = re.compile(r"\.lora_[AB]\.weight$")
_READ: Final = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
)  # fmt: skip
"""Settings of peft that do not keep an adapter from being read, whatever they are."""
_PLAIN_STARTS: Final = (True, False, "gaussian", "eva", "orthogonal")
"""Initial factors; with the others the weights under the adapter are changed, too."""


def save_adapter(
    model: VipLlavaForConditionalGeneration,
    directory: str | Path,
    meta: ExportMeta,
    *,
    base: str,
    settings: AdapterSettings,
) -> Path:
    """Write a network's adapters and projector as a peft folder; an earlier one is replaced.

    ``base`` is the folder or id of the VipLlava under the adapters. A folder is named from the root
    on, so that the adapter opens in whatever folder somebody works.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written.
    """
    directory = Path(directory)
    if base and Path(base).exists():
        base = str(Path(base).resolve())
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
        directory: a peft folder of ours, of the original's LoRA runs or of another trainer: of
            some linear layers, with names of older releases, with whole weights beside the factors.

    Raises:
        CheckpointError: the folder is incomplete, or was trained on another base: the message
            lists names and shapes that do not fit.
    """
    config = _read_config(directory)
    tensors = _read_tensors(directory)
    _check_base(model, tensors, directory, config)
    # What is there says best what was adapted; a pattern may be of other names.
    config.target_modules = sorted({_FACTOR.sub("", n) for n in tensors if _FACTOR.search(n)})
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.init_lora_weights = True
    add_adapters(model, AdapterSettings(), config=config)
    present = {_WITHIN.sub(".", name): value for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            present[name].copy_(read_tensor(tensor))


def write_llava_adapter(
    directory: Path, model: Any, settings: AdapterSettings, *, base: str
) -> None:
    """Write adapters and projector into a folder as the original's LoRA runs leave them.

    ``base`` is the folder or id of the language model.
    """
    # On the language model alone.
    own = "model.language_model."
    factors = adapter_parameters(model)
    if others := [name for name in factors if not name.startswith(own)]:
        raise CheckpointError(
            f"the original's adapters are of the language model alone, and {others[0]} is not: use "
            "format=lora-merged"
        )
    targets = {name.partition(".lora_")[0].rpartition(".")[2] for name in factors}
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "peft_type": "LORA",
        "r": settings.r,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
    }
    write_json(directory / _CONFIG, config)
    renamed = {name.replace(own, "model.", 1): factor for name, factor in factors.items()}
    _save_factors(directory, renamed)
    projector = rename(hf_to_hf(_projector(model), "this model"), HF_TO_LLAVA, "this model")
    save_pickle(
        directory / NON_LORA_FILES[1],
        {_PREFIX + name: weight.detach().cpu().clone() for name, weight in projector.items()},
    )


def stored_settings(directory: Path) -> AdapterSettings:
    """Return the numbers of a stored adapter; CheckpointError if it has further ones."""
    config = _read_config(directory)
    for name in ("use_rslora", "rank_pattern", "alpha_pattern"):
        if value := getattr(config, name):
            raise CheckpointError(
                f"{directory} has {name}={value}, and the original's adapters one rank and scale "
                "for all layers: use format=lora-merged"
            )
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
    plain, more = vars(LoraConfig()), vars(config) | {"init_lora_weights": True}
    if config.init_lora_weights not in _PLAIN_STARTS:
        more["init_lora_weights"] = config.init_lora_weights
    odd = [f"{n}={v!r}" for n, v in more.items() if n not in _READ and v != plain.get(n)]
    if odd:
        raise CheckpointError(
            f"{directory}/{_CONFIG} has {', '.join(odd)}, which is not done here: merge the "
            "adapter with peft itself (merge_and_unload) and name the folder of the result"
        )
    return config


def _read_tensors(directory: Path) -> dict[str, LazyTensor]:
    """Open the factors, and the projector if it is there, by names in the network."""
    path = next((directory / name for name in _FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory} lacks {' or '.join(_FILES)}: it is incomplete")
    return {_name_in_network(name): t for name, t in open_tensors(path, "adapter").items()}


def _name_in_network(name: str) -> str:
    short = _WITHIN.sub(".", name.removeprefix(_PREFIX))
    # The original's runs put adapters on the language model alone.
    short = re.sub(r"^model\.(?=layers\.)", "model.language_model.", short)
    stored = map_name(short, HF_TO_HF)
    return short if stored is None else name_in_memory(stored)


def _check_base(
    model: Any, tensors: Mapping[str, LazyTensor], directory: Path, config: Any
) -> None:
    from peft.utils.other import get_pattern_key

    # Whole weights take the place of the base's.
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n in tensors}
    projector = {n: tuple(p.shape) for n, p in _projector(model).items()}
    if not projector.keys().isdisjoint(tensors):
        shapes |= projector
    factors = {_FACTOR.sub("", name) for name in tensors if _FACTOR.search(name)}
    for name, layer in model.named_modules():
        if name in factors and isinstance(layer, nn.Linear):
            rank = config.rank_pattern.get(get_pattern_key([*config.rank_pattern], name), config.r)
            shapes[f"{name}.lora_A.weight"] = (rank, layer.in_features)
            shapes[f"{name}.lora_B.weight"] = (layer.out_features, rank)
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
            "another model (pass that one as base=FOLDER_OR_ID), or adapts more than linear layers"
        )
    if not factors:
        raise CheckpointError(f"the adapter {directory} holds no factors (*.lora_A.weight)")


def _projector(model: VipLlavaForConditionalGeneration) -> dict[str, nn.Parameter]:
    start = "model.multi_modal_projector."
    return {name: p for name, p in model.named_parameters() if name.startswith(start)}


def _save_factors(directory: Path, weights: Mapping[str, nn.Parameter]) -> None:
    tensors = {
        _PREFIX + name.replace(".default.", "."): weight.detach().cpu().contiguous().clone()
        for name, weight in weights.items()
    }
    save_tensors(directory / _FILES[0], tensors)
