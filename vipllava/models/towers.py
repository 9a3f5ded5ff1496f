"""Vision towers: all that the package knows about one, in one value.

A tower is a model that ``transformers.AutoModel`` builds by the ``model_type`` of its config, which
says ``image_size`` and ``patch_size`` (pixels), ``hidden_size`` and ``num_hidden_layers``. What no
config says is here. docs/models.md shows how another tower is added.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vipllava.models.hub_models import read_json
from vipllava.types import CheckpointError, ConfigError, Preprocessing

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
    carries it into training, exports and inference. A folder need not have the file.

    Raises:
        CheckpointError: the file cannot be read, or asks for what is not done here.
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
