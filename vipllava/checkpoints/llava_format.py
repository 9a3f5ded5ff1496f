"""The original format: a language model's folder with tower and projector among its weights.

Its ``config.json`` is the language model's own with ``mm_`` keys. It holds neither the tower's
config nor which of its layers are read (the released tower class has both built in), so these are
given by whoever opens it. A stage-1 run leaves the projector alone in ``mm_projector.bin``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vipllava.checkpoints.folders import checkpoint_folder, write_json
from vipllava.checkpoints.names import HF_TO_HF, HF_TO_LLAVA, LLAVA_TO_HF, rename, tower_to_hf
from vipllava.checkpoints.older_releases import add_rope, rename_tokenizer
from vipllava.models.building import EMBEDDINGS, HEAD, PROJECTOR, mean_row, projector_shapes
from vipllava.models.hub_models import read_json
from vipllava.models.tensor_files import (
    LazyTensor,
    dtype_of,
    open_tensors,
    read_tensor,
    save_pickle,
    save_tensors,
    shape_of,
    write_tensors,
)
from vipllava.models.towers import CLIP
from vipllava.types import CheckpointError

_FAMILIES: Final = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "phi3": ("llava_phi3", "LlavaPhiForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}
"""The original's model type and architecture by the model type of the language model inside."""
_MODEL_TYPES: Final = {outer: inner for inner, (outer, _) in _FAMILIES.items()}

PROJECTOR_FILES: Final = ("mm_projector.safetensors", "mm_projector.bin")
NON_LORA_FILES: Final = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_FIXED: Final = {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False}
_NOT_THE_LANGUAGE_MODELS: Final = {
    "_name_or_path", "architectures", "auto_map", "freeze_mm_mlp_adapter", "image_aspect_ratio",
    "image_grid_pinpoints", "pretrain_mm_mlp_adapter", "tokenizer_model_max_length",
    "tokenizer_padding_side", "tune_mm_mlp_adapter", "unfreeze_mm_vision_tower", "use_mm_proj",
}  # fmt: skip


