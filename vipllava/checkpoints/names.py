"""Weight names of every format, mapped to those of the Hugging Face format and back.

The Hugging Face format here means the files of ``llava-hf``: ``vision_tower.vision_model.X``,
``multi_modal_projector.X``, ``language_model.model.X``, ``language_model.lm_head.weight``; newer
releases of transformers write ``vision_tower.X`` and read both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, TypeVar

from vipllava.models.tensor_files import list_misfits
from vipllava.types import CheckpointError

_Value = TypeVar("_Value")
Rules = tuple[tuple[str, str], ...]
"""Beginnings of names and what becomes of them; the first that fits counts."""

_TOWER: Final = "vision_tower.vision_model."
_PROJECTOR: Final = "multi_modal_projector."
_DECODER: Final = "language_model.model."
_HEAD: Final = "language_model.lm_head."
_NO_WEIGHTS: Final = re.compile(
    # Buffers that older releases stored; they follow from the config.
    r".*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids|position_ids"
)
_OTHER_HALF: Final = re.compile(
    r"text_model\..+|(?:visual|text)_projection\..+|logit_(?:scale|bias)"
)

HF_TO_HF: Final[Rules] = (
    (_TOWER, _TOWER),
    ("vision_tower.", _TOWER),
    (_PROJECTOR, _PROJECTOR),
    (_DECODER, _DECODER),
    (_HEAD, _HEAD),
    # As they are called in memory from transformers 4.52 on.
    ("model.vision_tower.vision_model.", _TOWER),
    ("model.vision_tower.", _TOWER),
    ("model.multi_modal_projector.", _PROJECTOR),
    ("model.language_model.", _DECODER),
    ("lm_head.", _HEAD),
)
LLAVA_TO_HF: Final[Rules] = (
    ("model.vision_tower.vision_tower.vision_model.", _TOWER),
    ("model.mm_projector.clip_layernorm.", _PROJECTOR + "projector_layernorm."),
    ("model.mm_projector.final_linear.0.", _PROJECTOR + "linear_1."),
    ("model.mm_projector.final_linear.2.", _PROJECTOR + "linear_2."),
    ("model.embed_tokens.", _DECODER + "embed_tokens."),
    ("model.layers.", _DECODER + "layers."),
    ("model.norm.", _DECODER + "norm."),
    ("lm_head.", _HEAD),
)
HF_TO_LLAVA: Final[Rules] = tuple((ours, theirs) for theirs, ours in LLAVA_TO_HF)
TEXT_TO_HF: Final[Rules] = (("model.", _DECODER), ("lm_head.", _HEAD))
# transformers 5.23 saves a tower alone without the prefix.
TOWER_TO_HF: Final[Rules] = (("vision_model.", _TOWER), ("", _TOWER))


def rename(
    tensors: Mapping[str, _Value],
    rules: Rules,
    source: str,
    *,
    ignored: re.Pattern[str] = _NO_WEIGHTS,
    keep_unknown: bool = False,
) -> dict[str, _Value]:
    """Rename every tensor by the first rule that fits; nothing is dropped but known buffers.

    And what is ``ignored``. With ``keep_unknown`` names that no rule fits stay as they are.

    Raises:
        CheckpointError: names that no rule fits, or two that become one; all are listed.
    """
    renamed: dict[str, _Value] = {}
    origin: dict[str, str] = {}
    unknown, twice = list[str](), list[str]()
    for name, value in tensors.items():
        if _NO_WEIGHTS.fullmatch(name) or ignored.fullmatch(name):
            continue
        new = map_name(name, rules)
        if new is None and not keep_unknown:
            unknown.append(name)
            continue
        new = new or name
        if new in origin:
            twice.append(f"{origin[new]} and {name}")
        renamed[new], origin[new] = value, name
    if problems := list_misfits({"unknown weights": unknown, "weights twice": twice}):
        raise CheckpointError(
            f"{source} has {problems}. It is of another kind, or mixes two models"
        )
    return renamed


def map_name(name: str, rules: Rules) -> str | None:
    """Return a name by the first rule that fits it, or None."""
    for old, new in rules:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def hf_to_hf(tensors: Mapping[str, _Value], source: str) -> dict[str, _Value]:
    """Bring either key style of the Hugging Face format, or names in memory, to the first.

    Unknown names stay: the loader lists them together with what is missing or misshapen.
    """
    return rename(tensors, HF_TO_HF, source, keep_unknown=True)


def tower_to_hf(tensors: Mapping[str, _Value], source: str) -> dict[str, _Value]:
    """Rename a vision tower's weights; of a whole CLIP or SigLIP the text half is left aside."""
    return rename(tensors, TOWER_TO_HF, source, ignored=_OTHER_HALF)
