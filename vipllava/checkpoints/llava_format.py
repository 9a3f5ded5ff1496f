"""The original format: a language model's folder with tower and projector among its weights.

Its ``config.json`` is the language model's own with ``mm_`` keys. It holds neither the tower's
config nor which of its layers are read (the released tower class has both built in), so these are
given by whoever opens it. A stage-1 run leaves the projector alone in ``mm_projector.bin``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
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

from vipllava.checkpoints.names import (
    HF_TO_LLAVA,
    LLAVA_TO_HF,
    rename,
    tower_to_hf,
    without_prefix,
)
from vipllava.files.atomic import new_folder
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

MODEL_TYPES: Final = {
    "llava_llama": "llama",
    "llava_phi3": "phi3",
    "llava_mistral": "mistral",
}
"""The original's model types, and those of the language model inside."""

PROJECTOR_FILES: Final = ("mm_projector.safetensors", "mm_projector.bin")
NON_LORA_FILES: Final = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
RELEASED_TOWER: Final = "clip_4layers_336"
"""What the released code calls its tower of five layers."""

_ARCHITECTURES: Final = {
    "llama": "LlavaLlamaForCausalLM",
    "phi3": "LlavaPhiForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
}
_TOWER: Final = "vision_tower."
_MULTIMODAL_KEYS: Final = (
    "freeze_mm_mlp_adapter",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "pretrain_mm_mlp_adapter",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "tune_mm_mlp_adapter",
    "unfreeze_mm_vision_tower",
    "use_mm_proj",
)
_NOT_THE_LANGUAGE_MODELS: Final = ("_name_or_path", "architectures", "auto_map")


@dataclass(frozen=True)
class LlavaFolder:
    """An original checkpoint, opened.

    Attributes:
        text_config: of its language model.
        tensors: everything but what growing the vocabulary adds, by the names of the Hugging
            Face format; read when used.
        has_tower: whether the tower's weights are the folder's own.
    """

    text_config: PreTrainedConfig
    tensors: dict[str, LazyTensor]
    has_tower: bool