def is_llava(folder: Path) -> bool:
    """Whether a folder's ``config.json`` is of the original format."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in _MODEL_TYPES


def read_llava(
    folder: Path, *, vision_tower: Path
) -> tuple[PreTrainedConfig, dict[str, LazyTensor]]:
    """Open an original checkpoint.

    The stored tower is taken if it is complete (full fine-tunes store it, unchanged), else that
    of ``vision_tower``.

    Args:
        folder: with weights and a ``config.json`` that :func:`is_llava`.
        vision_tower: folder of the tower.

    Returns:
        The config of its language model; and everything but what growing the vocabulary adds, by
        the names of the Hugging Face format.

    Raises:
        CheckpointError: its config is of another network or contradicts its weights, or a weight
            has an unknown name.
    """
    raw = read_json(folder / "config.json")
    for key, wanted in _FIXED.items():
        if raw.get(key, wanted) != wanted:
            raise CheckpointError(
                f"{folder} has {key}={raw[key]!r}, ViP-LLaVA has {wanted!r}: it is another network"
            )
    text = {
        key: value
        for key, value in raw.items()
        if not key.startswith("mm_") and key not in _NOT_THE_LANGUAGE_MODELS
    }
    auto: Any = AutoConfig
    text_config = auto.for_model(**text | {"model_type": _MODEL_TYPES[raw["model_type"]]})
    tensors = rename(open_tensors(folder, "checkpoint"), LLAVA_TO_HF, str(folder))
    for name, axis, key, holds in (
        (EMBEDDINGS, 0, "vocab_size", "embeddings have {} rows"),
        (f"{PROJECTOR}.linear_1.weight", 1, "mm_hidden_size", "projector reads {}"),
    ):
        found = shape_of(tensors[name])[axis] if name in tensors else None
        if found and raw.get(key, found) != found:
            raise CheckpointError(
                f"{folder}/config.json says {key}={raw[key]}, but its {holds.format(found)}: the "
                "two are of different models"
            )
    tower = tower_to_hf(open_tensors(vision_tower, "vision_tower"), str(vision_tower))
    stored = {name for name in tensors if name.startswith("vision_tower.")}
    if stored != set(tower):
        tensors = {name: t for name, t in tensors.items() if name not in stored} | tower
    return text_config, tensors


def write_llava(
    directory: Path,
    config: VipLlavaConfig,
    tensors: Mapping[str, LazyTensor],
    tokenizer: PreTrainedTokenizerFast,
    image_aspect: str,
) -> None:
    """Write what the released code opens, weights as safetensors; see :func:`write_config`.

    Vocabulary rows that are nothing but the mean of the others, as growing it leaves them, are cut
    off again: they come back the same. Trained ones stay, and the released code, which resizes to
    its tokenizer's length, cuts them.
    """
    whole: Any = config
    kept = dict(tensors)
    own = _rows_without_means(kept, int(whole.image_token_id))
    for name in (EMBEDDINGS, HEAD):
        if name in kept and shape_of(kept[name])[0] > own:
            kept[name] = read_tensor(kept[name])[:own].clone()
    write_config(directory, config, tokenizer, own, dtype_of(kept[EMBEDDINGS]), image_aspect)
    write_tensors(directory, rename(kept, HF_TO_LLAVA, "this model").items())


def write_config(
    directory: Path,
    config: VipLlavaConfig,
    tokenizer: Any,
    num_rows: int,
    dtype: torch.dtype,
    image_aspect: str,
) -> None:
    """Write tokenizer and ``config.json`` as the released code reads them.

    ``num_rows`` and ``dtype`` are those of the embeddings in the weights' file.

    Raises:
        CheckpointError: the language model or the vision tower is of a family that the original
            does not have.
    """
    whole: Any = config
    text: dict[str, Any] = whole.text_config.to_dict()
    for what, family, known in (
        ("towers", whole.vision_config.model_type, (CLIP.model_type,)),
        ("language models", text["model_type"], tuple(_FAMILIES)),
    ):
        if family not in known:
            raise CheckpointError(
                f"the original format has no {family!r} {what}, only {', '.join(known)}: use "
                "format=hf"
            )
    model_type, architecture = _FAMILIES[text["model_type"]]
    name = str(dtype).removeprefix("torch.")
    text |= _FIXED | {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": num_rows,
        "dtype": name,
        "torch_dtype": name,  # as the transformers of the released code reads it
        "mm_vision_tower": "clip_4layers_336",  # so the released code calls its five layers
        "mm_hidden_size": projector_shapes(config)[f"{PROJECTOR}.linear_1.weight"][1],
        "mm_vision_select_layer": -2,  # the released tower ignores it
        "mm_vision_select_feature": "patch",
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": image_aspect,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
    for key in ("_name_or_path", "transformers_version"):
        text.pop(key, None)
    add_rope(text)
    write_json(directory / "config.json", text)
    tokenizer.save_pretrained(directory)
    rename_tokenizer(directory)


def read_projector(path: Path) -> dict[str, LazyTensor]:
    """Open a projector: ``mm_projector.bin``, or the projector among a LoRA run's extra weights.

    It is a file, or lies in a folder.

    Raises:
        CheckpointError: there is none, or it holds other weights, too.
    """
    if path.is_dir():
        names = (*NON_LORA_FILES, *PROJECTOR_FILES)
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path} has no projector (none of {', '.join(names)})")
        path = found
    opened = open_tensors(path, "projector")
    # What was around the network stands before the names: `base_model.model.` of LoRA runs,
    # `module.`, `_forward_module.`, a LightningModule's attribute.
    prefix = re.compile(rf"^(?:\w+\.)*?(?:model\.)?(?=mm_projector\.|{PROJECTOR}\.)")
    whole = {prefix.sub("model.", name): tensor for name, tensor in opened.items()}
    if len(whole) < len(opened):
        raise CheckpointError(f"{path} holds weights twice, under several prefixes")
    # Files written by other tools have the names of the Hugging Face format.
    is_hf = all(name.startswith(f"model.{PROJECTOR}.") for name in whole)
    tensors = rename(whole, HF_TO_HF if is_hf else LLAVA_TO_HF, str(path))
    others = sorted(name for name in tensors if not name.startswith(f"{PROJECTOR}."))
    if others or not tensors:
        raise CheckpointError(
            f"{path} is no projector: it holds {', '.join(others[:5]) or 'nothing'}"
        )
    return tensors


def write_projector(directory: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write ``mm_projector.bin`` as the released code reads it, and the same as safetensors."""
    named = rename(tensors, HF_TO_LLAVA, "this projector")
    values = {name: read_tensor(t).cpu().contiguous().clone() for name, t in named.items()}
    save_tensors(directory / PROJECTOR_FILES[0], values)
    save_pickle(directory / PROJECTOR_FILES[1], values)


def save_projector(model: VipLlavaForConditionalGeneration, directory: Path) -> Path:
    """Write a network's projector alone; see :func:`folders.checkpoint_folder` for errors."""
    projector: Any = model.model.multi_modal_projector
    tensors = {f"{PROJECTOR}.{name}": p.detach() for name, p in projector.named_parameters()}
    with checkpoint_folder(directory, "projector", PROJECTOR_FILES) as unfinished:
        write_projector(unfinished, tensors)
    return directory


def _rows_without_means(tensors: Mapping[str, LazyTensor], image_token_id: int) -> int:
    """Return the rows of the language model's own, if all others are means of them."""
    rows = shape_of(tensors[EMBEDDINGS])[0]
    if image_token_id >= rows:
        return rows
    for name in {EMBEDDINGS, HEAD} & tensors.keys():
        weight = read_tensor(tensors[name])
        mean = mean_row(weight[:image_token_id]).to(weight.dtype).to(weight.device)
        if not torch.equal(weight[image_token_id:], mean.expand(rows - image_token_id, -1)):
            return rows
    return image_token_id
