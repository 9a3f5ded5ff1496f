"""Vision towers: all that the package knows about one, in one value.

A tower is a model that ``transformers.AutoModel`` builds by the ``model_type`` of its config, which
says ``image_size`` and ``patch_size`` (pixels), ``hidden_size`` and ``num_hidden_layers``. What no
config says is here. docs/models.md shows how another tower is added. Behind it: how images become
what the language model reads, through tower and projector.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from vipllava.models.hub_models import read_json
from vipllava.types import CheckpointError, ConfigError, Preprocessing

if TYPE_CHECKING:  # slow to import
    from transformers import VipLlavaForConditionalGeneration

_RESAMPLINGS: Final[dict[Any, str]] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True, slots=True)
class Tower:
    """A kind of vision tower; modules and weights are named as in transformers' class."""

    model_type: str  # of its config
    preprocessing: Preprocessing  # of its input, unless its folder says otherwise
    num_prefix_tokens: int  # positions before those of the patches: 1 for a class token, or 0
    before_blocks: tuple[str, ...]  # modules in order, from pixels to hidden state 0
    blocks: str = "encoder.layers"  # the list of blocks; block k takes hidden state k to k + 1
    unread: tuple[str, ...] = ()  # weights that no feature depends on, and that cannot train
    # Hidden states for the projector, where neither job nor checkpoint says.
    feature_layers: tuple[int, ...] = (-2, -5, -8, -11, 6)


CLIP: Final = Tower(
    "clip_vision_model",
    Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    num_prefix_tokens=1,
    before_blocks=("embeddings", "pre_layrnorm"),
)
"""The tower of every published checkpoint."""

SIGLIP: Final = Tower(
    "siglip_vision_model",
    Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    num_prefix_tokens=0,
    before_blocks=("embeddings",),
)
"""SigLIP, and SigLIP 2 of a fixed resolution (whose folders say ``bilinear``)."""

_TOWERS: Final = {tower.model_type: tower for tower in (CLIP, SIGLIP)}


def register_tower(tower: Tower) -> None:
    """Make a tower known; a ConfigError where its ``model_type`` is registered already."""
    if tower.model_type in _TOWERS:
        raise ConfigError(f"a tower of model_type={tower.model_type!r} is registered already")
    _TOWERS[tower.model_type] = tower


def tower_of(vision_config: Any) -> Tower:
    """Return the tower that a config is of; a CheckpointError lists the known where none is."""
    model_type = vision_config.model_type
    if model_type not in _TOWERS:
        raise CheckpointError(
            f"{model_type!r} is no vision tower that is known here ({', '.join(_TOWERS)}): name "
            "one of these, or add yours with vipllava.models.towers.register_tower"
        )
    return _TOWERS[model_type]


def feature_layers_of(config: Any) -> tuple[int, ...]:
    """Return the feature layers of a VipLlava config, whatever its release calls the field."""
    value = getattr(config, "vision_feature_layer", None)
    if value is None:
        value = config.vision_feature_layers
    return (value,) if isinstance(value, int) else tuple(value)


def num_patches(vision_config: Any) -> int:
    """Return the patches of an image, each of which gives the language model one position."""
    return (vision_config.image_size // vision_config.patch_size) ** 2


def preprocessing_of(vision_config: Any) -> Preprocessing:
    """Return what a tower's input is made with; its config says where its folder had its own."""
    own = getattr(vision_config, "preprocessing", None)
    if own is None:
        return tower_of(vision_config).preprocessing
    return Preprocessing(tuple(own["mean"]), tuple(own["std"]), own["resampling"])


def read_preprocessing(folder: Path, vision_config: Any) -> None:
    """Note in a tower's config, in place, where ``preprocessor_config.json`` differs from its kind.

    SigLIP 2 resizes with another filter than SigLIP and is of the same ``model_type``. The config
    carries it into training, exports and inference. A folder need not have the file; one that asks
    for what is not done here is a CheckpointError.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return
    known = tower_of(vision_config).preprocessing
    raw = read_json(path)
    try:
        resample = raw.get("resample")
        mean, std = (
            tuple(map(float, raw.get(f"image_{name}") or getattr(known, name)))
            for name in ("mean", "std")
        )
        factor = float(raw.get("rescale_factor") or 1 / 255)
        switches = [n for n in ("do_resize", "do_rescale", "do_normalize") if raw.get(n) is False]
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): write or download it again"
        ) from error
    problems = [f"{name}=false" for name in switches]
    if len(mean) != 3 or len(std) != 3:
        problems.append(f"image_mean={list(mean)}, image_std={list(std)} of other than 3 colours")
    if abs(factor * 255 - 1) > 1e-3:
        problems.append(f"rescale_factor={factor:g} instead of 1/255")
    if resample is not None and resample not in _RESAMPLINGS:
        problems.append(f"resample={resample} instead of 2 (bilinear) or 3 (bicubic)")
    if problems:
        raise CheckpointError(
            f"{path} says {', '.join(problems)}, which images are not prepared with here: use "
            "another tower, or correct the file"
        )
    found: Any = (mean, std, _RESAMPLINGS.get(resample, known.resampling))
    if (stated := Preprocessing(*found)) != known:
        vision_config.preprocessing = asdict(stated)


def normalise_pixels(
    pixel_values: torch.Tensor, dtype: torch.dtype, preprocessing: Preprocessing
) -> torch.Tensor:
    """Turn images, uint8 [num_images, 3, height, width], into what a tower expects, in float32."""
    mean, std = (
        torch.tensor(values, device=pixel_values.device).view(1, 3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return ((pixel_values.float() / 255.0 - mean) / std).to(dtype)


def read_modules(
    model: VipLlavaForConditionalGeneration,
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return what decides the features: the tower's modules before the blocks, and its blocks."""
    network, tower = model.model.vision_tower, tower_of(model.config.vision_config)
    blocks = list(network.get_submodule(tower.blocks).children())
    before = [network.get_submodule(name) for name in tower.before_blocks]
    return before, blocks[: max(_feature_layers(model.config))]


def read_parameters(model: VipLlavaForConditionalGeneration) -> list[nn.Parameter]:
    """Return the weights of the vision tower that the features depend on."""
    unread = tower_of(model.config.vision_config).unread
    left_out = {id(model.model.vision_tower.get_parameter(name)) for name in unread}
    read = [p for modules in read_modules(model) for m in modules for p in m.parameters()]
    return [parameter for parameter in read if id(parameter) not in left_out]


def _feature_layers(config: Any) -> list[int]:
    """Return the hidden states that the projector reads, counted from the first."""
    return [k % (config.vision_config.num_hidden_layers + 1) for k in feature_layers_of(config)]


def image_features(
    model: VipLlavaForConditionalGeneration, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Run the tower, as far as it is read, and the projector.

    The numbers are those of ``model.get_image_features``, which runs every block of the tower: from
    uint8 [num_images, 3, height, width] to [num_images, image_seq_length, language model's width].
    """
    config: Any = model.config.vision_config
    layers = _feature_layers(model.config)
    before, blocks = read_modules(model)
    hidden = normalise_pixels(
        pixel_values, model.model.vision_tower.dtype, preprocessing_of(config)
    )
    for module in before:
        hidden = module(hidden)
    states = {0: hidden}
    for number, block in enumerate(blocks, start=1):
        hidden = block(hidden, attention_mask=None)
        if number in layers:
            states[number] = hidden
    first = tower_of(config).num_prefix_tokens
    read = torch.cat([states[layer][:, first:] for layer in layers], dim=-1)
    return model.model.multi_modal_projector(read)