def is_llava(folder: Path) -> bool:
    """Whether a folder's ``config.json`` is of the original format."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in MODEL_TYPES


def read_llava(folder: Path, *, vision_tower: Path) -> LlavaFolder:
    """Open an original checkpoint.

    The stored tower is taken if it is complete (full fine-tunes store it, unchanged), else that
    of ``vision_tower``.

    Args:
        folder: with ``config.json`` and weights.
        vision_tower: folder of the tower.

    Raises:
        CheckpointError: it is another format, its config is of another network or contradicts
            its weights, or a weight has an unknown name.
    """
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{folder} has model_type={model_type!r}, which is not the original format "
            f"({', '.join(MODEL_TYPES)})"
        )
    for key, wanted in (("mm_projector_type", "mlp2x_gelu"), ("mm_use_im_start_end", False)):
        if raw.get(key, wanted) != wanted:
            raise CheckpointError(
                f"{folder} has {key}={raw[key]!r}, ViP-LLaVA has {wanted!r}: it is another network"
            )
    text = {
        key: value
        for key, value in raw.items()
        if not key.startswith("mm_")
        and key not in _MULTIMODAL_KEYS
        and key not in _NOT_THE_LANGUAGE_MODELS
    }
    text["model_type"] = MODEL_TYPES[model_type]
    auto: Any = AutoConfig
    text_config = auto.for_model(**text)
    tensors = rename(open_tensors(folder, "checkpoint"), LLAVA_TO_HF, str(folder))
    rows = shape_of(tensors[EMBEDDINGS])[0] if EMBEDDINGS in tensors else None
    if rows is not None and rows != text_config.vocab_size:
        raise CheckpointError(
            f"{folder}/config.json says vocab_size={text_config.vocab_size}, but its embeddings "
            f"have {rows} rows: the two are of different models"
        )
    inputs = shape_of(tensors.get(f"{PROJECTOR}.linear_1.weight", torch.empty(0, 0)))[1]
    if inputs and raw.get("mm_hidden_size", inputs) != inputs:
        raise CheckpointError(
            f"{folder}/config.json says mm_hidden_size={raw['mm_hidden_size']}, but its projector "
            f"reads {inputs}: the two are of different models"
        )
    named = tower_to_hf(open_tensors(vision_tower, "vision_tower"), str(vision_tower))
    stored = {name for name in tensors if name.startswith(_TOWER)}
    has_tower = stored == set(named)
    if not has_tower:
        tensors = {name: t for name, t in tensors.items() if name not in stored} | named
    return LlavaFolder(text_config, tensors, has_tower)


def write_llava(
    directory: Path,
    config: VipLlavaConfig,
    tensors: Mapping[str, LazyTensor],
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_aspect: str = "pad",
) -> None:
    """Write what the released code opens, weights as safetensors.

    Vocabulary rows that are nothing but the mean of the others, as growing it leaves them, are cut
    off again: they come back the same. Trained ones stay, and the released code, which resizes to
    its tokenizer's length, cuts them.

    Args:
        directory: exists.
        config: of the network.
        tensors: by the names of the Hugging Face format.
        tokenizer: saved with the weights.
        image_aspect: ``pad`` or what the released code calls otherwise.

    Raises:
        CheckpointError: the language model is of a family that the original does not have.
    """
    whole: Any = config
    kept = dict(tensors)
    own = _rows_without_means(kept, int(whole.image_token_id))
    for name in (EMBEDDINGS, HEAD):
        if name in kept and shape_of(kept[name])[0] > own:
            kept[name] = read_tensor(kept[name])[:own].clone()
    write_config(
        directory,
        config,
        num_rows=own,
        dtype=dtype_of(kept[EMBEDDINGS]),
        image_aspect=image_aspect,
    )
    saved: Any = tokenizer
    saved.save_pretrained(directory)
    write_tensors(directory, rename(kept, HF_TO_LLAVA, "this model").items())


def write_config(
    directory: Path,
    config: VipLlavaConfig,
    *,
    num_rows: int,
    dtype: torch.dtype,
    image_aspect: str = "pad",
) -> None:
    """Write ``config.json`` as the released code reads it.

    Args:
        directory: exists.
        config: of the network.
        num_rows: of the embeddings in the file.
        dtype: of the weights in the file.
        image_aspect: ``pad`` or what the released code calls otherwise.

    Raises:
        CheckpointError: the language model or the vision tower is of a family that the original
            does not have.
    """
    whole: Any = config
    tower = whole.vision_config.model_type
    if tower != CLIP.model_type:
        raise CheckpointError(
            f"the original format has no {tower!r} towers, only {CLIP.model_type}: use format=hf"
        )
    text: dict[str, Any] = whole.text_config.to_dict()
    family = text["model_type"]
    types = {inner: outer for outer, inner in MODEL_TYPES.items()}
    if family not in types:
        raise CheckpointError(
            f"the original format has no {family!r} language models, only "
            f"{', '.join(types)}: use format=hf"
        )
    for key in ("_name_or_path", "transformers_version"):
        text.pop(key, None)
    text |= {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": types[family],
        "vocab_size": num_rows,
        "dtype": str(dtype).removeprefix("torch."),
        "mm_vision_tower": RELEASED_TOWER,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": projector_shapes(config)[f"{PROJECTOR}.linear_1.weight"][1],
        "mm_vision_select_layer": -2,  # the released tower ignores it
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": image_aspect,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
    text["torch_dtype"] = text["dtype"]  # as the transformers of the released code reads it
    (directory / "config.json").write_text(
        json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def read_projector(path: Path) -> dict[str, LazyTensor]:
    """Open a projector: ``mm_projector.bin``, or the projector among a LoRA run's extra weights.

    Args:
        path: the file, or the folder it lies in.

    Returns:
        By the names of the Hugging Face format.

    Raises:
        CheckpointError: there is none, or it holds other weights, too.
    """
    if path.is_dir():
        files = [path / name for name in (*NON_LORA_FILES, *PROJECTOR_FILES)]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise CheckpointError(
                f"{path} has no projector (none of {', '.join(file.name for file in files)})"
            )
        path = found
    opened = open_tensors(path, "projector")
    whole = {without_prefix(name): tensor for name, tensor in opened.items()}
    # Files written by other tools have the names of the Hugging Face format.
    if all(name.removeprefix("model.").startswith(PROJECTOR) for name in whole):
        tensors = {name.removeprefix("model."): value for name, value in whole.items()}
    else:
        tensors = rename(whole, LLAVA_TO_HF, str(path))
    others = sorted(name for name in tensors if not name.startswith(f"{PROJECTOR}."))
    if others or not tensors:
        raise CheckpointError(
            f"{path} is no projector: it holds {', '.join(others[:5]) or 'nothing'}"
        )
    return tensors


def write_projector(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write ``mm_projector.bin`` as the released code reads it, and the same as safetensors.

    The released code's name and format are a torch pickle; it holds tensors only.

    Args:
        path: of the ``.bin``; the other file gets the same name with its own suffix.
        tensors: the projector by the names of the Hugging Face format.
    """
    values = {name: read_tensor(t).contiguous() for name, t in tensors.items()}
    named = rename(values, HF_TO_LLAVA, "this projector")
    renamed = {name: value.cpu().clone() for name, value in named.items()}
    save_pickle(path, renamed)
    save_tensors(path.with_suffix(".safetensors"), renamed)


def save_projector(model: VipLlavaForConditionalGeneration, directory: Path) -> Path:
    """Write a network's projector alone into a folder: beside its place first, then renamed.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written.
    """
    if directory.is_dir() and any(directory.iterdir()) and not _holds_projector(directory):
        raise CheckpointError(
            f"{directory} exists and holds no projector: choose another, or move it away"
        )
    projector: Any = model.model.multi_modal_projector
    tensors = {f"{PROJECTOR}.{name}": p.detach() for name, p in projector.named_parameters()}
    try:
        with new_folder(directory, replace=True) as unfinished:
            write_projector(unfinished / PROJECTOR_FILES[1], tensors)
    except OSError as error:
        raise CheckpointError(
            f"the projector could not be written to {directory} ({error}): free some space or "
            "choose another folder"
        ) from error
    return directory


def _holds_projector(directory: Path) -> bool:
    return any((directory / name).is_file() for name in PROJECTOR_FILES)


def _rows_without_means(tensors: Mapping[str, LazyTensor], image_token_id: int) -> int:
    """Return the rows of the language model's own, if all others are means of them."""
    rows = shape_of(tensors[EMBEDDINGS])[0]
    if image_token_id >= rows:
        return rows
    for name in (EMBEDDINGS, HEAD):
        if name not in tensors:
            continue
        weight = read_tensor(tensors[name])
        mean = mean_row(weight[:image_token_id]).to(weight.dtype).to(weight.device)
        if not torch.equal(weight[image_token_id:], mean.expand(rows - image_token_id, -1)):
            return rows
    return image_token_id
